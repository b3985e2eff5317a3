"""Deployments on a Prefect server with PostgreSQL: a worker that dies, sweeps that overlap, a failure that notifies."""

import contextlib
import http.server
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from storage.warehouse import Warehouse
from tests.flows.test_graph import manifests, swept

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BINARIES, reason="PostgreSQL is not installed: apt install postgresql"),
]
ROOT = Path(__file__).parents[2]
NETWORKS = itertools.count()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(found, seconds=180, what="it"):
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.5)
    return value


@pytest.fixture(scope="module")
def database():
    """The address of a PostgreSQL server of its own. It refuses to run as root."""
    folder, port = Path("/tmp") / f"saap-pg-{os.getpid()}", free_port()
    folder.mkdir()
    before = []
    if os.getuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        before = ["runuser", "-u", "postgres", "--"]

    def do(name, *words):
        command = [*before, BINARIES[-1] / name, *words]
        subprocess.run(command, check=True, cwd=folder, capture_output=True)

    do("initdb", "-D", folder / "data", "-A", "trust", "-U", "postgres")
    do(
        "pg_ctl",
        "-D",
        folder / "data",
        "-w",
        "-l",
        folder / "log",
        "-o",
        f"-p {port} -k {folder} -h 127.0.0.1",
        "start",
    )
    do("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "prefect")
    yield f"postgresql+asyncpg://postgres@127.0.0.1:{port}/prefect"
    do("pg_ctl", "-D", folder / "data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(database, tmp_path_factory):
    """The environment of clients of a whole Prefect server on that database, with our deployments."""
    home, port = tmp_path_factory.mktemp("server"), free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        "PREFECT_API_URL": url,
        "PREFECT_HOME": str(home),
        "PREFECT_API_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "0.0.0.0", "--port", str(port)]
    with (home / "log").open("wb") as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

        def healthy():
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"{url}/health", timeout=2).status == 200

        until(healthy, what=f"the start of the server ({home / 'log'})")
        prefect(environment, "work-pool", "create", "saap", "--type", "process")
        prefect(environment, "deploy", "--all")
        yield environment
        running.terminate()
        running.wait(30)


def prefect(environment, *arguments):
    command = [sys.executable, "-m", "prefect", "--no-prompt", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ask(environment, path, **body):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(
        f"{environment['PREFECT_API_URL']}/{path}", data, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def deployed(environment, name, config, *overrides):
    """The id of a flow run of a deployment."""
    deployment = ask(environment, f"deployments/name/{name}")
    parameters = {"config": str(config), "overrides": list(overrides)}
    return ask(environment, f"deployments/{deployment['id']}/create_flow_run", parameters=parameters)["id"]


def state(environment, flow_run):
    return ask(environment, f"flow_runs/{flow_run}")["state"]["name"]


@contextlib.contextmanager
def network():
    """A network of its own, joined to this machine by two interfaces: what runs a command there, and our address there.

    Without the right to make one it is this machine's.
    """
    number = next(NETWORKS)
    name = f"saap{os.getpid()}-{number}"
    ours, theirs = (f"198.18.{os.getpid() % 256}.{4 * number + side}" for side in (1, 2))
    try:
        for words in (
            f"netns add {name}",
            f"link add {name} type veth peer name eth0 netns {name}",
            f"addr add {ours}/30 dev {name}",
            f"link set {name} up",
            f"-n {name} addr add {theirs}/30 dev eth0",
            f"-n {name} link set eth0 up",
            f"-n {name} link set lo up",
        ):
            subprocess.run(["ip", *words.split()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield [], "127.0.0.1"
    else:
        yield ["ip", "netns", "exec", name], ours
    finally:
        if Path("/run/netns", name).exists():
            subprocess.run(["ip", "netns", "del", name], check=True)


@contextlib.contextmanager
def worker(environment, folder):
    """A worker as on a host of its own: its folder and, if that is possible, its network; a way to kill all there."""
    folder.mkdir()
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "saap", "--name", folder.name]
    with network() as (there, server), (folder / "log").open("wb") as log:
        url = environment["PREFECT_API_URL"].replace("127.0.0.1", server)
        own = {**environment, "PREFECT_HOME": str(folder), "PREFECT_API_URL": url}
        started = subprocess.Popen([*there, *command], env=own, cwd=folder, stdout=log, stderr=log)

        def kill():
            there = [*psutil.Process(started.pid).children(recursive=True), psutil.Process(started.pid)]
            for process in there:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            started.wait()

        try:
            yield kill
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                kill()


def test_a_sweep_outlives_the_worker_it_runs_on(config, store, server, tmp_path):
    rules = (ROOT / "automations.yaml").read_text().replace("within: 600", "within: 45")
    (tmp_path / "rules.yaml").write_text(rules)
    prefect(server, "automation", "create", "--from-file", tmp_path / "rules.yaml")
    ratios = [round(0.1 + 0.03 * number, 2) for number in range(6)]
    swept(config, f'{{ "prune.ratio" = {ratios} }}')
    with worker(server, tmp_path / "one") as kill:
        flow_run = deployed(server, "saap-sweep/sweep", config, "evaluate.benchmarks=['wikitext2']")
        until(lambda: len(list(store.glob("prune/[!.]*"))) > 2, what="half of the sweep")
        with worker(server, tmp_path / "two"):
            kill()
            made = manifests(store)
            assert state(server, flow_run) == "Running"
            until(lambda: state(server, flow_run) in ("Completed", "Failed", "Crashed"), 220, "the end of the sweep")
    assert state(server, flow_run) == "Completed"
    assert manifests(store).items() >= made.items(), "what was made is made again"
    with Warehouse(store).reading() as connection:
        query = "select ratio from runs where status = 'completed' group by ratio order by ratio"
        assert [ratio for (ratio,) in connection.execute(query).fetchall()] == ratios
        query = "select count(*), count(distinct key) from stage_runs where not cached"
        ((computed, different),) = connection.execute(query).fetchall()
        assert computed == different <= len(manifests(store))
        assert connection.execute("select count(*) from runs where status = 'killed'").fetchall() == [(1,)]


def test_a_sweep_that_comes_while_the_last_one_is_at_work_is_cancelled(config, store, server, tmp_path):
    swept(config, '{ "prune.ratio" = [0.2, 0.3] }')
    with worker(server, tmp_path / "three"):
        first = deployed(server, "saap-sweep/family-sweep", config, "recover.epochs=12")
        until(lambda: state(server, first) == "Running", what="the first sweep")
        second = deployed(server, "saap-sweep/family-sweep", config, "recover.epochs=12")
        until(lambda: state(server, second) == "Cancelled", what="the end of the second sweep")
        assert state(server, first) == "Running"
        until(lambda: state(server, first) == "Completed", 300, "the end of the first sweep")


def test_a_sweep_that_fails_notifies(config, server, tmp_path):
    """With the lines of docs/sweeps.md."""
    told = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            told.append(self.rfile.read(int(self.headers["content-length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words):
            pass

    hook = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    text = (ROOT / "docs" / "sweeps.md").read_text()
    lines = text.split("```python\n")[1].split("```")[0]
    assert "https://hooks.example.org/saap" in lines
    lines = lines.replace("https://hooks.example.org/saap", f"http://127.0.0.1:{hook.server_port}/")
    done = subprocess.run([sys.executable, "-c", lines], env=server, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with worker(server, tmp_path / "four"):
        flow_run = deployed(server, "saap-sweep/sweep", tmp_path / "absent.toml")
        until(lambda: state(server, flow_run) == "Failed", what="the failure")
        until(lambda: told, what="the notification")
    hook.shutdown()
    assert "saap-sweep" in told[0]
    assert "absent.toml" in told[0]
