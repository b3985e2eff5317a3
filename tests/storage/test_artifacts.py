import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.artifacts import MANIFEST, SMALL, ArtifactStore
from storage.errors import StorageError


def publish(store, stage="score", key="k", text="hello", **about):
    with store.lock(stage, key), store.publish(stage, key, **about) as folder:
        (folder / "a.txt").write_text(text)


@pytest.fixture
def store(tmp_path):
    store = ArtifactStore(tmp_path / "store")
    store.prepare()
    return store


def test_a_published_artifact_is_found_with_its_manifest(store):
    publish(store, run_id="r1")
    manifest = store.find("score", "k", verify=True)
    assert manifest["run_id"] == "r1"
    assert manifest["files"]["a.txt"]["bytes"] == 5
    assert (store.path("score", "k") / "a.txt").read_text() == "hello"


def test_an_error_while_publishing_leaves_nothing(store):
    def half(folder):
        (folder / "a.txt").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), store.publish("score", "k") as folder:
        half(folder)
    assert store.find("score", "k") is None
    assert list((store.root / "score").iterdir()) == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "a.txt").unlink(),
        lambda folder: (folder / "a.txt").write_text("longer than before"),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text('{"files"'),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace("bytes", "bites")),
        lambda folder: (folder / MANIFEST).write_text('{"stage": "score", "key": "k", "files": ["a.txt"]}'),
        lambda folder: (folder / MANIFEST).write_bytes(bytes(300)),
        lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
        lambda folder: (folder / "a.txt").write_bytes(bytes(5)),
    ],
)
def test_a_damaged_artifact_is_set_aside_and_can_be_made_again(store, harm, caplog):
    publish(store)
    harm(store.path("score", "k"))
    assert store.find("score", "k") is None
    assert "damaged" in caplog.text
    assert len(list((store.root / "damaged").iterdir())) == 1
    publish(store, text="again")
    assert (store.path("score", "k") / "a.txt").read_text() == "again"


def test_a_process_with_too_many_open_files_calls_no_artifact_damaged(store):
    publish(store)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(StorageError, match="Too many open files"):
            store.find("score", "k")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert store.find("score", "k", verify=True) is not None


def test_changed_content_of_the_same_size_is_noticed_in_small_files_always_in_large_ones_when_asked(store):
    publish(store)
    (store.path("score", "k") / "a.txt").write_text("HELLO")
    assert "content" in store.inspect("score", "k")[1]
    publish(store, key="large", text="x" * (SMALL + 1))
    (store.path("score", "large") / "a.txt").write_text("y" * (SMALL + 1))
    assert store.inspect("score", "large")[1] is None
    assert "content" in store.inspect("score", "large", verify=True)[1]


def test_a_killed_writer_leaves_no_artifact_and_its_draft_is_swept(store):
    code = (
        "import os, signal; from storage.artifacts import ArtifactStore\n"
        f"store = ArtifactStore({str(store.root)!r})\n"
        "with store.lock('score', 'k'), store.publish('score', 'k') as folder:\n"
        "    (folder / 'a.txt').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert store.find("score", "k") is None
    assert len(list((store.root / "score").iterdir())) == 1
    publish(store)  # the kernel freed the dead writer's lock
    assert [p.name for p in (store.root / "score").iterdir()] == ["k"]


def _publish_once(root: str, marks: str, name: str) -> None:
    store = ArtifactStore(root)
    with store.lock("score", "k"):
        if store.find("score", "k") is None:
            with store.publish("score", "k") as folder:
                (folder / "a.txt").write_text(name)
                Path(marks, name).touch()


def test_of_many_writers_one_computes_and_the_others_find(store, tmp_path):
    (tmp_path / "marks").mkdir()
    context = multiprocessing.get_context("spawn")
    arguments = [(str(store.root), str(tmp_path / "marks"), f"w{i}") for i in range(4)]
    workers = [context.Process(target=_publish_once, args=a) for a in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    (winner,) = os.listdir(tmp_path / "marks")
    assert (store.path("score", "k") / "a.txt").read_text() == winner


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(store):
    def fill_up(folder):
        (folder / "a.txt").write_text("x")
        with open("/dev/full", "w") as full:
            full.write("x" * 100_000)

    with pytest.raises(StorageError, match="no space left"), store.publish("score", "k") as folder:
        fill_up(folder)
    assert list((store.root / "score").iterdir()) == []


def test_a_store_that_cannot_be_written_is_refused_by_name():
    with pytest.raises(StorageError, match="/proc/nowhere"):
        ArtifactStore("/proc/nowhere").prepare()


def test_the_manifest_is_plain_json_with_digests(store):
    import hashlib

    publish(store, text="abc")
    manifest = json.loads((store.path("score", "k") / MANIFEST).read_text())
    assert manifest["files"]["a.txt"]["sha256"] == hashlib.sha256(b"abc").hexdigest()
