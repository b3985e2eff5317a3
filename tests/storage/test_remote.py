"""A remote store: real S3 requests over loopback, and a folder. What is whole comes over, nothing else does."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from s3fs import S3FileSystem

from storage.artifacts import MANIFEST, SMALL, ArtifactStore
from storage.errors import DamagedError, StorageError
from storage.gc import find_waste, remove
from storage.remote import Remote
from storage.remote_files import PIECE, RemoteError
from storage.runs import RunRecord, all_runs, read_run, read_stages
from storage.warehouse import Warehouse
from tests.storage.kill_points import ABOUT, run, tables
from tests.storage.s3 import S3

CONTENT = {"a.txt": b"hello", "sub/b.bin": os.urandom(20_000), "empty": b""}
UPLOAD = """
import sys
from storage.artifacts import ArtifactStore
from storage.remote import Remote
Remote(sys.argv[1]).upload(ArtifactStore(sys.argv[2]), "score", "k")
"""


@pytest.fixture(scope="module")
def s3():
    server = S3()
    yield server
    server.close()


@pytest.fixture
def bucket(s3, request, monkeypatch):
    """The name of a bucket of this test's own; this process and its children may use it."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # they remember credentials
    name = f"bucket-{abs(hash(request.node.name))}"
    s3.client().create_bucket(Bucket=name)
    yield name
    s3.cut, s3.before = 0, lambda method, path: None
    s3.check_permissions(False)


@pytest.fixture
def url(bucket):
    return f"s3://{bucket}/team/store"


@pytest.fixture(params=["s3", "folder"])
def place(request, tmp_path):
    """A URL of either kind."""
    if request.param == "s3":
        return request.getfixturevalue("url")
    (tmp_path / "shared").mkdir()
    return f"file://{tmp_path / 'shared'}"


@pytest.fixture
def stores(tmp_path):
    """Two hosts."""
    return empty_store(tmp_path / "one"), empty_store(tmp_path / "two")


def empty_store(root):
    store = ArtifactStore(root)
    store.prepare()
    return store


def publish(store, content=CONTENT, key="k", stage="score"):
    with store.lock(stage, key), store.publish(stage, key, run_id="r1", summary={}) as folder:
        for name, data in content.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)


def files(store, key="k"):
    folder = store.path("score", key)
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rows(store):
    """Of all tables but the one that remembers times of files."""
    return {name: found for name, found in tables(Warehouse(store.root)).items() if name != "loading.parts"}


def leftovers(store):
    return [path.name for path in store.root.rglob("*") if path.name.startswith(".")]


def folder_of(s3, bucket):
    """Where the one artifact of a bucket lies, and its objects."""
    names = [name for name in s3.objects(bucket) if name.endswith(MANIFEST)]
    assert len(names) == 1
    return names[0].removesuffix(MANIFEST)


def test_what_one_host_uploads_another_fetches_bit_for_bit(place, stores):
    one, two = stores
    publish(one)
    assert Remote(place).bring(two, "score", "k") is None
    assert Remote(place).upload(one, "score", "k")
    assert Remote(place).bring(two, "score", "k") == one.find("score", "k")
    assert files(two) == files(one)
    assert two.find("score", "k", verify=True) is not None
    assert not leftovers(two)


def test_large_files_go_in_pieces(url, stores):
    one, two = stores
    publish(one, {"large": os.urandom(4 * PIECE + 1), "small": b"1"})
    Remote(url).upload(one, "score", "k")
    assert Remote(url).bring(two, "score", "k") is not None
    assert files(two) == files(one)


def test_what_another_host_wrote_after_a_look_is_seen(place, stores):
    one, _ = stores
    publish(one)
    early = Remote(place)
    assert early.find("score", "k") is None
    assert early.all_runs() == []
    Remote(place).upload(one, "score", "k")
    assert early.find("score", "k") == one.find("score", "k")


def test_nothing_is_uploaded_twice(s3, url, stores):
    one, _ = stores
    publish(one)
    Remote(url).upload(one, "score", "k")
    written = []
    s3.before = lambda method, path: method in ("PUT", "POST") and written.append(path)
    assert Remote(url).upload(one, "score", "k")
    assert written == []


def test_the_manifest_is_written_last(s3, url, bucket, stores):
    publish(stores[0])
    written = []
    s3.before = lambda method, path: method in ("PUT", "POST") and written.append(path)
    Remote(url).upload(stores[0], "score", "k")
    assert len(written) == len(CONTENT) + 1
    assert written[-1].endswith(f"/{MANIFEST}")


