"""Texts that are read only when asked for equal those of reading everything, for any layout of the file."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import saap.texts
from saap import SaapError, sample_tokens
from saap.corpus import ParquetTexts
from saap.texts import random_order

ROWS = [f"{r} " * (1 + r % 7) for r in range(3000)]


def parquet(file, rows, group=1000, kind=None):
    pq.write_table(
        pa.table({"number": list(range(len(rows))), "text": pa.array(rows, kind)}), file, row_group_size=group
    )
    return file


@pytest.fixture(params=[(1, 50), (3, 1024), (2, 5000)], ids=["groups of 50", "three files", "one group a file"])
def texts(tmp_path, request):
    """ROWS in so many files, in row groups of so many rows."""
    files, group = request.param
    parts = [ROWS[i * 3000 // files : (i + 1) * 3000 // files] for i in range(files)]
    return ParquetTexts.of_files([parquet(tmp_path / f"{i}.parquet", part, group) for i, part in enumerate(parts)])


def test_it_is_the_list_of_all_rows(texts):
    assert len(texts) == len(ROWS)
    assert list(texts) == ROWS
    order = np.random.default_rng(0).permutation(len(ROWS)).tolist()
    texts.read_ahead(order[:100])
    assert [texts[row] for row in order] == [ROWS[row] for row in order]
    assert texts[-3000 + 2990 :] == ROWS[-10:]
    with pytest.raises(IndexError):
        texts[len(ROWS)]


@pytest.mark.parametrize("at_once", [1 << 22, 100], ids=["shuffled", "drawn"])
@pytest.mark.parametrize("seed", range(3))
def test_the_sample_is_that_of_the_list_whatever_the_row_groups(texts, tiny_tokenizer, monkeypatch, at_once, seed):
    monkeypatch.setattr(saap.texts, "SHUFFLED_AT_ONCE", at_once)
    expected, rows = sample_tokens(ROWS, tiny_tokenizer, count=20, length=40, seed=seed)
    found, its_rows = sample_tokens(texts, tiny_tokenizer, count=20, length=40, seed=seed)
    assert torch.equal(found, expected)
    assert its_rows.tolist() == rows.tolist()


def test_only_files_that_are_drawn_from_are_opened(tmp_path, tiny_tokenizer):
    files = [parquet(tmp_path / f"{i}.parquet", ROWS) for i in range(40)]
    opened = []
    texts = ParquetTexts([len(ROWS)] * 40, lambda number: opened.append(number) or files[number])
    _, rows = sample_tokens(texts, tiny_tokenizer, count=5, length=20, seed=0)
    assert set(opened) == {row // 3000 for row in rows}


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_other_kinds_of_text_columns_are_read(tmp_path, kind):
    assert list(ParquetTexts.of_files([parquet(tmp_path / "a.parquet", ROWS, kind=kind)])) == ROWS


@pytest.mark.parametrize(("rows", "found"), [(["a", "b", None], "None"), ([1, 2, 3], "3")], ids=["null", "numbers"])
def test_a_row_that_is_no_text_is_named(tmp_path, rows, found):
    texts = ParquetTexts.of_files([parquet(tmp_path / "a.parquet", ["x"]), parquet(tmp_path / "b.parquet", rows)])
    with pytest.raises(SaapError, match=f"b.parquet, row 3, column text: a text is expected, found {found}"):
        texts[3]


def test_a_damaged_file_is_named(tmp_path):
    file = parquet(tmp_path / "a.parquet", ROWS)
    texts = ParquetTexts.of_files([file])
    content = bytearray(file.read_bytes())
    content[200:-2000] = bytes(len(content) - 2200)
    file.write_bytes(content)
    with pytest.raises(SaapError, match=r"cannot read .*a\.parquet"):
        list(texts)
    file.write_bytes(b"PAR1")
    with pytest.raises(SaapError, match=r"cannot read .*a\.parquet"):
        ParquetTexts.of_files([file])


def test_a_large_count_is_drawn_without_being_laid_out(monkeypatch):
    """Every order of four is as likely as another, and each row comes once."""
    monkeypatch.setattr(saap.texts, "SHUFFLED_AT_ONCE", 1)
    orders = [tuple(random_order(4, np.random.default_rng(seed))) for seed in range(2400)]
    found = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(found) == 24
    assert ((found - 100) ** 2 / 100).sum() < 49.7  # χ² with 23 degrees of freedom, 99.9 %
    assert sorted(random_order(500, np.random.default_rng(0))) == list(range(500))


def test_a_small_count_is_visited_in_the_generators_permutation():
    expected = np.random.default_rng(7).permutation(1000).tolist()
    assert list(random_order(1000, np.random.default_rng(7))) == expected
