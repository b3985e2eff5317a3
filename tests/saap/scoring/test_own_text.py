import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from saap import SaapError, own_text
from saap.evaluation.speed import Decoder


def test_each_token_is_the_one_whose_share_of_the_distribution_the_draw_falls_into(tiny_llama, tiny_tokenizer):
    """By passes over whole sequences, without a cache."""
    model = tiny_llama().double().eval()
    found = own_text(model, tiny_tokenizer, count=70, length=9, seed=5)
    assert found.shape == (70, 9)
    draws = torch.from_numpy(np.stack([np.random.default_rng([5, i]).random(9) for i in range(70)]))
    with torch.no_grad():
        shares = model(found).logits[:, :-1].softmax(-1)
    upper = shares.cumsum(-1).gather(-1, found[:, 1:, None]).squeeze(-1)
    lower = upper - shares.gather(-1, found[:, 1:, None]).squeeze(-1)
    assert (draws[:, 1:] <= upper + 1e-9).all()
    assert (draws[:, 1:] >= lower - 1e-9).all()


def test_tokens_come_as_often_as_the_model_says(tiny_llama, tiny_tokenizer):
    model = tiny_llama().eval()
    found = own_text(model, tiny_tokenizer, count=3000, length=2, seed=0)
    with torch.no_grad():
        expected = model(found[:, :1]).logits[:, 0].softmax(-1).sum(0).double().numpy()
    parts = np.array_split(np.argsort(expected), 20)
    seen = np.bincount(found[:, 1], minlength=len(expected))
    wanted = np.array([expected[part].sum() for part in parts])
    assert chisquare([seen[part].sum() for part in parts], wanted / wanted.sum() * 3000).pvalue > 0.001


def test_a_sequence_depends_on_seed_and_place_only_and_begins_with_a_plain_token(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    few, many = (own_text(model, tiny_tokenizer, count=count, length=6, seed=1) for count in (3, 80))
    assert torch.equal(few, many[:3])
    assert not torch.equal(few, own_text(model, tiny_tokenizer, count=3, length=6, seed=2))
    assert not set(many[:, 0].tolist()) & set(tiny_tokenizer.all_special_ids)


def test_bos_is_the_first_token_of_a_sequence_where_it_is_asked_for(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    plain, begun = (
        own_text(model, tiny_tokenizer, count=3, length=n, seed=1, bos=bos) for n, bos in ((5, None), (6, 1))
    )
    assert begun.tolist() == [[1, *ids] for ids in plain.tolist()]


@pytest.mark.parametrize("what", ["own text", "speed"])
def test_the_head_gets_its_rows_one_behind_the_other(tiny_llama, tiny_tokenizer, monkeypatch, what):
    """Or torch would make a copy of a frozen head for each (findings/frozen_head_is_copied_for_each_row.sh)."""
    model, seen = tiny_llama(), []
    head = model.get_output_embeddings()
    plain = head.forward
    monkeypatch.setattr(head, "forward", lambda states: seen.append(states) or plain(states))
    if what == "own text":
        monkeypatch.setattr("saap.scoring.own_text.leading_bos", lambda tokenizer: [1])  # a first step of two tokens
        own_text(model, tiny_tokenizer, count=5, length=4, seed=0)
    else:
        Decoder(model, batch_size=5, prompt_tokens=3, new_tokens=2).run()
    assert len(seen[0]) == 5
    assert all(states.is_contiguous() for states in seen)


def test_a_model_with_a_weight_that_is_not_a_number_writes_nothing(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(SaapError, match=r"a logit is not finite: neither is model\.norm\.weight"):
        own_text(model, tiny_tokenizer, count=1, length=3, seed=0)