def test_a_writer_killed_at_any_request_leaves_nothing_to_take_and_the_next_one_completes_it(s3, url, bucket, stores):
    one, two = stores
    publish(one)
    written, kills = [0], 0
    for kill_at in range(1, 20):
        child = subprocess.Popen([sys.executable, "-c", UPLOAD, url, str(one.root)])
        count = [0]

        def kill(method, path, child=child, count=count, kill_at=kill_at):
            if method == "PUT":
                count[0] += 1
                if count[0] == kill_at:
                    child.send_signal(signal.SIGKILL)
                    child.wait()
                    raise ConnectionAbortedError("its sender is dead")

        s3.before = kill
        if child.wait() == 0:
            break
        kills += 1
        s3.before = lambda method, path: None
        assert Remote(url).bring(two, "score", "k") is None
        assert not leftovers(two)
        written.append(len(s3.objects(bucket)))
    assert kills >= 2
    assert written == sorted(written)  # what is there stays, and is not sent again
    assert written[-1] > 0
    assert Remote(url).bring(two, "score", "k") is not None
    assert files(two) == files(one)


def test_a_connection_cut_in_a_download_is_tried_again(s3, url, stores):
    one, two = stores
    publish(one)
    Remote(url).upload(one, "score", "k")
    s3.cut = 3
    assert Remote(url).bring(two, "score", "k") is not None
    assert s3.cut == 0
    assert files(two) == files(one)


def test_connections_that_are_always_cut_end_in_a_line_and_leave_nothing(s3, url, stores):
    one, two = stores
    publish(one)
    Remote(url).upload(one, "score", "k")
    s3.cut = 10**6
    with pytest.raises(RemoteError, match=r"cannot read the remote store .*: give the same command again") as failed:
        Remote(url).bring(two, "score", "k")
    assert failed.value.may_pass
    assert "\n" not in str(failed.value)
    assert not two.path("score", "k").exists()
    assert not leftovers(two)
    s3.cut = 0
    assert Remote(url).bring(two, "score", "k") is not None


def test_a_wrong_digest_is_not_taken_and_the_next_upload_puts_it_right(s3, url, bucket, stores, caplog):
    one, two = stores
    publish(one)
    Remote(url).upload(one, "score", "k")
    name = f"{folder_of(s3, bucket)}sub/b.bin"
    s3.client().put_object(Bucket=bucket, Key=name, Body=bytes(20_000))  # the size is right
    remote = Remote(url)
    assert remote.bring(two, "score", "k") is None
    assert "sub/b.bin has other content than its manifest says) and left out" in caplog.text
    assert not two.path("score", "k").exists()
    assert not leftovers(two)
    publish(two)  # computed anew
    assert remote.upload(two, "score", "k")
    third = empty_store(two.root.parent / "three")
    assert Remote(url).bring(third, "score", "k") is not None
    assert files(third)["sub/b.bin"] == CONTENT["sub/b.bin"]


@pytest.mark.parametrize("harm", ["shorter", "gone", "no manifest", "half a manifest", "another manifest"])
def test_what_is_not_whole_is_not_there_and_is_completed(s3, url, bucket, stores, harm):
    one, two = stores
    publish(one)
    Remote(url).upload(one, "score", "k")
    folder, client = folder_of(s3, bucket), s3.client()
    content = client.get_object(Bucket=bucket, Key=f"{folder}{MANIFEST}")["Body"].read()
    if harm == "shorter":
        client.put_object(Bucket=bucket, Key=f"{folder}a.txt", Body=b"hell")
    elif harm == "gone":
        client.delete_object(Bucket=bucket, Key=f"{folder}a.txt")
    elif harm == "no manifest":
        client.delete_object(Bucket=bucket, Key=f"{folder}{MANIFEST}")
    elif harm == "half a manifest":
        client.put_object(Bucket=bucket, Key=f"{folder}{MANIFEST}", Body=content[:100])
    else:
        client.put_object(Bucket=bucket, Key=f"{folder}{MANIFEST}", Body=content.replace(b'"score"', b'"prune"'))
    assert Remote(url).find("score", "k") is None
    assert Remote(url).bring(two, "score", "k") is None
    assert Remote(url).upload(one, "score", "k")
    assert Remote(url).bring(two, "score", "k") is not None
    assert files(two) == files(one)


def test_a_manifest_that_names_files_outside_its_folder_is_not_taken(s3, url, bucket, stores):
    from storage.keys import digest

    one, two = stores
    publish(one)
    manifest = one.find("score", "k")
    for name in ("../../evil", "/tmp/evil", "../score-evil"):
        named = {name: manifest["files"]["a.txt"]}
        folder = f"team/store/score/k/{digest(named)}"
        text = json.dumps(manifest | {"files": named}).encode()
        s3.client().put_object(Bucket=bucket, Key=f"{folder}/{MANIFEST}", Body=text)
        s3.client().put_object(Bucket=bucket, Key=f"{folder}/{name}", Body=CONTENT["a.txt"])
    assert Remote(url).bring(two, "score", "k") is None
    assert list(two.root.parent.rglob("*evil*")) == []


