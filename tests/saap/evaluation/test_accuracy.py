import json
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import BloomConfig, BloomForCausalLM

import saap
from saap import ACCURACY, SaapError, accuracy, discover, prune
from saap.evaluation.accuracy import task_file
from saap.evaluation.harness import SharedQuestionLM
from saap.models.modeling_baichuan import SaapBaichuanConfig, SaapBaichuanForCausalLM
from tasks.data import mini_folder
from tests.saap.models.families import build


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
        assert metric.items == list(column)
        assert raw["results"]["arc_easy"][f"{metric.metric},none"] == mean
    assert "0-shot" in metrics[0].protocol


def test_limit_takes_the_first_items(model, tiny_tokenizer, jsonl, loop):
    metrics, _ = accuracy(model, tiny_tokenizer, "arc_easy", data_file=jsonl, limit=5)
    assert [(m.value, m.n) for m in metrics] == [(sum(column[:5]) / 5, 5) for column in loop]
    assert "first 5" in metrics[0].protocol


def test_one_item_has_no_standard_error(model, tiny_tokenizer, jsonl, loop):
    metrics, raw = accuracy(model, tiny_tokenizer, "arc_easy", data_file=jsonl, limit=1)
    assert [(m.value, m.n) for m in metrics] == [(column[0], 1) for column in loop]
    assert all(math.isnan(m.stderr) for m in metrics)
    assert raw["results"]["arc_easy"]["acc_stderr,none"] == "N/A"


def test_parquet_gives_what_jsonl_gives(model, tiny_tokenizer, jsonl, items, loop, tmp_path):
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "test.parquet")
    metrics, _ = accuracy(model, tiny_tokenizer, "arc_easy", data_file=tmp_path / "test.parquet", batch_tokens=150)
    assert [m.value for m in metrics] == [sum(column) / 8 for column in loop]
    assert metrics == accuracy(model, tiny_tokenizer, "arc_easy", data_file=jsonl)[0]


QUESTIONS = {
    "The harbour was": [" quiet", " so full of boats that nobody could leave", " x"],
    "Is the sea green? Answer:": [" yes", " no"],
    "a " * 200 + "and then": [" the end", " nothing more was said of it until the morning"],
    "Alone": [" again"],
}
FORMS = {
    "dense": lambda build: build(),
    "pruned": lambda build: prune(build(), np.arange(len(discover(build()))) % 3 != 1),
    "half precision": lambda build: build().bfloat16(),
}


@pytest.mark.parametrize("form", FORMS)
def test_answers_that_share_their_question_score_as_the_stock_harness_scores_them(tiny_llama, tiny_tokenizer, form):
    """Answers of one and of many tokens, a context longer than the model's 256 positions, and a lone answer."""
    model = FORMS[form](tiny_llama)
    pairs = [(question, answer) for question, answers in QUESTIONS.items() for answer in answers]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    stock = HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=2, device="cpu", softmax_dtype="float32")
    shared = SharedQuestionLM(model, tiny_tokenizer, batch_tokens=600)
    assert shared._share
    expected, found = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (stock, shared))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    tolerance = {"rel": 1e-5} if form != "half precision" else {"rel": 0.02}
    assert [score for score, _ in found] == [pytest.approx(score, **tolerance) for score, _ in expected]


ALIBI = {
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=2)),
    "baichuan": lambda: SaapBaichuanForCausalLM(
        SaapBaichuanConfig(
            vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    ),
}


@pytest.mark.parametrize("family", [*ALIBI, "qwen3_5"])
def test_models_whose_positions_cannot_be_given_go_the_stock_way(tiny_tokenizer, family):
    """With ALiBi, or in linear attention, which reads through a mask: answer 2 would be scored behind answer 1."""
    torch.manual_seed(0)
    model = (build(family) if family not in ALIBI else ALIBI[family]()).eval()
    requests = [Instance("loglikelihood", {}, ("The sea is", f" {answer}"), 0) for answer in ("calm", "very deep")]
    stock = HFLM(pretrained=model, tokenizer=tiny_tokenizer, device="cpu").loglikelihood(requests, disable_tqdm=True)
    shared = SharedQuestionLM(model, tiny_tokenizer, 100).loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in shared] == [pytest.approx(score, rel=1e-5) for score, _ in stock]
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(SaapError, match="a log-probability is not finite: neither is"):
        SharedQuestionLM(model, tiny_tokenizer, 100).loglikelihood(requests)


def test_a_model_that_computes_no_number_has_no_accuracy(tiny_llama, tiny_tokenizer, jsonl):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(SaapError, match=r"a log-probability is not finite: neither is lm_head\.weight"):
        accuracy(model, tiny_tokenizer, "arc_easy", data_file=jsonl, limit=5)


def test_out_of_memory_halves_the_batch_until_it_fits(model, tiny_tokenizer, monkeypatch):
    requests = [Instance("loglikelihood", {}, (f"Question {n}", " answer"), 0) for n in range(9)]
    lm = SharedQuestionLM(model, tiny_tokenizer, batch_tokens=10_000)
    expected, score, rows = lm.loglikelihood(requests, disable_tqdm=True), lm._score, []

    def little_memory(batch):
        rows.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return score(batch)

    monkeypatch.setattr(lm, "_score", little_memory)
    found = lm.loglikelihood(requests, disable_tqdm=True)
    assert [s for s, _ in found] == [pytest.approx(s, rel=1e-5) for s, _ in expected]
    assert rows[0] == 9
    assert max(rows[-4:]) <= 2


@pytest.mark.slow
def test_the_seven_benchmarks_equal_lm_evals_own_command_line(tiny_folder, tmp_path):
    mini = mini_folder()
    files = {name: next((mini / name).glob("*.jsonl")) for name in ACCURACY}
    for name, file in files.items():
        task_file(tmp_path, name, file)
    command = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={tiny_folder},dtype=float32"]
    command += ["--tasks", ",".join(ACCURACY), "--include_path", tmp_path, "--limit", "12", "--batch_size", "5"]
    command += ["--device", "cpu", "--output_path", tmp_path / "out"]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    model, tokenizer = saap.load(tiny_folder), saap.load_tokenizer(tiny_folder)
    for name, file in files.items():
        metrics, _ = accuracy(model, tokenizer, name, data_file=file, limit=12)
        assert {m.metric for m in metrics} == {
            k.split(",")[0] for k in theirs["results"][name] if k in ("acc,none", "acc_norm,none")
        }
        for m in metrics:
            assert m.value == theirs["results"][name][f"{m.metric},none"]
            assert m.stderr == theirs["results"][name][f"{m.metric}_stderr,none"]
            assert m.n == theirs["n-samples"][name]["effective"] == 12
            assert m.task_version == str(theirs["versions"][name])


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
