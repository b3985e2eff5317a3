"""What a network does to the real clients ends in one line, at each place where they ask for something."""

import re

import pytest

from tests.hub.test_hub_data import LINE

ROLES = "lambda: data('piqa'), lambda: data('ptb'), lambda: data('calibration'), lambda: model('org/tiny')"
PLACES = {
    "commit": "api/(datasets|models)/[^/]+/[^/]+$",
    "list of files": "(tree|revision|paths-info)/",
    "place of a file": "HEAD .*(resolve|cdn)/",
    "file": "GET .*(resolve|cdn)/",
}
CASES = [
    ("commit", "page", "the answer for .* is not the hub's: log in to the network, or check HF_ENDPOINT"),
    ("list of files", "page", "the answer for .* is not the hub's: log in to the network, or check HF_ENDPOINT"),
    ("place of a file", "page", r"cannot download .* \(\w+Error\): check the network"),
    ("file", "page", r"cannot download .* \(\w+Error\): check the network"),
    ("list of files", "reset", r"cannot download .* \(ReadError\): check the network"),
    ("file", "reset", r"cannot download .* \(ReadError\): check the network"),
    ("place of a file", "noise", r"cannot download .* \(RemoteProtocolError\): check the network"),
    ("commit", "hang", r"cannot download .* \((ReadTimeout|RemoteProtocolError)\): check"),
]


@pytest.mark.parametrize(("place", "fault", "expected"), CASES)
def test_what_does_not_pass_is_one_line(hub, ask, model, place, fault, expected):
    hub.faults = {PLACES[place]: [fault] * 1000}
    roles = ROLES if fault != "hang" else "lambda: data('piqa')"
    lines = ask(LINE.format(actions=f"{roles},"), HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
    assert len(lines) == roles.count("lambda")
    for line in lines:
        # a list of files that was asked for has told some clients the commit
        if place == "commit" and line.startswith("had "):
            continue
        assert line.split()[:2] in (["MissingData", "2"], ["HubError", "2"]), line
        assert re.search(expected, line), line
        assert "NEWLINE" not in line
    assert lines[0].startswith("MissingData")


@pytest.mark.parametrize("fault", ["reset", "noise", "page", "cut"])
def test_what_passes_is_tried_again_at_each_place(hub, ask, model, fault):
    hub.faults = {place: [fault] for place in PLACES.values()}
    lines = ask(LINE.format(actions="lambda: data('piqa'), lambda: model('org/tiny')"))
    assert [line.split()[0] for line in lines] == ["had", "had"]
    assert not any(hub.faults.values())


@pytest.mark.parametrize("scheme", ["https://127.0.0.1", "https://hub.invalid"], ids=["no TLS there", "no such name"])
def test_a_hub_that_cannot_be_reached_is_one_line(hub, ask, scheme):
    lines = ask(
        LINE.format(actions="lambda: data('piqa'), lambda: model('org/tiny')"),
        HF_ENDPOINT=f"{scheme}:{hub.url.rpartition(':')[2]}",
    )
    assert [line.split()[0] for line in lines] == ["MissingData", "HubError"]
    assert all("(ConnectError): check the network, or set HF_HUB_OFFLINE=1" in line for line in lines)
    assert not any("NEWLINE" in line for line in lines)


def test_a_storage_that_cannot_be_reached_is_one_line(hub, ask, model, mini):
    """hf_xet, which fetches large files from the hub's own storage, raises plain RuntimeErrors."""
    hub.xet = "http://127.0.0.1:9"
    action = LINE.format(actions="lambda: data('piqa'), lambda: model('org/tiny')")
    lines = ask(action, HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1")
    assert [line.split()[:2] for line in lines] == [["MissingData", "2"], ["HubError", "2"]]
    assert all("cannot download" in line and "set HF_HUB_DISABLE_XET=1" in line for line in lines), lines
    assert not any("NEWLINE" in line for line in lines)
    assert [line.split()[0] for line in ask(action, HF_HUB_DISABLE_XET="1")] == ["had", "had"]