def test_two_hosts_that_made_the_same_with_bytes_of_their_own_are_no_conflict(url, stores):
    one, two = stores
    publish(one, CONTENT | {"log": b"at 10:00"})
    publish(two, CONTENT | {"log": b"at 11:00"})
    together = threading.Barrier(2)

    def upload(store):
        remote = Remote(url)
        together.wait()
        remote.upload(store, "score", "k")

    uploads = [threading.Thread(target=upload, args=(store,)) for store in stores]
    for thread in uploads:
        thread.start()
    for thread in uploads:
        thread.join()
    third = empty_store(one.root.parent / "three")
    assert Remote(url).bring(third, "score", "k") is not None
    assert files(third) in (files(one), files(two))


def test_four_processes_that_upload_the_same_at_once_leave_one_whole_copy(s3, url, bucket, stores):
    one, two = stores
    publish(one, CONTENT | {"more": os.urandom(3_000_000)})
    children = [subprocess.Popen([sys.executable, "-c", UPLOAD, url, str(one.root)]) for _ in range(4)]
    assert [child.wait() for child in children] == [0] * 4
    assert len(s3.objects(bucket)) == len(CONTENT) + 2
    assert Remote(url).bring(two, "score", "k") is not None
    assert files(two) == files(one)


def test_no_credentials_is_a_line(s3, url, stores, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(RemoteError, match=r"Unable to locate credentials.*: set credentials .*AWS_PROFILE") as failed:
        Remote(url).files.check(stores[0].root, write=True)
    assert not failed.value.may_pass


def test_a_bucket_or_folder_that_is_not_there_is_a_line(bucket, stores, tmp_path):
    for missing in ("s3://no-such-bucket/x", f"file://{tmp_path}/nowhere", f"{tmp_path}/nowhere"):
        with pytest.raises(RemoteError, match="make it first, or correct the URL") as failed:
            Remote(missing).files.check(stores[0].root, write=True)
        assert not failed.value.may_pass
    assert not (tmp_path / "nowhere").exists()


def test_no_network_is_a_line_and_may_pass(bucket, url, stores, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(RemoteError, match=r"Could not connect .*give the same command again when it answers") as failed:
        Remote(url).files.check(stores[0].root, write=True)
    assert failed.value.may_pass


def test_a_read_only_remote_is_read_and_refused_for_writing(s3, url, bucket, stores, monkeypatch):
    one, two = stores
    publish(one)
    Remote(url).upload(one, "score", "k")
    keys = s3.user("reader", "s3:ListBucket", "s3:GetObject")
    s3.check_permissions(True)
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    remote = Remote(url)
    remote.files.check(two.root, write=False)
    assert remote.bring(two, "score", "k") is not None
    with pytest.raises(RemoteError, match=r"cannot write .*Access Denied.*saap pull fetches runs") as failed:
        remote.files.check(two.root, write=True)
    assert not failed.value.may_pass


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("s3:/bucket/x", "give a URL"),
        ("bucket/x", "give a URL"),
        ("s3://", "names no bucket"),
        ("nothing://x/y", "is no place for a remote store: Protocol not known"),
        ("gs://bucket/x", "is not installed: .*gcsfs"),
        ("ftp://me:secret@host/x", "holds a password"),
    ],
)
def test_a_url_that_is_none_is_a_line(wrong, said):
    with pytest.raises(RemoteError, match=said) as failed:
        Remote(wrong)
    assert "secret" not in str(failed.value)


def test_a_remote_inside_the_store_is_refused(tmp_path):
    for remote, store in (("s/in", "s"), ("s", "s"), ("s", "s/in")):
        (tmp_path / remote).mkdir(parents=True, exist_ok=True)
        with pytest.raises(RemoteError, match="lie in each other"):
            Remote(str(tmp_path / remote)).files.check(tmp_path / store, write=False)
    (tmp_path / "other").mkdir()
    Remote(str(tmp_path / "other")).files.check(tmp_path / "s", write=True)


def test_a_full_disk_here_is_not_the_remotes_fault(url, stores, monkeypatch):
    import errno

    one, two = stores
    publish(one)
    Remote(url).upload(one, "score", "k")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="no space left for score"):
        Remote(url).bring(two, "score", "k")
    assert not leftovers(two)


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
