"""Runs pushed and pulled, and a store that is a cache of a remote one."""

import pytest

from storage.artifacts import MANIFEST, SMALL
from storage.errors import DamagedError, StorageError
from storage.gc import find_waste, remove
from storage.remote import Remote
from storage.runs import RunRecord, all_runs, read_run, read_stages
from tests.storage.hosts import publish, rows
from tests.storage.kill_points import ABOUT, run


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
    remove(one, [waste for waste in find_waste(one, ["r1"]) if waste.reference and waste.reference[0] == "prune"])
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
    for key in ("big", "harmed", "own"):
        publish(one, {"x": bytes(SMALL + 1)}, key, "recover")
    publish(one, key="little", stage="recover")
    for key in ("big", "harmed", "little"):
        Remote(url).upload(one, "recover", key)
    harmed = next(name for name in s3.objects(bucket) if "/harmed/" in name and not name.endswith(MANIFEST))
    s3.client().put_object(Bucket=bucket, Key=harmed, Body=b"")
    before, found = s3.objects(bucket), rows(one)
    waste = find_waste(one, elsewhere=Remote(url).spares(one))
    assert [(w.reference, w.why) for w in waste if w.reference] == [(("recover", "big"), "whole in the remote store")]
    remove(one, waste)
    assert one.find("recover", "big") is None
    assert {key for _, key in one.all()} >= {"harmed", "own", "little"}
    assert s3.objects(bucket) == before
    assert rows(one) == found
    assert Remote(url).bring(one, "recover", "big") is not None


def test_gc_leaves_all_artifacts_alone_while_a_run_is_at_work(url, stores):
    one, _ = stores
    publish(one, {"x": bytes(SMALL + 1)})
    Remote(url).upload(one, "score", "k")
    record = RunRecord(one.root, "r1", **ABOUT)
    assert [waste for waste in find_waste(one, elsewhere=Remote(url).spares(one)) if waste.reference] == []
    record.finish("completed")
    assert len([waste for waste in find_waste(one, elsewhere=Remote(url).spares(one)) if waste.reference]) == 1
