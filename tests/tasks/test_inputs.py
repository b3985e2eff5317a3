import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from saap import SaapError, load, save
from saap.models.offload import is_offloaded
from tasks import inputs
from tasks.compute import compute_settings
from tasks.config import Compute
from tasks.inputs import Checkpoint, forget_model, load_model
from tasks.stages.calibrate import Calibration, write_calibration
from tasks.stages.fisher import Fisher, fisher
from tasks.step import Step


def step_of(folder, compute=None, dtype="float32"):
    return Step(
        stage="score",
        key="key",
        params=json.dumps({"dtype": dtype}),
        inputs=(),
        outside=(("model", str(folder)), ("tokenizer", str(folder))),
        compute=(compute or Compute()).model_dump_json(),
        store=str(folder),
    )


def loaded(folder, compute=None, dtype="float32", **how):
    """The model as a step gets it."""
    return load_model(step_of(folder, compute, dtype), Checkpoint(folder), **how)


@pytest.fixture(autouse=True)
def forgotten():
    yield
    forget_model()


@pytest.mark.parametrize(("use", "on_disk"), [("whole", False), ("layers", True), ("slices", False)])
def test_offload_leaves_on_disk_what_a_step_uses_layer_by_layer(tiny_folder, use, on_disk):
    assert not is_offloaded(loaded(tiny_folder, use=use))
    assert is_offloaded(loaded(tiny_folder, Compute(offload=True), use=use)) == on_disk


def test_a_step_works_on_its_gpu(monkeypatch):
    """Streams, graphs and memory counters are those of the current one."""
    current = []
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    for device in ("cuda:1", "cuda", "cpu"):
        compute_settings(step_of(Path(), Compute(device=device)))
    assert current == [1, 0]


def test_the_last_model_stays_loaded_and_no_other_one(tiny_folder, tmp_path):
    first = loaded(tiny_folder)
    assert loaded(tiny_folder) is first
    gone = weakref.ref(first)
    del first
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    second = loaded(other)
    assert gone() is None
    assert loaded(other) is second
    assert loaded(other, dtype="bfloat16") is not second


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_model_with_a_weight_that_is_not_finite_is_refused_by_its_name_and_kept_by_nobody(
    tiny_folder, tmp_path, value, dtype
):
    broken = load(tiny_folder)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[3, 5] = value
    save(broken, tmp_path)
    message = rf"model\.layers\.0\.mlp\.up_proj\.weight of the model in {tmp_path} is not finite: .* damaged"
    for _ in range(2):
        with pytest.raises(SaapError, match=message + (", or too large for float16" if dtype == "float16" else "$")):
            loaded(tmp_path, dtype=dtype)


def test_weights_whose_sum_only_is_too_large_are_taken(tiny_folder, tmp_path):
    large = load(tiny_folder)
    with torch.no_grad():
        large.lm_head.weight.fill_(6e4)
    save(large, tmp_path)
    assert (loaded(tmp_path, dtype="float16").lm_head.weight == 6e4).all()


def test_a_forgotten_model_is_memory_of_the_system_again(tmp_path):
    """In a process of its own: this one's heap has other things among what is freed."""
    code = (
        "import psutil, torch; from tasks import inputs\n"
        "small = [torch.ones(2**16) for _ in range(1000)]; held = psutil.Process().memory_info().rss\n"
        "inputs._kept['model'] = small[:-1]; last = small[-1]; del small; inputs.forget_model()\n"
        "print(held - psutil.Process().memory_info().rss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 200 * 2**20, "of 250 MiB"


def test_the_fisher_stage_takes_layers_from_disk_and_finds_the_same(tiny_folder, tmp_path):
    write_calibration(tmp_path, np.arange(3, 67).reshape(4, 16), np.full(4, -1))
    found = []
    for offload in (False, True):
        (folder := tmp_path / str(offload)).mkdir()
        step = step_of(tiny_folder, Compute(offload=offload))
        fisher.make(step, folder, model=Checkpoint(tiny_folder), calibration=Calibration(tmp_path))
        assert is_offloaded(next(iter(inputs._kept.values()))) == offload
        found.append(Fisher(folder).read())
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-11)  # offloaded, the norms are transformers' own
