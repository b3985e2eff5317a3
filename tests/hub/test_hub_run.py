"""The whole job from the hub: model and data, then again, then offline."""

import re

import pytest

from tests.flows.conftest import ask, saap
from tests.hub.conftest import SHARDS

pytestmark = pytest.mark.slow

SETTINGS = """
name = "hub"
data = "hub"
model.path = "org/tiny"
calibrate = {{ count = 4, length = 16 }}
prune = {{ ratio = 0.2, align = 8, protect = [0, -1] }}
recover = {{ examples = 8, prose = 0, own = 0, batch_size = 4, micro_batch_size = 4, rank = 4, group_size = 16 }}
evaluate = {{ variants = ["dense"], limit = 2, windows = [32], max_tokens = 512 }}
speed.runs = 0
compute = {{ device = "cpu", threads = 1 }}
store = "{store}"
"""


def test_a_run_from_the_hub_downloads_once_and_goes_on_offline(hub, model, client, tmp_path, prefect_server):
    store, config = tmp_path / "store", tmp_path / "hub.toml"
    config.write_text(SETTINGS.format(store=store))
    first = saap("run", config, environment=client)
    assert first.returncode == 0, first.stderr
    found = ask(store, "select distinct benchmark, data from metrics")
    assert len(found) == 9
    assert {row["data"] for row in found} == {"hub"}
    drawn = {r for r in hub.requests if re.match(r"HEAD .*/plain_text/train/.*parquet", r)}
    assert 0 < len(drawn) < SHARDS

    hub.requests.clear()
    again = saap("run", config, "--set", "calibrate.length=15", environment=client)
    assert again.returncode == 0, again.stderr
    assert hub.downloads() == []

    hub.requests.clear()
    offline = client | {"HF_HUB_OFFLINE": "1"}
    done = saap("run", config, "--set", "calibrate.length=14", "--set", "evaluate.limit=3", environment=offline)
    assert done.returncode == 0, done.stderr
    assert hub.requests == []
    assert ask(store, "select distinct skipped from stage_runs") == [{"skipped": ""}]
