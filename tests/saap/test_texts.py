import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from saap import SaapError, calibration_bos, read_rows, sample_tokens
from saap.texts import WITHOUT_INPUT, alpaca_example, chosen_rows, token_example

LENGTH = 20


@pytest.fixture(scope="module")
def numbers():
    """A tokenizer whose token r+2 is the word r, and which puts <s> in front where it may."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1} | {str(r): r + 2 for r in range(300)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")


def rows_of_numbers(lengths):
    """Row r repeats the word r so many times, so every token shows which row it is from."""
    return [f"{r} " * n for r, n in enumerate(lengths)]


MIXED = np.random.default_rng(0).integers(1, 60, 200).tolist()
SHORT = [3] * 200


@pytest.mark.parametrize("lengths", [MIXED, SHORT, [LENGTH] * 12], ids=["mixed", "short", "exact"])
@pytest.mark.parametrize("seed", range(4))
def test_sequences_have_the_length_asked_for_and_share_no_row(numbers, lengths, seed):
    tokens, _ = sample_tokens(rows_of_numbers(lengths), numbers, count=12, length=LENGTH, seed=seed)
    assert (tokens.shape, tokens.dtype) == ((12, LENGTH), torch.int64)
    used = [sorted(set(sequence)) for sequence in tokens.tolist()]
    assert min(map(min, used)) >= 2
    assert len({row for rows in used for row in rows}) == sum(map(len, used))


@pytest.mark.parametrize("lengths", [MIXED, SHORT], ids=["mixed", "short"])
@pytest.mark.parametrize("seed", range(4))
def test_a_short_row_is_continued_by_the_rows_after_it(numbers, lengths, seed):
    stream = [r + 2 for r, n in enumerate(lengths) for _ in range(n)]
    places = {tuple(stream[i : i + LENGTH]) for i in range(len(stream) - LENGTH + 1)}
    tokens, _ = sample_tokens(rows_of_numbers(lengths), numbers, count=12, length=LENGTH, seed=seed)
    assert {tuple(sequence) for sequence in tokens.tolist()} <= places


@pytest.mark.parametrize("seed", range(4))
def test_the_row_reported_is_the_row_the_sequence_begins_in(numbers, seed):
    tokens, rows = sample_tokens(rows_of_numbers(MIXED), numbers, count=12, length=LENGTH, seed=seed)
    assert rows.tolist() == (tokens[:, 0] - 2).tolist()


def test_the_seed_decides_the_sample(numbers):
    texts = rows_of_numbers(MIXED)
    first, rows = sample_tokens(texts, numbers, count=8, length=LENGTH, seed=1)
    again, rows_again = sample_tokens(texts, numbers, count=8, length=LENGTH, seed=1)
    other, _ = sample_tokens(texts, numbers, count=8, length=LENGTH, seed=2)
    assert torch.equal(first, again)
    assert (rows == rows_again).all()
    assert not torch.equal(first, other)


def test_windows_begin_at_different_places_of_their_rows(tiny_tokenizer, mini):
    texts = [row["text"] for row in mini("bookcorpus_like/passages")]
    tokens, rows = sample_tokens(texts, tiny_tokenizer, count=20, length=64, seed=0)
    places = []
    for row, sequence in zip(rows, tokens.tolist(), strict=True):
        ids = tiny_tokenizer(texts[row])["input_ids"]
        places += [i for i in range(len(ids) - 63) if ids[i : i + 64] == sequence][:1]
    assert len(places) == 20
    assert len(set(places)) > 10


@pytest.mark.parametrize("lengths", [[LENGTH] * 4, [LENGTH - 1], [1] * 30, []])
def test_too_little_text_is_refused(numbers, lengths):
    with pytest.raises(SaapError, match=f"{LENGTH} tokens, 5 are asked for"):
        sample_tokens(rows_of_numbers(lengths), numbers, count=5, length=LENGTH, seed=0)


HEAD = "Below is an instruction that describes a task"
TASK = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
PROMPTS = {
    "": f"{HEAD}. {TASK}Name a {{colour}}.\n\n### Response:\n",
    "Not red.": f"{HEAD}, paired with an input that provides further context. "
    f"{TASK}Name a {{colour}}.\n\n### Input:\nNot red.\n\n### Response:\n",
}


@pytest.mark.parametrize("given", PROMPTS, ids=["without input", "with input"])
def test_an_alpaca_row_is_learned_on_its_answer_only(tiny_tokenizer, given):
    row = {"instruction": "Name a {colour}.", "input": given, "output": "Blue, {or} so."}
    found = alpaca_example(row, tiny_tokenizer, 1000)
    learned = [label != -100 for label in found["labels"]]
    answer = [i for i, yes in zip(found["input_ids"], learned, strict=True) if yes]
    prompt = [i for i, yes in zip(found["input_ids"], learned, strict=True) if not yes]
    assert learned == sorted(learned)
    assert tiny_tokenizer.decode(prompt) == PROMPTS[given]
    assert tiny_tokenizer.decode(answer) == "Blue, {or} so.</s>"
    assert [label for label in found["labels"] if label != -100] == answer
    short = alpaca_example(row, tiny_tokenizer, len(prompt) + 2)
    assert short["input_ids"] == prompt + answer[:2]
    assert short["labels"] == [-100] * len(prompt) + answer[:2]


@pytest.mark.parametrize("ends", [False, True], ids=["", "EOS behind every text"])
def test_an_answer_is_tokenised_with_its_prompt_and_ends_once(ends):
    """A tokenizer like LLaMA's, which begins every text with a space; some put EOS behind it too."""
    letters = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(c): 3 + c for c in range(10, 127)} | {"▁": 200}
    like_llama = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    like_llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    form = {"special_tokens": [("<s>", 1), ("</s>", 2)], "single": "<s> $A </s>" if ends else "<s> $A"}
    like_llama.post_processor = processors.TemplateProcessing(**form)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=like_llama, bos_token="<s>", eos_token="</s>")
    found = alpaca_example({"instruction": "Name one.", "input": "", "output": "Blue so."}, tokenizer, 1000)
    answer = [label for label in found["labels"] if label != -100]
    assert tokenizer.convert_ids_to_tokens(answer) == [*"Blue▁so.", "</s>"]
    assert found["input_ids"].count(2) == 1


