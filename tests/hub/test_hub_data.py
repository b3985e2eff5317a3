"""Data sets and models from a hub that really speaks its protocol, through huggingface_hub and datasets as they are."""

import json
import re

from tasks.data import DATA
from tests.hub.conftest import SHARDS

READ = """
import json, sys
from pathlib import Path
from storage.keys import Fingerprints
from tasks.data import DATA, benchmark_file, calibration_texts, find_data, read_data
for role in {roles}:
    found = find_data("hub", role, Fingerprints(Path("unused")))
    texts = [{{"text": t}} for t in calibration_texts(found.place)] if role == "calibration" else None
    print(json.dumps([role, found.place, texts or read_data(found.place, role)]))
"""
LINE = """
from pathlib import Path
from storage.keys import Fingerprints
from tasks.data import find_data, read_data
from tasks.model_source import model_source
import tasks.hub
tasks.hub.WAITS = (0.01, 0.01, 0.01)
def model(name, revision=None):
    return model_source(name, revision, Fingerprints(Path("unused"))).path
def data(role):
    return len(read_data(find_data("hub", role, Fingerprints(Path("unused"))).place, role))
for action in ({actions}):
    try:
        print("had", action())
    except Exception as error:
        print(type(error).__name__, getattr(error, "exit_code", None), str(error).replace("\\n", " NEWLINE "))
"""


def test_every_set_is_read_in_the_layout_of_its_repository_once_and_then_from_the_cache(hub, ask, mini):
    code = READ.format(roles=sorted(DATA))
    for offline in ("0", "1"):
        for line in ask(code, HF_HUB_OFFLINE=offline):
            role, place, rows = json.loads(line)
            commit = hub.repositories[f"datasets/{DATA[role].hub}"].branches[DATA[role].hub_revision or "main"]
            assert place == f"hub@{commit}"
            assert rows == [{column: row[column] for column in DATA[role].columns} for row in mini(DATA[role].place)]
        asked, hub.requests = hub.requests, []
    assert asked == [], "asked while offline"


def test_the_commit_of_the_key_is_read_though_the_branch_has_moved(hub, ask, mini):
    """What the stages do, hours after the key was made."""
    repository = hub.repositories["datasets/baber/piqa"]
    old = repository.branches["main"]
    files = dict(repository.commits[old])
    repository.commit({"README.md": files["README.md"]})
    code = f"from tasks.data import read_data\nprint(len(read_data('hub@{old}', 'piqa')))"
    assert ask(code) == [str(len(mini("piqa/validation")))]


def test_only_shards_that_are_drawn_from_are_downloaded(hub, ask):
    code = """
from pathlib import Path
from storage.keys import Fingerprints
from tasks.data import calibration_texts, find_data
texts = calibration_texts(find_data("hub", "calibration", Fingerprints(Path("unused"))).place)
print(len(texts), bool(texts[0]), bool(texts[len(texts) - 1]))
"""
    ask(code)
    whole = {r.rpartition("/")[2] for r in hub.requests if r.startswith("HEAD") and "/resolve/" in r}
    assert whole == {"0000.parquet", f"{SHARDS - 1:04d}.parquet"}


