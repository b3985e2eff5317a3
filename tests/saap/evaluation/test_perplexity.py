import math
from types import SimpleNamespace

import pytest
import torch

from saap import SaapError, perplexity
from saap.evaluation.perplexity import window_bos

WINDOW = 32


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module")
def rows(mini):
    return [row["text"] for row in mini("wikitext2_raw/test")[:24]]


@pytest.fixture(scope="module")
def losses(model, rows, tiny_tokenizer):
    """transformers' own loss, one window after another."""
    ids = tiny_tokenizer("\n\n".join(rows))["input_ids"]
    assert len(ids) % WINDOW
    found = []
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]])
        with torch.no_grad():
            found.append(model(window, labels=window).loss.item())
    return found


@pytest.mark.parametrize("batch_tokens", [1, WINDOW, 100, 4096])
def test_it_is_exp_of_the_mean_loss_of_the_whole_windows(model, rows, tiny_tokenizer, losses, batch_tokens):
    found = perplexity(model, rows, tiny_tokenizer, window=WINDOW, batch_tokens=batch_tokens)
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found.n == len(losses)


@pytest.mark.parametrize("count", [1, 5])
def test_max_tokens_keeps_the_windows_that_fit_into_the_first_so_many(model, rows, tiny_tokenizer, losses, count):
    found = perplexity(model, rows, tiny_tokenizer, window=WINDOW, max_tokens=count * WINDOW + 3)
    assert (found.n, found.value) == (count, pytest.approx(math.exp(sum(losses[:count]) / count), rel=1e-5))


@pytest.mark.parametrize("adds", [True, False])
def test_with_bos_each_window_has_one_before_it_and_as_many_targets(model, rows, tiny_tokenizer, adds):
    class Adding:
        """The tokenizer as one that puts a BOS before every text."""

        def __call__(self, text, **options):
            found = tiny_tokenizer(text, **options)
            bos = torch.full((1, 1), tiny_tokenizer.bos_token_id)
            found["input_ids"] = torch.cat([bos, found["input_ids"]], 1)
            return found

    ids = tiny_tokenizer("\n\n".join(rows))["input_ids"]
    expected = []
    for start in range(0, 5 * WINDOW, WINDOW):
        window = torch.tensor([[tiny_tokenizer.bos_token_id, *ids[start : start + WINDOW]]])
        labels = window.clone()
        labels[:, :2] = -100  # the window's first token is no target, with or without
        with torch.no_grad():
            expected.append(model(window, labels=labels).loss.item())
    tokenizer, bos = Adding() if adds else tiny_tokenizer, tiny_tokenizer.bos_token_id
    found = perplexity(model, rows, tokenizer, window=WINDOW, max_tokens=5 * WINDOW, bos=bos)
    assert found.items == pytest.approx(expected, rel=1e-5)
    assert found.items != pytest.approx(perplexity(model, rows, tokenizer, window=WINDOW).items[:5], rel=1e-3)


@pytest.mark.parametrize(
    ("model_type", "adds", "wish", "expected"),
    [
        ("saap_mistral", True, "auto", 1),
        ("mistral", False, "auto", None),
        ("llama", True, "auto", None),
        ("saap_llama", True, "auto", None),
        ("llama", False, "always", 1),
        ("gemma3_text", True, "never", None),
    ],
)
def test_by_itself_bos_follows_the_tokenizer_but_for_llama(model_type, adds, wish, expected):
    model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))

    def tokenizer(text):
        return {"input_ids": [1, 5] if adds else [5]}

    tokenizer.bos_token_id = 1
    assert window_bos(model, tokenizer, wish) == expected
    tokenizer.bos_token_id = None
    if wish == "always":
        with pytest.raises(SaapError, match="set evaluate"):
            window_bos(model, tokenizer, wish)
    else:
        assert window_bos(model, tokenizer, wish) is None


def test_the_standard_error_is_that_of_the_mean_loss_times_the_perplexity(model, rows, tiny_tokenizer, losses):
    found = perplexity(model, rows, tiny_tokenizer, window=WINDOW)
    mean = sum(losses) / len(losses)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in losses) / (len(losses) - 1))
    assert found.stderr == pytest.approx(math.exp(mean) * deviation / math.sqrt(len(losses)), rel=1e-3)


def test_one_window_has_no_standard_error(model, rows, tiny_tokenizer):
    assert math.isnan(perplexity(model, rows, tiny_tokenizer, window=WINDOW, max_tokens=WINDOW).stderr)


def test_a_text_shorter_than_one_window_is_refused(model, tiny_tokenizer):
    text = "The sea. " * 3
    tokens = len(tiny_tokenizer(text)["input_ids"])
    assert perplexity(model, [text], tiny_tokenizer, window=tokens).n == 1
    with pytest.raises(SaapError, match=f"{tokens} tokens.*{tokens + 1}"):
        perplexity(model, [text], tiny_tokenizer, window=tokens + 1)


def test_a_broken_model_has_a_finite_or_infinite_perplexity_not_an_overflow(tiny_llama, rows, tiny_tokenizer):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, rows, tiny_tokenizer, window=WINDOW, max_tokens=2 * WINDOW).value > 1e100


def test_a_model_that_computes_no_number_has_no_perplexity_and_the_error_says_why(tiny_llama, rows, tiny_tokenizer):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7, 7] = torch.nan
    with pytest.raises(SaapError, match=r"not finite: neither is lm_head\.weight"):
        perplexity(model, rows, tiny_tokenizer, window=WINDOW, max_tokens=2 * WINDOW)
    model = tiny_llama().to(torch.float16)
    with torch.no_grad():
        model.lm_head.weight.fill_(6e4)  # times 64 inputs: no float16
    with pytest.raises(SaapError, match="load the model in float32"):
        perplexity(model, rows, tiny_tokenizer, window=WINDOW, max_tokens=2 * WINDOW)
