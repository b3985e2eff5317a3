"""A Prefect server of the user's that is not there, or fails, ends a command in one line."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.server import prefect_api
from storage.errors import StorageError


@pytest.fixture
def busy():
    """Address of a server that says 503 to everything."""

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(503)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


def test_a_server_that_is_not_there_is_named_before_anything_runs(tmp_path):
    nobody = temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"})
    with nobody, pytest.raises(StorageError, match=r"127\.0\.0\.1:9.*PREFECT_API_URL"), prefect_api(tmp_path):
        pass


def test_a_page_in_place_of_an_api_is_named(tmp_path):
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}"})
        with url, pytest.raises(StorageError, match="does PREFECT_API_URL lack its /api"), prefect_api(tmp_path):
            pass
        server.shutdown()


def test_a_server_that_fails_for_longer_than_prefect_retries_is_one_line(tmp_path, busy):
    with (
        temporary_settings({PREFECT_API_URL: busy}),
        pytest.raises(StorageError, match="503") as failed,
        prefect_api(tmp_path) as url,
    ):
        httpx.get(f"{url}/flow_runs").raise_for_status()
    assert "\n" not in str(failed.value)


def test_a_server_that_a_profile_names_is_used_and_none_of_ours_stays(tmp_path, prefect_server):
    profiles = tmp_path / "profiles.toml"
    profiles.write_text(f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{prefect_server}"\n')
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    asked = (
        "import psutil, sys; from pathlib import Path; from flows.server import prefect_api, quiet_settings\n"
        "quiet_settings(Path(sys.argv[1]))\n"
        "with prefect_api(Path(sys.argv[1])) as url: print(url, psutil.Process().children())"
    )
    done = subprocess.run(
        [sys.executable, "-c", asked, tmp_path / "store"],
        env={**environment, "PREFECT_PROFILES_PATH": str(profiles)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [f"{prefect_server} []"], done.stderr


@pytest.mark.parametrize(
    ("users", "spins"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_waiting_threads_soon_sleep_unless_the_user_says_otherwise(tmp_path, users, spins):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    load = (
        "import sys; from pathlib import Path; from flows.server import quiet_settings\n"
        "quiet_settings(Path(sys.argv[1])); import torch"
    )
    done = subprocess.run(
        [sys.executable, "-c", load, tmp_path],
        env={**environment, **users, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr  # libgomp's own words as it is loaded
