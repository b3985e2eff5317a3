"""A Prefect server for one command, when the user has none running.

Prefect's own temporary server outlives a killed parent and keeps its standard output open; this one ends with us.
"""

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from storage.errors import StorageError

START_SECONDS = 180
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# what only deployments need; the recorder of task runs must stay, or the UI shows none
UNUSED_SERVICES = ("SCHEDULER", "LATE_RUNS", "FOREMAN", "TRIGGERS", "PAUSE_EXPIRATIONS", "REPOSSESSOR")
# how often a waiting OpenMP thread looks before it sleeps: with libgomp's own 300,000 it keeps a core from other
# processes, with 1,000 it falls asleep between the small products of decoding (benchmarks/busy.py)
SPINS = "3000"


def quiet_settings(store: Path) -> None:
    """Settings that must be in the environment before Prefect is imported. What the user has set stays."""
    for name, value in {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLIENT_MAX_RETRIES": "8",  # many runs beside one SQLite server: it says 503 for up to minutes
        "PREFECT_LOCAL_STORAGE_PATH": str(store / "prefect" / "results"),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "saap",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():
        os.environ.setdefault(name, value)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    keep_loopback_off_proxies()


def keep_loopback_off_proxies() -> None:
    """Add this machine to NO_PROXY for Prefect's clients and all child processes, because no proxy can reach it."""
    users = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""  # the first is the one that counts
    if users.strip() != "*":
        names = [name.strip() for name in users.split(",") if name.strip()]
        users = ",".join([*names, *(name for name in LOOPBACK if name not in names)])
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = users


@contextlib.contextmanager
def prefect_api(store: Path, meanwhile: tuple[str, ...] = ()) -> Iterator[str]:
    """Address of a Prefect API: the user's (environment or profile), or of a server that lives as long as the block.

    meanwhile: modules to import while that server starts, in the seconds it takes. Raises StorageError when it does not
    start, or fails in the block for longer than Prefect retries.
    """
    with contextlib.ExitStack() as stack:
        # begun before Prefect is imported here, so that the two imports, of two seconds each, go on side by side
        starting = None if os.environ.get("PREFECT_API_URL") else stack.enter_context(_own_server(store / "prefect"))
        import httpx
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, get_current_settings, temporary_settings

        users = get_current_settings().api.url
        try:
            if starting is None or users:  # a profile may name one too
                stack.close()
                _ask_health(str(users))
                yield str(users)
            else:
                for module in meanwhile:
                    importlib.import_module(module)
                url = starting()
                # nobody watches heartbeats there, and the thread that sends them takes up to a second to end
                with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
                    yield url
        except httpx.HTTPError as error:
            at = f" at {users}" if users else f"; see {store / 'prefect' / 'server.log'}"
            line = str(error).partition("\n")[0] or type(error).__name__
            raise StorageError(f"the Prefect server failed ({line}){at}: the same command goes on from here") from error


def _ask_health(url: str) -> None:
    """Raises StorageError when nobody answers, or with a page. Prefect judges other answers itself."""
    kind = None
    try:
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            kind = answer.headers.get_content_type()
    except (OSError, ValueError) as error:
        raise StorageError(
            f"no Prefect server answers at {url}: start it with prefect server start, or unset PREFECT_API_URL"
        ) from error
    if kind == "text/html":
        raise StorageError(f"what answers at {url} is no Prefect API: does PREFECT_API_URL lack its /api?")


@contextlib.contextmanager
def _own_server(home: Path) -> Iterator[Callable[[], str]]:
    """Begin to start one. What is yielded waits until it answers, makes it our API, and returns its address."""
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home}/prefect.db",
        "PREFECT_UI_API_URL": url,
        **{f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in UNUSED_SERVICES},
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    # one start at a time: two servers that find no database would both make its tables
    with FileLock(home / "start.lock") as lock, (home / "server.log").open("ab") as log:
        server = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_parent,
            process_group=0,  # a Ctrl-C is for the command, which then still tells the server that it ends
        )

        def wait() -> str:
            _wait_until_healthy(server, url, home / "server.log")
            lock.release()
            _use_api(url)
            return url

        try:
            yield wait
        finally:
            _send_what_is_queued()
            _use_api(None)
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _use_api(url: str | None) -> None:
    if url is None:
        os.environ.pop("PREFECT_API_URL", None)
    else:
        os.environ["PREFECT_API_URL"] = url
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()


def _send_what_is_queued() -> None:
    """Prefect sends logs and events from threads: let them finish before their server goes."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=10)
    EventsWorker.drain_all(timeout=10)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait_until_healthy(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with direct.open(f"{url}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.05)
    server.kill()
    raise StorageError(f"the Prefect server did not start; see {log}, or start one and set PREFECT_API_URL")
