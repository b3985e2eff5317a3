"""Scoring models whose weights are not on the device that computes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import AutoModelForCausalLM

from saap import SaapError, load, mask_fisher, prune, save, score, to_groupwise, weight_norms
from saap.models.offload import is_offloaded
from tests.saap.models.families import CASES, IDS, build, publish_baichuan, random_keep


def assert_scores_as(model, whole):
    assert is_offloaded(model)
    vector, element = score(model, IDS)
    vector_in_memory, element_in_memory = score(whole, IDS)
    # transformers' own norms (accelerate holds their weights) and other products round differently; vector is a sum
    # that cancels
    np.testing.assert_allclose(element, element_in_memory, rtol=5e-5)
    assert (np.abs(vector - vector_in_memory) <= 1e-5 * element_in_memory).all()
    assert np.array_equal(weight_norms(model), weight_norms(whole))
    np.testing.assert_allclose(mask_fisher(model, IDS), mask_fisher(whole, IDS), rtol=1e-4, atol=1e-12)
    assert is_offloaded(model)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", ["dense", "pruned"])
def test_blocks_left_on_disk_score_as_those_in_memory(tmp_path, case, shape):
    model = build(case)
    save(model if shape == "dense" else prune(model, random_keep(model)), tmp_path)
    assert_scores_as(load(tmp_path, offload=True), load(tmp_path))


def test_weights_that_accelerate_keeps_on_the_cpu_or_spreads_score_the_same(tmp_path):
    assert_scores_as(cpu_offload(build("llama"), execution_device=torch.device("cpu")), build("llama"))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu", "model.layers.3": "disk"}
    assert_scores_as(dispatch_model(build("llama"), places, offload_dir=tmp_path), build("llama"))


def test_a_weight_on_disk_that_is_not_a_number_is_named(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[7, 9] = torch.nan
    save(model, tmp_path)
    with pytest.raises(SaapError, match=r"layer 2, mlp\.up_proj, sample 0 .*neither are its weights"):
        score(load(tmp_path, offload=True), IDS)


def test_a_checkpoint_that_is_converted_on_loading_cannot_stay_on_disk_and_says_so(tmp_path):
    publish_baichuan(build("baichuan-13b, 12 heads"), tmp_path, model_max_length=256)
    with pytest.raises(SaapError, match="save it once"):
        load(tmp_path, offload=True)


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from saap import load, score

def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

torch.manual_seed(0)
tokens = torch.randint(0, 512, (4, 32))
score(load(sys.argv[1]), tokens[:1, :4])  # what libraries allocate once
peaks = []
for offload in (True, False):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    vector, element = score(load(sys.argv[2], offload=offload), tokens)
    peaks.append(resident("VmHWM") - before)
print(json.dumps([*peaks, float(vector.sum()), float(element.sum())]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_model_larger_than_the_memory_it_may_take_is_scored(tiny_llama, tmp_path):
    save(tiny_llama(), tmp_path / "tiny")
    large = tiny_llama(num_hidden_layers=14, hidden_size=512, intermediate_size=1536, initializer_range=0.02)
    save(large, tmp_path / "large")
    weights = sum(parameter.nbytes for parameter in large.parameters())
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "tiny"), str(tmp_path / "large")]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    offloaded, whole, *_ = json.loads(done.stdout.splitlines()[-1])
    assert whole > weights
    assert offloaded < weights / 2, f"{offloaded / 1e6:.0f} of {weights / 1e6:.0f} MB"


def test_codes_stay_in_memory_unless_buffers_are_left_on_disk_too(tiny_llama, tmp_path):
    """accelerate leaves parameters on disk, and codes are buffers: the table of traps says what to ask for."""
    save(to_groupwise(tiny_llama(), 32), tmp_path / "int4")
    tokens = torch.arange(3, 19)[None]
    whole = load(tmp_path / "int4")(tokens).logits
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "cpu" if layer < 3 else "disk" for layer in range(6)}
    for buffers, device in ((False, "cpu"), (True, "meta")):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "int4", device_map=places, offload_folder=tmp_path / "off", offload_buffers=buffers
        )
        assert model.model.layers[5].mlp.up_proj.codes.device.type == device
        assert torch.equal(model(tokens).logits, whole)
