"""A remote store that does not answer, does not allow it, or holds what is not whole: a line, and nothing is taken."""

import errno
import json
import os
import socket
import subprocess
import sys

import pytest
from s3fs import S3FileSystem

from storage import remote_files
from storage.artifacts import MANIFEST
from storage.errors import StorageError
from storage.keys import digest
from storage.remote import Remote
from storage.remote_files import RemoteError
from tests.storage.hosts import CONTENT, empty_store, files, folder_of, leftovers, publish


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


def test_a_server_that_never_answers_is_a_line_and_may_pass(bucket, url, stores, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(remote_files, "PATIENCE", 2.0)
        with pytest.raises(RemoteError, match="did not answer for 2 s: give the same command again") as failed:
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


def test_without_s3fs_it_is_a_line():
    code = "import sys; sys.modules['s3fs'] = None; from storage.remote import Remote; Remote('s3://bucket/x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is not installed: pip install -c constraints.txt s3fs" in done.stderr.splitlines()[-1]


def test_a_remote_inside_the_store_is_refused(tmp_path):
    for remote, store in (("s/in", "s"), ("s", "s"), ("s", "s/in")):
        (tmp_path / remote).mkdir(parents=True, exist_ok=True)
        with pytest.raises(RemoteError, match="lie in each other"):
            Remote(str(tmp_path / remote)).files.check(tmp_path / store, write=False)
    (tmp_path / "other").mkdir()
    Remote(str(tmp_path / "other")).files.check(tmp_path / "s", write=True)


def test_a_full_disk_here_is_not_the_remotes_fault(url, stores, monkeypatch):
    one, two = stores
    publish(one)
    Remote(url).upload(one, "score", "k")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="no space left for score"):
        Remote(url).bring(two, "score", "k")
    assert not leftovers(two)
