import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from saap import ACCURACY, SaapError, accuracy


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module")
def items(mini):
    """Eight rows in the arc_easy layout, with choices of different lengths, some of two bytes a character."""
    rows = mini("arc_easy/test")[:8]
    for number, row in enumerate(rows):
        row["choices"]["text"][number % 4] += " by the old harbour wall"
    for row in rows[::3]:
        row["choices"]["text"] = ["qzxjkvqz", "старой гавани", "港の古い壁", "jjvvqqxz kq"]
    return rows


@pytest.fixture(scope="module")
def jsonl(items, tmp_path_factory):
    file = tmp_path_factory.mktemp("arc") / "test.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in items))
    return file


@pytest.fixture(scope="module")
def loop(model, items, tiny_tokenizer):
    """For acc and for acc_norm: which items are right, by the log-likelihood of each choice after its question."""
    right = []
    for row in items:
        sums, per_character, per_byte = [], [], []
        for choice in row["choices"]["text"]:
            head = tiny_tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
            tail = tiny_tokenizer(f" {choice}")["input_ids"]
            with torch.no_grad():
                logp = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
            sums.append(sum(logp[len(head) + k - 1, token].item() for k, token in enumerate(tail)))
            per_character.append(sums[-1] / len(choice))
            per_byte.append(sums[-1] / len(choice.encode()))
        gold = row["choices"]["label"].index(row["answerKey"])
        right.append([best.index(max(best)) == gold for best in (sums, per_character, per_byte)])
    columns = list(zip(*right, strict=True))
    assert len({sum(column) for column in columns}) == 3, "items that do not tell the metrics apart"
    return columns[:2]


def test_acc_and_acc_norm_equal_a_log_likelihood_loop(model, tiny_tokenizer, jsonl, loop):
    metrics, raw = accuracy(model, tiny_tokenizer, "arc_easy", data_file=jsonl)
    assert [m.metric for m in metrics] == ["acc", "acc_norm"]
    assert [m.papers for m in metrics] == [True, False]
    for metric, column in zip(metrics, loop, strict=True):
        mean = sum(column) / 8
        assert (metric.value, metric.n) == (mean, 8)
        assert metric.stderr == pytest.approx(math.sqrt(mean * (1 - mean) / 7))
        assert raw["results"]["arc_easy"][f"{metric.metric},none"] == mean
    assert "0-shot" in metrics[0].protocol


def test_limit_takes_the_first_items(model, tiny_tokenizer, jsonl, loop):
    metrics, _ = accuracy(model, tiny_tokenizer, "arc_easy", data_file=jsonl, limit=5)
    assert [(m.value, m.n) for m in metrics] == [(sum(column[:5]) / 5, 5) for column in loop]
    assert "first 5" in metrics[0].protocol


def test_parquet_gives_what_jsonl_gives(model, tiny_tokenizer, jsonl, items, loop, tmp_path):
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "test.parquet")
    metrics, _ = accuracy(model, tiny_tokenizer, "arc_easy", data_file=tmp_path / "test.parquet", batch_size=3)
    assert [m.value for m in metrics] == [sum(column) / 8 for column in loop]
    assert metrics == accuracy(model, tiny_tokenizer, "arc_easy", data_file=jsonl)[0]


def test_an_unknown_benchmark_is_refused_with_the_known_ones(model, tiny_tokenizer):
    with pytest.raises(SaapError, match=f"'mmlu'.*{', '.join(ACCURACY)}"):
        accuracy(model, tiny_tokenizer, "mmlu")


@pytest.mark.parametrize(
    "content",
    [None, "", "not json", '{"id": "1", "question": "Why?"}'],
    ids=["missing", "empty", "damaged", "without its columns"],
)
def test_data_that_cannot_be_used_is_refused_in_one_line(model, tiny_tokenizer, tmp_path, content):
    file = tmp_path / "test.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SaapError, match=str(file)) as caught:
        accuracy(model, tiny_tokenizer, "arc_easy", data_file=file)
    assert len(str(caught.value).splitlines()) == 1
