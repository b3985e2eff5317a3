"""Steps on a real Ray cluster of two nodes on this machine, one of which dies."""

import time
from importlib.util import find_spec

import psutil
import pytest

from storage.locks import holder
from storage.runs import all_runs, read_run
from storage.warehouse import Warehouse
from tests.flows.conftest import saap
from tests.flows.test_cli import refused
from tests.flows.test_graph import manifests, rows, start, swept

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("prefect_ray") is None, reason="saap[ray] is not installed"),
]


@pytest.fixture
def cluster():
    """(address, the second node's raylet, how to kill that node)"""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = made.add_node(num_cpus=1)
    made.wait_for_nodes()
    (raylet,) = second.all_processes["raylet"]
    yield made.address, raylet.process.pid, lambda: made.remove_node(second, allow_graceful=False)
    made.shutdown()


def at_work(store, stage, node):
    """Whether a process of the node makes an artifact of this stage."""
    for draft in store.glob(f"{stage}/.draft-*"):
        key = draft.name.removeprefix(".draft-").rpartition("-")[0]
        words = holder(store / "locks" / f"{stage}-{key}.lock").split()
        if words[0] == "process" and node in {p.pid for p in psutil.Process(int(words[1])).parents()}:
            return True
    return False


def test_a_sweep_outlives_a_node_and_finds_what_one_process_finds(config, store, tmp_path, cluster, prefect_server):
    address, raylet, kill = cluster
    swept(config, '{ "prune.ratio" = [0.2, 0.3] }')
    same = [w for o in ("recover.epochs=24", "evaluate.benchmarks=['wikitext2']", "speed.runs=0") for w in ("--set", o)]
    sweep = start("sweep", config, *same, "--set", "execute.runner='ray'", "--set", f"execute.address='{address}'")
    deadline = time.monotonic() + 300
    while not at_work(store, "recover", raylet):
        assert sweep.poll() is None, sweep.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    made = manifests(store)
    kill()
    output, _ = sweep.communicate(timeout=400)
    assert sweep.returncode == 0, output
    assert [read_run(store, run_id)["status"] for run_id in all_runs(store)] == ["completed"] * 2
    assert manifests(store).items() >= made.items(), "what was made is made again"
    with Warehouse(store).reading() as connection:
        (found,) = connection.execute(
            "select count(*), count(distinct key) from stage_runs where not cached"
        ).fetchall()
    assert found == (len(manifests(store)),) * 2
    done = saap("sweep", config, *same, "--store", tmp_path / "serial")
    assert done.returncode == 0, done.stderr
    assert rows(store) == rows(tmp_path / "serial")


def test_a_step_fits_a_node_that_has_all_it_asks_for():
    from flows.ray_place import fits

    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}]
    for asked, found in (({"num_cpus": 4}, [True, False]), ({"num_cpus": 2, "num_gpus": 1}, [False, True])):
        assert [fits(asked, node) for node in nodes] == found
    assert not fits({"num_cpus": 1}, {"Alive": False, "Resources": {"CPU": 4.0}})


def test_a_server_of_this_machine_alone_is_out_of_reach_of_other_hosts():
    from flows.ray_place import out_of_reach

    nodes = [{"Alive": alive, "NodeManagerHostname": name} for alive, name in ((True, "a"), (True, "b"), (False, "c"))]
    assert out_of_reach("http://127.0.0.1:4200/api", "a", nodes) == ["b"]
    assert out_of_reach("http://127.0.0.1:4200/api", "a", nodes[:1]) == []
    assert out_of_reach("http://head:4200/api", "a", nodes) == []


def test_a_cluster_that_is_not_there_is_one_line(config, prefect_server):
    asked = ("--set", "execute.runner='ray'", "--set", "execute.address='127.0.0.1:9'")
    refused(saap("run", config, *asked), "ray start --head")
