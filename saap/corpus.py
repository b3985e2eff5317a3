"""The texts of Parquet files, as a sequence that reads only the rows it is asked for."""

import bisect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

from saap.errors import SaapError, first_line

_BATCH = 1024  # rows decoded at once
ROWS_AHEAD = 128  # at most, in `read_ahead`
_HELD = 2 * ROWS_AHEAD  # batches kept
_THREADS = min(4, os.cpu_count() or 1)  # each decodes a row group in `read_ahead`, of which it holds a page and a batch


class ParquetTexts(Sequence[str]):
    """Row r of the files, one file after the other, as str. Of 74 million rows only those around r are read.

    A row group is decoded in batches from its first row up to the one asked for; the rows after it are read on from
    there. How a file is split into row groups decides the time, not what is read.
    """

    def __init__(self, rows: Sequence[int], open_file: Callable[[int], Path], column: str = "text") -> None:
        """rows: how many each file has. open_file: number of a file → its path; called when a row is needed."""
        self._ends = list(itertools.accumulate(rows))
        self._open = open_file
        self._column = column
        self._layouts: dict[int, _Layout] = {}
        self._file: _OpenFile | None = None
        self._batches: dict[int, list[Any]] = {}  # number of the first row → texts

    @classmethod
    def of_files(cls, files: Sequence[Path], column: str = "text") -> "ParquetTexts":
        """The texts of local files. Raises SaapError when one cannot be read."""
        layouts = {}
        for number, file in enumerate(files):
            with _named(file):
                layouts[number] = _Layout(file, column)
        texts = cls([layout.metadata.num_rows for layout in layouts.values()], lambda number: files[number], column)
        texts._layouts = layouts
        return texts

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        """Raises SaapError when the file is damaged, lacks the column, or the row is no text."""
        if isinstance(row, slice):
            return [self[r] for r in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        first, texts = self._batch(row)
        return self._text(texts[row - first], row)

    def read_ahead(self, rows: Iterable[int]) -> None:
        """Read rows, `ROWS_AHEAD` at most: each row group that holds some is decoded once, several at a time."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row in sorted(set(rows)):
            if self._held(row) is None:
                number, inside = self._place(row)
                groups.setdefault((number, self._layout(number).group_of(inside)), []).append(row)
        with ThreadPoolExecutor(_THREADS) as pool:
            for found in pool.map(self._read_group, groups.values()):
                for first, texts in found.items():
                    self._keep(first, texts)

    def _read_group(self, rows: list[int]) -> dict[int, list[Any]]:
        """The batches that hold these rows, ascending, of one row group."""
        number, _ = self._place(rows[0])
        file, found = self._opened(number), {}
        for row in rows:
            first, texts = self._batch_of(file, row)
            found[first] = texts
        return found

    def _batch(self, row: int) -> tuple[int, list[Any]]:
        """The batch that holds the row: the number of its first row, and its texts."""
        held = self._held(row)
        if held is None:
            number, _ = self._place(row)
            if self._file is None or self._file.number != number:
                self._file = self._opened(number)
            held = self._batch_of(self._file, row)
            self._keep(*held)
        return held

    def _held(self, row: int) -> tuple[int, list[Any]] | None:
        for first, texts in self._batches.items():
            if first <= row < first + len(texts):
                return first, texts
        return None

    def _keep(self, first: int, texts: list[Any]) -> None:
        self._batches[first] = texts
        if len(self._batches) > _HELD:
            del self._batches[next(iter(self._batches))]

    def _place(self, row: int) -> tuple[int, int]:
        """Number of the file that holds a row, and the row's number in it."""
        number = bisect.bisect_right(self._ends, row)
        return number, row - (self._ends[number - 1] if number else 0)

    def _layout(self, number: int) -> "_Layout":
        if number not in self._layouts:
            path = self._open(number)
            with _named(path):
                self._layouts[number] = _Layout(path, self._column)
        return self._layouts[number]

    def _opened(self, number: int) -> "_OpenFile":
        layout = self._layout(number)
        with _named(layout.path):
            return _OpenFile(layout, number)

    def _batch_of(self, file: "_OpenFile", row: int) -> tuple[int, list[Any]]:
        _, inside = self._place(row)
        with _named(file.layout.path):
            first, texts = file.batch(inside)
        return row - inside + first, texts

    def _text(self, value: Any, row: int) -> str:
        if isinstance(value, str):
            return value
        number, inside = self._place(row)
        raise SaapError(
            f"{self._open(number)}, row {inside + 1}, column {self._column}: a text is expected, found {value!r}"
        )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of reading a file say which one."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise SaapError(f"cannot read {path}: {first_line(error)}") from error


class _Layout:
    """The end of a Parquet file, read once: where its row groups end."""

    def __init__(self, path: Path, column: str) -> None:
        import pyarrow.parquet as pq

        self.path, self.column = path, column
        self.metadata = pq.read_metadata(path)
        names = self.metadata.schema.to_arrow_schema().names
        if column not in names:
            raise ValueError(f"there is no column {column}, only {names}")
        groups = range(self.metadata.num_row_groups)
        self.ends = list(itertools.accumulate(self.metadata.row_group(g).num_rows for g in groups))

    def group_of(self, row: int) -> int:
        return bisect.bisect_right(self.ends, row)


class _OpenFile:
    """One Parquet file, read forwards within a row group."""

    def __init__(self, layout: _Layout, number: int) -> None:
        import pyarrow.parquet as pq

        self.layout, self.number = layout, number
        # without these a whole column of a row group is held at once
        self._parquet = pq.ParquetFile(layout.path, metadata=layout.metadata, pre_buffer=False, buffer_size=1 << 20)
        self._batches: Iterator[Any] = iter(())
        self._next = self._end = 0  # the row that the next batch begins with, and the end of its row group

    def batch(self, row: int) -> tuple[int, list[Any]]:
        if not self._next <= row < self._end:
            group, ends = self.layout.group_of(row), self.layout.ends
            if group == len(ends):
                raise ValueError(f"row {row + 1} is missing: the file is damaged")
            self._next, self._end = ends[group - 1] if group else 0, ends[group]
            self._batches = self._parquet.iter_batches(
                batch_size=_BATCH, row_groups=[group], columns=[self.layout.column], use_threads=False
            )
        for batch in self._batches:
            first, self._next = self._next, self._next + len(batch)
            if row < self._next:
                return first, batch.column(0).to_pylist()
        raise ValueError(f"row {row + 1} is missing: the file is damaged")