@pytest.mark.parametrize("column", ["instruction", "output"])
def test_an_alpaca_row_without_a_text_is_refused(tiny_tokenizer, column):
    row = {"instruction": "Name a colour.", "input": None, "output": "Blue."}
    assert alpaca_example(row, tiny_tokenizer, 100) == alpaca_example(row | {"input": ""}, tiny_tokenizer, 100)
    with pytest.raises(SaapError, match=f"text as {column}, found None"):
        alpaca_example(row | {column: None}, tiny_tokenizer, 100)


TEXTS = ["one — 1", "", "two\nlines", "all\u2028that\x85may\x0bend\x0ca\x1cline"]
ROWS = [{"text": text, "extra": number} for number, text in enumerate(TEXTS)]


def write(file, rows):
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_the_named_columns_of_every_row_are_read(tmp_path, name):
    assert read_rows(write(tmp_path / name, ROWS), ("text",)) == [{"text": text} for text in TEXTS]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "does not exist"),
        (lambda file: file.write_bytes(file.read_bytes()[:30]), "cannot read"),
        (lambda file: file.write_bytes(b"\xff\xfe{}\n"), "cannot read"),
        (lambda file: write(file, [{"txt": "a"}]), "no column.*text.*txt"),
    ],
    ids=["missing", "truncated", "not text", "other columns"],
)
def test_files_that_cannot_be_used_are_refused_by_name(tmp_path, name, spoil, message):
    file = write(tmp_path / name, ROWS)
    spoil(file)
    with pytest.raises(SaapError, match=f"{name}.*{message}|{message}.*{name}") as caught:
        read_rows(file, ("text",))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("indent", [None, 2])
