"""Rows from Parquet or JSON-lines files, and the texts of calibration and recovery."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saap.corpus import ROWS_AHEAD, ParquetTexts
from saap.errors import SaapError, first_line


def read_rows(file: str | Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """All rows of a .parquet file, JSON lines or one JSON array (.jsonl, .json), the named columns only.

    Raises SaapError for a missing or damaged file, a missing column, or a file without rows.
    """
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    file = Path(file)
    if not file.is_file():
        raise SaapError(f"data file {file} does not exist")
    try:
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as parquet:
                if missing := [c for c in columns if c not in parquet.schema_arrow.names]:
                    raise SaapError(
                        f"{file} has no column {missing}; its columns are {parquet.schema_arrow.names}"[:300]
                    )
                rows = parquet.read(columns=list(columns)).to_pylist()
        else:
            text = file.read_text(encoding="utf-8-sig")
            array = text.lstrip().startswith("[")
            rows = json.loads(text) if array else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (pa.ArrowInvalid, OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SaapError(f"cannot read {file}: {first_line(error)}") from error
    if not rows:
        raise SaapError(f"{file} has no rows")
    for number, row in enumerate(rows, 1):
        missing = [c for c in columns if not isinstance(row, dict) or c not in row]
        if missing:
            found = sorted(row) if isinstance(row, dict) else row
            raise SaapError(f"{file} has no column {missing} in row {number}; its columns are {found}"[:300])
    return [{c: row[c] for c in columns} for row in rows]


# up to here all rows are shuffled at once; a shuffle of more would need an eight-byte number for each row
SHUFFLED_AT_ONCE = 1 << 22


def random_order(count: int, rng: np.random.Generator) -> Iterator[int]:
    """0 … count − 1 in random order, each once. A large count is drawn only as far as it is asked for (Fisher–Yates
    that keeps only the places it touched); a small one is a permutation of the generator's.
    """
    if count <= SHUFFLED_AT_ONCE:
        yield from map(int, rng.permutation(count))
        return
    rng = rng.spawn(1)[0]
    moved: dict[int, int] = {}
    for place in range(count):
        other = int(rng.integers(place, count))
        chosen = moved.get(other, other)
        moved[other] = moved.pop(place, place)
        yield chosen


def _read_ahead(rows: Iterator[int], texts: Sequence[str], count: int) -> Iterator[int]:
    """The same rows; the next ones are read together where that is cheaper."""
    while block := list(itertools.islice(rows, min(count, ROWS_AHEAD))):
        if isinstance(texts, ParquetTexts):
            texts.read_ahead(block)
        yield from block


def sample_tokens(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    count: int,
    length: int,
    seed: int,
    at_most: bool = False,
    bos: int | None = None,
) -> tuple[torch.Tensor, np.ndarray]:
    """`count` calibration sequences of exactly `length` tokens, no row used twice.

    texts: a list, or `ParquetTexts`, of which only what is drawn is read. Rows are visited in an order drawn from
    `seed`; a row that is too short is continued by the rows after it (BookCorpus has one sentence a row), and the
    window begins at a random place of what was gathered. No special tokens but bos, which is then the first of each
    (`calibration_bos`).

    Returns tokens int64 (count, length) and the row each sequence begins in, int64 (count,).
    Raises SaapError when the texts do not hold that many; with at_most they may be fewer, and one is enough.
    """
    rng = np.random.default_rng(seed)
    used: set[int] = set()
    sequences, rows = [], []
    begin = [] if bos is None else [bos]
    wanted = length - len(begin)
    for start in _read_ahead(random_order(len(texts), rng), texts, count):
        ids: list[int] = []
        origin: list[int] = []
        row = start
        while row < len(texts) and row not in used and len(ids) < wanted:
            ids += tokenizer(texts[row], add_special_tokens=False)["input_ids"]
            origin += [row] * (len(ids) - len(origin))
            row += 1
        if len(ids) < wanted:
            continue
        used.update(range(start, row))
        offset = int(rng.integers(len(ids) - wanted + 1))
        sequences.append(begin + ids[offset : offset + wanted])
        rows.append(origin[offset])
        if len(sequences) == count:
            break
    if len(sequences) == count or (at_most and sequences):
        return torch.tensor(sequences), np.array(rows)
    raise SaapError(
        f"the text holds only {len(sequences)} sequences of {length} tokens, {count} are asked for: give more text, or "
        "ask for fewer or shorter ones (calibrate.count and calibrate.length; for recovery recover.prose and "
        "recover.max_length)"
    )


def chosen_rows(
    rows: Sequence[dict[str, str]], count: int, tokenizer: Any, max_length: int, *, longest: bool, whole_text: bool
) -> list[dict[str, str]]:
    """`count` instruction rows to train on: the first ones, or of three times as many those of the longest answers.

    Only rows that teach something are looked at: with an answer, and with whole_text or one that begins within
    max_length tokens. Where these are too few, others fill up.
    """
    fit: list[dict[str, str]] = []
    others: list[dict[str, str]] = []
    for row in rows:
        if len(fit) == (3 if longest else 1) * count:
            break
        (fit if teaches(row, training_example(row, tokenizer, max_length, whole_text)) else others).append(row)
    return [*(_longest(fit, count) if longest else fit), *others][:count]


def teaches(row: dict[str, Any], example: dict[str, Any]) -> bool:
    """Whether the `training_example` of a row has labels, and an instruction an answer."""
    return bool("tokens" in row or row["output"].strip()) and any(label != -100 for label in example["labels"])


def _longest(rows: Sequence[dict[str, str]], count: int) -> list[dict[str, str]]:
    """`count` rows: those of the longest answers, no answer twice while there are others."""
    new: list[dict[str, str]] = []
    repeated: list[dict[str, str]] = []
    seen = set()
    for row in sorted(rows, key=lambda row: len(row["output"].strip()), reverse=True):
        output = row["output"].strip()
        (repeated if output in seen else new).append(row)
        seen.add(output)
    return [*new, *repeated][:count]


WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def alpaca_example(row: dict[str, str], tokenizer: Any, max_length: int, whole_text: bool = False) -> dict[str, Any]:
    """One Alpaca row in the Alpaca prompt format: input_ids, and labels, −100 on the prompt (loss on the answer).

    whole_text: loss on the prompt too. Ends with one end-of-sequence token; cut at max_length tokens. The first label
    is −100, since nothing comes before it. Prompt and answer are one text to the tokenizer: LLaMA's would begin an
    answer of its own with a space. Raises SaapError for a row without instruction or output.
    """
    for column in ("instruction", "output"):
        if not isinstance(row[column], str):
            raise SaapError(f"an Alpaca row needs text as {column}, found {row[column]!r}"[:300])
    prompt = (WITH_INPUT if row["input"] else WITHOUT_INPUT).format(**row)
    head, ids = (_without_end(tokenizer(text)["input_ids"], tokenizer) for text in (prompt, prompt + row["output"]))
    ids = [*ids, tokenizer.eos_token_id][:max_length]
    unlabelled = 1 if whole_text else len(head)
    labels = ([-100] * unlabelled + ids[unlabelled:])[:max_length]
    return {"input_ids": ids, "labels": labels, "length": len(ids)}


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Without the end-of-sequence token that some tokenizers put behind every text."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def token_example(tokens: list[int], tokenizer: Any, max_length: int) -> dict[str, Any]:
    """A sequence of prose as an example: behind BOS where the tokenizer puts one, loss on all of it but the first."""
    ids = [*leading_bos(tokenizer), *tokens][:max_length]
    return {"input_ids": ids, "labels": [-100, *ids[1:]], "length": len(ids)}


def training_example(row: dict[str, Any], tokenizer: Any, max_length: int, whole_text: bool = False) -> dict[str, Any]:
    """`token_example` of a row with tokens, `alpaca_example` of one with instruction, input and output."""
    if "tokens" in row:
        return token_example(row["tokens"], tokenizer, max_length)
    return alpaca_example(row, tokenizer, max_length, whole_text)


def calibration_bos(model_type: str, tokenizer: Any) -> int | None:
    """The BOS that text to rank by, and windows to measure perplexity in, begin with; or None.

    There is one where the tokenizer puts it before a text, because models that were trained that way are far off
    without. LLaMA and its likes are excepted: what is published of them is without.
    """
    begin = [] if model_type.removeprefix("saap_") == "llama" else leading_bos(tokenizer)
    return begin[0] if begin else None


def leading_bos(tokenizer: Any) -> list[int]:
    """[BOS], where the tokenizer puts it before a text; else nothing."""
    begin = tokenizer("a")["input_ids"][:1]
    return list(begin) if begin == [tokenizer.bos_token_id] else []
