"""Sweeps whose steps run in processes and on hosts with stores of their own, which share a bucket."""

import hashlib
import subprocess
import sys
import time
from importlib.util import find_spec

import psutil
import pytest

from flows.sweep import saap_sweep
from storage.artifacts import ArtifactStore
from storage.runs import all_runs, read_run
from storage.warehouse import Warehouse
from tests.flows.test_graph import PROCESSES, manifests, rows, start, swept

pytestmark = pytest.mark.slow
SAME = ("evaluate.benchmarks=['wikitext2']", "speed.runs=0")
APART = ("unshare", "--map-root-user", "--mount")


def computed(store):
    """How many steps its runs computed, and how many different ones."""
    with Warehouse(store).reading() as connection:
        query = "select count(*), count(distinct key) from stage_runs where not cached"
        return connection.execute(query).fetchall()[0]


def weights(store):
    """Digests of all tensors that it holds, by artifact."""
    return {
        (stage, key, file.name): hashlib.sha256(file.read_bytes()).hexdigest()
        for stage, key in ArtifactStore(store).all()
        for file in store.glob(f"{stage}/{key}/*.safetensors")
    }


def in_bucket(s3, bucket):
    """What a bucket holds whole, and when it was written."""
    found = s3.client().list_objects_v2(Bucket=bucket, Prefix="team/")["Contents"]
    return {
        (stage, key): one["LastModified"]
        for one in found
        if one["Key"].endswith("/manifest.json")
        for stage, key in [one["Key"].split("/")[1:3]]
    }


def test_processes_share_a_bucket_and_find_what_one_process_finds(config, store, s3, bucket, prefect_server):
    swept(config, '{ "prune.ratio" = [0.2, 0.3] }')
    serial, two = store.with_name("serial"), store.with_name("two")
    places = (*SAME, f"store_remote='s3://{bucket}/team'", *PROCESSES)
    saap_sweep(str(config), [*SAME, f"store='{serial}'"])
    saap_sweep(str(config), [*places])
    assert computed(store) == (len(manifests(store)),) * 2
    assert in_bucket(s3, bucket).keys() == set(ArtifactStore(store).all())
    saap_sweep(str(config), [*places, f"store='{two}'"])  # another host
    assert computed(two) == (0, 0)
    assert rows(serial) == rows(store) == rows(two)
    assert weights(serial) == weights(store) == weights(two)


@pytest.fixture
def hosts(bucket, store, tmp_path):
    """(address of a Ray cluster, folders, how to kill the first host): two hosts that see folders of their own at the
    place of the store, and a head that runs no steps."""
    if subprocess.run([*APART, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    from ray.cluster_utils import Cluster

    store.mkdir()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={cluster.address}", "--num-cpus=1"]
    folders, started = [tmp_path / "two", tmp_path / "three"], []

    def start_host(folder):
        folder.mkdir()
        script = 'mount --bind "$1" "$2"; shift 2; exec "$@"'
        command = [*APART, "sh", "-ec", script, "sh", folder, store, *ray, "--block"]
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + 120
        while sum(node["Alive"] for node in cluster.global_state.node_table()) < 1 + len(started):
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def kill(host):
        there = [*psutil.Process(host.pid).children(recursive=True), host]
        for process in there:
            process.kill()
        host.wait()

    try:
        for folder in folders:  # one after another: two that start at once can choose the same ports
            start_host(folder)
        yield cluster.address, folders, lambda: kill(started[0])
    finally:
        for host in started:
            if host.poll() is None:
                kill(host)
        cluster.shutdown()


@pytest.mark.skipif(find_spec("prefect_ray") is None, reason="saap[ray] is not installed")
def test_hosts_with_stores_of_their_own_share_a_bucket_and_one_outlives_the_other(
    config, store, s3, bucket, hosts, prefect_server
):
    address, (two, three), kill = hosts
    swept(config, '{ "prune.ratio" = [0.2, 0.3] }')
    same = (*SAME, "recover.epochs=24")
    place = (f"store_remote='s3://{bucket}/team'", "execute.runner='ray'", f"execute.address='{address}'")
    sweep = start("sweep", config, *(word for override in (*same, *place) for word in ("--set", override)))
    deadline = time.monotonic() + 300
    while not list(two.glob("recover/.draft-*")):
        assert sweep.poll() is None, sweep.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    made = in_bucket(s3, bucket)
    kill()
    output, _ = sweep.communicate(timeout=400)
    assert sweep.returncode == 0, output
    assert [read_run(store, run_id)["status"] for run_id in all_runs(store)] == ["completed"] * 2
    assert in_bucket(s3, bucket).items() >= made.items(), "what was made is made again"
    assert in_bucket(s3, bucket).keys() == set(ArtifactStore(store).all())
    assert computed(store) == (len(manifests(store)),) * 2
    assert "prune" in {stage for stage, _ in ArtifactStore(two).all()}
    assert set(ArtifactStore(three).all()) <= set(ArtifactStore(store).all())
    saap_sweep(str(config), [*same, f"store='{store.with_name('serial')}'"])
    assert rows(store) == rows(store.with_name("serial"))
    assert weights(store) == weights(store.with_name("serial"))