def test_one_array_is_read_too(tmp_path, indent):
    (tmp_path / "rows.json").write_text("\ufeff" + json.dumps(ROWS, indent=indent), encoding="utf-8")
    assert read_rows(tmp_path / "rows.json", ("text",)) == [{"text": text} for text in TEXTS]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(SaapError, match="no rows"):
        read_rows(tmp_path / "rows.jsonl", ("text",))


@pytest.mark.parametrize("line", ['{"extra": 1}', "3", "[1]", "null"])
def test_a_later_line_that_lacks_the_column_is_refused(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(SaapError, match=r"rows\.jsonl"):
        read_rows(tmp_path / "rows.jsonl", ("text",))


def test_prose_is_learned_whole_behind_bos_where_the_tokenizer_puts_one(tiny_tokenizer, numbers):
    found = token_example([5, 6, 7, 8], tiny_tokenizer, 3)
    assert found == {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "length": 3}
    found = token_example([5, 6], numbers, 9)
    assert found == {"input_ids": [1, 5, 6], "labels": [-100, 5, 6], "length": 3}


def test_text_to_rank_by_begins_with_bos_where_the_tokenizer_puts_one_but_for_llama(numbers, tiny_tokenizer):
    assert calibration_bos("gemma3_text", numbers) == calibration_bos("saap_mistral", numbers) == 1
    assert calibration_bos("llama", numbers) is calibration_bos("saap_llama", numbers) is None
    assert calibration_bos("gemma3_text", tiny_tokenizer) is None
    about = {"count": 5, "length": LENGTH, "seed": 0}
    tokens, rows = sample_tokens(rows_of_numbers(MIXED), numbers, **about, bos=1)
    assert tokens.shape == (5, LENGTH)
    assert (tokens[:, 0] == 1).all()
    assert (tokens[:, 1:] > 1).all()
    assert (tokens[:, 1] == torch.from_numpy(rows) + 2).all()


def test_the_longest_answers_come_first_and_twice_only_where_there_are_no_others(tiny_tokenizer):
    rows = [row(str(number), "x" * length) for number, length in enumerate((3, 9, 9, 1, 5))]
    about = {"tokenizer": tiny_tokenizer, "max_length": 4096, "longest": True, "whole_text": False}

    def chosen(rows, count, **more):
        return [row["instruction"] for row in chosen_rows(rows, count, **about | more)]

    assert chosen(rows, 3) == ["1", "4", "0"]
    assert chosen(rows, 5) == ["1", "4", "0", "3", "2"]
    assert chosen(rows, 1) == ["1"]  # of the first three
    assert chosen(rows, 3, longest=False) == ["0", "1", "2"]


@pytest.mark.parametrize("longest", [True, False])
def test_rows_that_teach_nothing_are_passed_over(tiny_tokenizer, longest):
    """An answer that is blank, or that begins beyond max_length; with whole_text only the first."""
    rows = [row("blank", " "), row("why " * 400, "late"), row("a", "one"), row("b", "two"), row("c", "more")]
    length = len(tiny_tokenizer(alpaca_text(rows[4]))["input_ids"])
    about = {"longest": longest, "whole_text": False}
    found = chosen_rows(rows, 3, tiny_tokenizer, length, **about)
    assert sorted(row["output"] for row in found) == ["more", "one", "two"]
    found = chosen_rows(rows, 5, tiny_tokenizer, length, **about)
    assert [row["output"] for row in found[3:]] == [" ", "late"]  # too few: they fill up
    found = chosen_rows(rows, 4, tiny_tokenizer, length, **about | {"whole_text": True})
    assert sorted(row["output"] for row in found) == ["late", "more", "one", "two"]


def row(instruction, output):
    return {"instruction": instruction, "input": "", "output": output}


def alpaca_text(row):
    return WITHOUT_INPUT.format(**row) + row["output"]
