"""What the doctor says about the hub, and proxies that must not be asked for what is on this machine."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from flows.server import keep_loopback_off_proxies

ASK = "from flows.doctor import _hub; print(*_hub(), sep='|')"
NOWHERE = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")


@pytest.fixture
def hub():
    """The address of a server whose answer has the status that its path begins with."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(int(self.path.split("/")[1]))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def found(script, **environment):
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", **environment}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip().split("|")


def test_the_hub_is_fine_when_it_answers_and_not_when_it_does_not(hub):
    assert found(ASK, HF_ENDPOINT=f"{hub}/200")[1:] == ["True", f"{hub}/200 answers"]
    assert found(ASK, HF_ENDPOINT=f"{hub}/401")[1] == "True"
    _, fine, why = found(ASK, HF_ENDPOINT=f"{hub}/503")
    assert fine == "False"
    assert "503" in why
    assert "HF_HUB_OFFLINE=1" in why
    assert found(ASK, HF_ENDPOINT="http://127.0.0.1:9")[1] == "False"
    assert found(ASK, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")[1] == "True"


def test_what_is_on_this_machine_is_not_asked_for_through_a_proxy(hub):
    ask = "import httpx, urllib.request\n"
    ask += f"print(httpx.get('{hub}/200').status_code, urllib.request.urlopen('{hub}/200').status)"
    with pytest.raises(subprocess.CalledProcessError):
        found(ask, NO_PROXY="", no_proxy="", **NOWHERE)
    ready = "from flows.server import keep_loopback_off_proxies as k; k()\n"
    assert found(ready + ask, NO_PROXY="", no_proxy="", **NOWHERE) == ["200 200"]


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [
        (None, None, "127.0.0.1,localhost,::1"),
        ("", "a.org", "a.org,127.0.0.1,localhost,::1"),
        ("b.org, localhost", "a.org", "b.org,localhost,127.0.0.1,::1"),
        ("*", None, "*"),
    ],
)
def test_what_the_user_keeps_off_proxies_stays_off(monkeypatch, lower, upper, expected):
    for name, value in (("no_proxy", lower), ("NO_PROXY", upper)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    keep_loopback_off_proxies()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == expected
