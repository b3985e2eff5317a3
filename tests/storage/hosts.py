"""Hosts with stores of their own, and what they publish there."""

import os

from storage.artifacts import MANIFEST, ArtifactStore
from storage.warehouse import Warehouse
from tests.storage.kill_points import tables

CONTENT = {"a.txt": b"hello", "sub/b.bin": os.urandom(20_000), "empty": b""}


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
