"""The local hub with tiny sets in the layouts of the real repositories, and clients that talk to it."""

import io
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data import DATA
from tests.hub.server import Hub

# where the real repositories keep the split: folder or file, with '*' for the numbers of a file
PLACES = {
    "recovery": "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
    "arc_easy": "ARC-Easy/test-00000-of-00001.parquet",
    "arc_challenge": "ARC-Challenge/test-00000-of-00001.parquet",
    "boolq": "boolq/validation-00000-of-00001.parquet",
    "hellaswag": "data/validation-00000-of-00001.parquet",
    "piqa": "plain_text/validation-00000-of-00001.parquet",
    "winogrande": "winogrande_xl/validation-00000-of-00001.parquet",
    "openbookqa": "main/test-00000-of-00001.parquet",
    "wikitext2": "wikitext-2-raw-v1/test-00000-of-00001.parquet",
}
SHARDS = 12  # of the calibration set


def parquet(rows):
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream, row_group_size=10)
    return stream.getvalue()


def card(splits):
    """A README whose header names configurations, splits and files."""
    lines = ["---", "configs:"]
    for config, split, path in splits:
        pattern = path.replace("00000-of-00001", "*").partition("*")[0] + "*"
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {pattern}"]
    return "\n".join([*lines, "---", "# A data set", ""]).encode()


@pytest.fixture(scope="session")
def sets(mini):
    """Repository → branch → files, of all roles."""
    found, cards = {}, {}
    for role, place in PLACES.items():
        about = DATA[role]
        files = found.setdefault(f"datasets/{about.hub}", {}).setdefault("main", {})
        files[place] = parquet(mini(about.place))
        cards.setdefault(f"datasets/{about.hub}", []).append((about.hub_config or "default", about.hub_split, place))
    for name, splits in cards.items():
        found[name]["main"]["README.md"] = card(splits)
    for role, script in (("calibration", "bookcorpus.py"), ("ptb", "ptb_text_only.py")):
        about = DATA[role]
        rows = mini(about.place)
        count = SHARDS if role == "calibration" else 1
        parts = [rows[i * len(rows) // count : (i + 1) * len(rows) // count] for i in range(count)]
        found[f"datasets/{about.hub}"] = {
            "main": {"README.md": b"# A loading script\n", script: b"raise SystemExit\n"},
            "refs/convert/parquet": {
                f"{about.hub_config}/{about.hub_split}/{i:04d}.parquet": parquet(part) for i, part in enumerate(parts)
            },
        }
    return found


@pytest.fixture
def hub(sets):
    """The hub as it is at first, with `.url`."""
    hub = Hub()
    for name, branches in sets.items():
        for branch, files in branches.items():
            hub.repository(name).commit(files, branch)
    server = hub.serve()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def model(hub, tiny_folder, tmp_path):
    """'org/tiny' on the hub: shards and an index, and beside them what must not be downloaded."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(folder, max_shard_size="200KB")
    files = {file.name: file.read_bytes() for file in (*tiny_folder.iterdir(), *folder.iterdir())}
    del files["model.safetensors"]
    files |= {
        "chat_template.jinja": b"{{ messages[0].content }}",
        "README.md": b"---\nlicense: mit\n---\n",
        "consolidated.safetensors": b"x" * 100,
        "pytorch_model.bin": b"x" * 100,
        "original/params.json": b"{}",
        "original/consolidated.00.pth": b"x" * 100,
    }
    hub.repository("models/org/tiny").commit(files)
    return "org/tiny"


@pytest.fixture
def client(hub, tmp_path):
    """Environment of a process that talks to the hub; its cache lives as long as the test."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.fixture
def ask(client):
    """Run Python code in a process of its own; what it prints, by line."""

    def ask(code, **environment):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **client, **environment}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return ask