def test_a_model_comes_with_what_belongs_to_it_and_nothing_else(hub, ask, model):
    code = """
from pathlib import Path
from storage.keys import Fingerprints
from tasks.model_source import model_source
found = model_source("org/tiny", None, Fingerprints(Path("unused")))
print(found.path, found.weights, found.extras)
"""
    first = ask(code)
    commit = hub.repositories["models/org/tiny"].branches["main"]
    names = {r.partition(f"{commit}/")[2] for r in hub.downloads()}
    assert {"config.json", "chat_template.jinja", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert sum(name.startswith("model-0") for name in names) > 2
    assert not [n for n in names if n.startswith(("original", "consolidated")) or n.endswith((".bin", ".pth"))]
    hub.requests.clear()
    assert ask(code) == first
    assert hub.downloads() == []
    hub.requests.clear()
    assert ask(code, HF_HUB_OFFLINE="1") == first
    assert hub.requests == []


def test_a_look_finds_a_model_that_was_downloaded_and_downloads_none(hub, ask, model):
    """Though the files that are left on the hub are not there."""
    code = """
from pathlib import Path
from storage.keys import Fingerprints
from tasks.model_source import model_source
for look_only in {order}:
    try:
        print(model_source("org/tiny", None, Fingerprints(Path("unused"), look_only=look_only)).path)
    except ValueError as error:
        print(error)
"""
    looked, ran, again = ask(code.format(order=(True, False, True)))
    assert (
        looked == "model org/tiny is no local folder and has not been downloaded yet, which only saap run and sweep do"
    )
    hub.requests.clear()
    assert ran == again
    assert ask(code.format(order=[True])) == [ran]
    assert hub.requests == []


def test_each_refusal_is_one_line(hub, ask, model):
    hub.repository("models/org/gated").gated = True
    hub.repositories["models/org/gated"].commit({"config.json": b"{}"})
    hub.repositories["datasets/baber/piqa"].gated = True
    hub.repositories["models/org/old"] = type(hub.repositories["models/org/tiny"])(renamed="org/tiny")
    del hub.repositories["datasets/Rowan/hellaswag"]
    hub.faults = {"datasets/allenai/winogrande": [429] * 50, "datasets/allenai/openbookqa": [503] * 50}
    cases = {
        "lambda: model('org/gated')": "model org/gated is gated: ask for access.*HF_TOKEN",
        "lambda: model('org/none')": "no such thing as the model org/none",
        "lambda: model('org/tiny', 'v9')": "the model org/tiny has no such revision",
        "lambda: data('piqa')": "data set baber/piqa is gated.*or set data to 'mini' or to a folder",
        "lambda: data('hellaswag')": "no such thing as the data set Rowan/hellaswag",
        "lambda: data('winogrande')": r"answers 429 \(too many requests\) for the data set allenai/winogrande",
        "lambda: data('openbookqa')": r"answers 503 \(an error of its own\) for the data set allenai/openbookqa",
    }
    lines = ask(LINE.format(actions=", ".join([*cases, "lambda: model('org/old')"])))
    for line, expected in zip(lines, cases.values(), strict=False):
        assert re.search(expected, line), line
        assert line.split()[0] in ("HubError", "MissingData")
        assert line.split()[1] == "2"
        assert "NEWLINE" not in line
    assert lines[-1].startswith("had")
    assert len(lines) == len(cases) + 1
    assert "HF_HUB_OFFLINE" in ask(LINE.format(actions="lambda: data('boolq'), lambda: 0"), HF_HUB_OFFLINE="1")[0]


def test_a_set_that_is_a_script_or_lacks_its_split_is_one_line(hub, ask):
    def only(role, **files):
        hub.repository(f"datasets/{DATA[role].hub}").commit({name.replace("__", "."): b for name, b in files.items()})

    only("boolq", super_glue__py=b"raise SystemExit\n", README__md=b"# A loading script\n")
    only("recovery", README__md=b"# Nothing\n")
    only("hellaswag", train__csv=b"a,b\n1,2\n", validation__csv=b"a,b\n1,2\n")
    only("piqa", train__jsonl=b"{}\n")
    lines = ask(
        LINE.format(actions=", ".join(f"lambda: data('{r}')" for r in ("boolq", "recovery", "hellaswag", "piqa")))
    )
    expected = (
        "the data set aps/super_glue has no boolq validation: Dataset scripts are no longer supported",
        "the data set tatsu-lab/alpaca has no train: .*no .*data files|the data set tatsu-lab/alpaca",
        "Rowan/hellaswag has its split validation in .*csv.*: only Parquet and JSON are read",
        "baber/piqa has its split validation in no files",
    )
    for line, wanted in zip(lines, expected, strict=True):
        assert re.search(wanted, line), line
        assert line.startswith("MissingData 2 ")
        assert "NEWLINE" not in line
        assert "None" not in line


def test_what_passes_is_tried_again(hub, ask, model, mini):
    hub.faults = {
        r"GET /api/datasets/baber/piqa": [503, 429],
        r"HEAD .*piqa.*parquet": [502],
        r"GET /cdn/datasets/baber/piqa": ["cut", 500],
        r"GET /api/models/org/tiny": [500],
        r"GET /cdn/models/org/tiny/.*00002": ["cut", "cut"],
    }
    lines = ask(LINE.format(actions="lambda: data('piqa'), lambda: model('org/tiny')"))
    assert lines[0] == f"had {len(mini('piqa/validation'))}"
    assert lines[1].startswith("had ")
    assert not any(hub.faults.values())


def test_a_hub_that_does_not_answer_is_one_line(ask):
    lines = ask(
        LINE.format(actions="lambda: data('piqa'), lambda: model('org/tiny')"), HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert [line.split()[0] for line in lines] == ["MissingData", "HubError"]
    assert all("check the network, or set HF_HUB_OFFLINE=1" in line and "NEWLINE" not in line for line in lines)
