"""Runs pushed and pulled, and a store that is a cache of a remote one."""

import shutil

import pytest

from storage.artifacts import MANIFEST, SMALL
from storage.errors import DamagedError, StorageError
from storage.gc import find_waste, remove
from storage.keys import digest
from storage.remote import Remote
from storage.runs import RunRecord, all_runs, read_run, read_stages
from tests.storage.hosts import publish, rows
from tests.storage.kill_points import ABOUT, PLAIN, run


def test_a_run_is_pushed_and_pulled_whole(place, stores):
    one, two = stores
    run(one.root, "r1")
    run(one.root, "r2")
    assert Remote(place).push(one, "r1") == []
    assert Remote(place).all_runs() == ["r1"]
    assert Remote(place).pull(two, "r1") == []
    assert all_runs(two.root) == ["r1"]
    assert read_run(two.root, "r1") == read_run(one.root, "r1")
    assert list(read_stages(two.root, "r1")) == list(read_stages(one.root, "r1"))
    Remote(place).push(one, "r2")
    Remote(place).pull(two, "r2")
    assert rows(two) == rows(one)


def test_gc_leaves_what_a_pull_has_fetched_so_far(place, stores, monkeypatch):
    one, two = stores
    run(one.root, "r1")
    Remote(place).push(one, "r1")
    bring, seen = Remote.bring, []

    def and_clean(self, store, stage, key):
        found = bring(self, store, stage, key)
        seen.append([waste.kind for waste in find_waste(store) if waste.kind in ("artifact", "run record")])
        return found

    monkeypatch.setattr(Remote, "bring", and_clean)
    assert Remote(place).pull(two, "r1") == []
    assert len(seen) > 1
    assert not any(seen)
    assert not [waste for waste in find_waste(two) if waste.kind != "lock"]


def test_nothing_stays_of_a_pull_that_fails(place, stores, monkeypatch):
    one, two = stores
    run(one.root, "r1")
    Remote(place).push(one, "r1")

    def gone(*_):
        raise StorageError("gone")

    monkeypatch.setattr(Remote, "bring", gone)
    with pytest.raises(StorageError, match="gone"):
        Remote(place).pull(two, "r1")
    assert list(two.root.glob("runs/*")) == []


def test_artifacts_that_nobody_has_any_more_are_named(url, stores):
    one, two = stores
    run(one.root, "r1")
    shutil.rmtree(one.path("prune", PLAIN))
    assert [name.partition("/")[0] for name in Remote(url).push(one, "r1")] == ["prune"]
    assert [name.partition("/")[0] for name in Remote(url).pull(two, "r1")] == ["prune"]
    assert all_runs(two.root) == ["r1"]


def test_a_run_with_a_damaged_artifact_or_record_is_not_pulled(s3, url, bucket, stores):
    one, two = stores
    run(one.root, "r1")
    Remote(url).push(one, "r1")
    name = next(name for name in s3.objects(bucket) if "/prune/" in name and not name.endswith(MANIFEST))
    s3.client().put_object(Bucket=bucket, Key=name, Body=b"x" * s3.objects(bucket)[name])
    with pytest.raises(DamagedError, match="is damaged, and run r1 was not fetched"):
        Remote(url).pull(two, "r1")
    assert all_runs(two.root) == []
    s3.client().put_object(Bucket=bucket, Key="team/store/runs/r1.json", Body=b"{}")
    with pytest.raises(StorageError, match="it has no run"):
        Remote(url).pull(two, "r1")


def test_gc_removes_here_only_what_is_whole_there(s3, url, bucket, stores):
    one, _ = stores
    run(one.root, "r1")
    assert not [waste for waste in find_waste(one) if waste.reference]
    big, harmed, own, little = map(digest, ("big", "harmed", "own", "little"))
    for key in (big, harmed, own):
        publish(one, {"x": bytes(SMALL + 1)}, key, "recover")
    publish(one, key=little, stage="recover")
    for key in (big, harmed, little):
        Remote(url).upload(one, "recover", key)
    name = next(name for name in s3.objects(bucket) if f"/{harmed}/" in name and not name.endswith(MANIFEST))
    s3.client().put_object(Bucket=bucket, Key=name, Body=b"")
    before, found = s3.objects(bucket), rows(one)
    waste = find_waste(one, elsewhere=Remote(url).spares(one))
    assert [(w.reference, w.why) for w in waste if w.reference] == [(("recover", big), "whole in the remote store")]
    remove(one, waste)
    assert one.find("recover", big) is None
    assert {key for _, key in one.all()} >= {harmed, own, little}
    assert s3.objects(bucket) == before
    assert rows(one) == found
    assert Remote(url).bring(one, "recover", big) is not None


def test_gc_leaves_all_artifacts_alone_while_a_run_is_at_work(url, stores):
    one, _ = stores
    publish(one, {"x": bytes(SMALL + 1)}, key := digest("big"))
    Remote(url).upload(one, "score", key)
    record = RunRecord(one.root, "r1", **ABOUT)
    assert [waste for waste in find_waste(one, elsewhere=Remote(url).spares(one)) if waste.reference] == []
    record.finish("completed")
    assert len([waste for waste in find_waste(one, elsewhere=Remote(url).spares(one)) if waste.reference]) == 1


def test_a_record_that_is_none_is_named_and_left_out_of_the_list(place, stores, caplog):
    one, two = stores
    run(one.root, "r1")
    remote = Remote(place)
    remote.push(one, "r1")
    remote.files.write("runs/r2.json", b"half")
    remote.files.write("runs/mine.json", b'{"run": {"run_id": "other"}, "stages": []}')
    remote.files.write("runs/deeper/r3.json", b"{}")
    remote.files.write("runs/notes.txt", b"mine")
    assert [record["run"]["run_id"] for record in remote.records()] == ["r1"]
    assert [f"{place}/runs/{name}.json is no record of that run" in caplog.text for name in ("r2", "mine")] == [
        True
    ] * 2
    assert remote.all_runs() == ["mine", "r1", "r2"]
    with pytest.raises(DamagedError, match=r"runs/r2\.json is no record of that run \(it is no JSON\)$"):
        remote.pull(two, "r2")
    assert remote.pull(two, "r1") == []
