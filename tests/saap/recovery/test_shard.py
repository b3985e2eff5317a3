"""Frozen weights shared out between two processes: what each holds, what they compute, and the whole again."""

import copy

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.tensor import DTensor

from saap import RECIPES, SaapError
from saap.recovery.shard import claimed, gather, shard, skeleton

TOKENS = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(0))


def bytes_of(model):
    held = [t.to_local() if isinstance(t, DTensor) else t for t in model.model.layers.state_dict().values()]
    return sum(t.numel() * t.element_size() for t in held)


def process(rank, folder, prepared, tokens, answer):
    """One process of two: share out, compute, gather; the first reports what it saw."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    dense, whole, state = bytes_of(prepared), copy.deepcopy(prepared), copy.deepcopy(prepared.state_dict())
    learns = sum(p.numel() * p.element_size() for p in prepared.parameters() if p.requires_grad)
    empty = skeleton(prepared)
    shard(prepared, torch.device("cpu"))
    with torch.no_grad():
        difference = float((prepared(tokens).logits - whole(tokens).logits).abs().max())
    held = bytes_of(prepared)  # after a pass too: the layers are taken apart again
    gather(prepared, empty)
    if rank == 0:
        same = all(torch.equal(tensor, state[name]) for name, tensor in empty.state_dict().items())
        after = float((empty(tokens).logits - whole(tokens).logits).abs().max())
        answer.put(((held - learns) / (dense - learns), difference, same and len(state), after))
    else:
        assert all(p.is_meta for p in empty.parameters())
    distributed.destroy_process_group()


@pytest.mark.parametrize("recipe", ["groupwise", "lora"])
def test_each_process_holds_its_half_and_computes_the_whole(tiny_llama, tmp_path, recipe):
    prepared = RECIPES[recipe](rank=4).prepare(tiny_llama(tie_word_embeddings=True), TOKENS)
    tensors = len(prepared.state_dict())
    tokens = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(0))
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    both = [context.Process(target=process, args=(r, tmp_path, prepared, tokens, answer)) for r in range(2)]
    for one in both:
        one.start()
    share, difference, same, after = answer.get(timeout=60)
    for one in both:
        one.join()
        assert one.exitcode == 0
    assert share == pytest.approx(0.5, abs=0.02)
    assert difference == after == 0
    assert same == tensors


def test_nf4_weights_are_refused(tiny_llama):
    prepared = RECIPES["qlora"](rank=4).prepare(tiny_llama(), TOKENS)
    with pytest.raises(SaapError, match="NF4 weights cannot be shared out"):
        shard(prepared, torch.device("cpu"))


def test_only_processes_that_the_launcher_started_together_share(monkeypatch):
    for asked, size, answer in (("true", "2", True), ("true", "1", False), ("false", "2", False)):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", asked)
        monkeypatch.setenv("WORLD_SIZE", size)
        assert claimed() is answer
        assert claimed() is False  # the first call removed the variable
