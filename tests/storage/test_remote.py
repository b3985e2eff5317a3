"""A remote store: real S3 requests over loopback, and a folder. What is whole comes over, nothing else does."""

import os
import signal
import subprocess
import sys
import threading

from storage.artifacts import MANIFEST
from storage.remote import Remote
from storage.remote_files import PIECE
from tests.storage.hosts import CONTENT, empty_store, files, leftovers, publish

UPLOAD = """
import sys
from storage.artifacts import ArtifactStore
from storage.remote import Remote
Remote(sys.argv[1]).upload(ArtifactStore(sys.argv[2]), "score", "k")
"""


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
    publish(one, CONTENT | {"in-parts": bytes(105_000_000)})
    written, killed_in = [0], []
    for kill_at in range(1, 20):
        child = subprocess.Popen([sys.executable, "-c", UPLOAD, url, str(one.root)])
        count = [0]

        def kill(method, path, child=child, count=count, kill_at=kill_at, killed_in=killed_in):
            if method == "PUT":
                count[0] += 1
                if count[0] == kill_at:
                    killed_in.append(path.rpartition("/")[2])
                    child.send_signal(signal.SIGKILL)
                    child.wait()
                    raise ConnectionAbortedError("its sender is dead")

        s3.before = kill
        if child.wait() == 0:
            break
        s3.before = lambda method, path: None
        assert Remote(url).bring(two, "score", "k") is None
        assert not leftovers(two)
        written.append(len(s3.objects(bucket)))
    assert "in-parts" in killed_in
    assert written == sorted(written)  # what is there stays, and is not sent again
    assert written[-1] > 0
    assert Remote(url).bring(two, "score", "k") is not None
    assert files(two) == files(one)


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
