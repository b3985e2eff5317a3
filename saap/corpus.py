"""The texts of Parquet files, as a sequence that reads only the rows it is asked for."""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from saap.errors import SaapError, first_line

_BATCH = 1024  # rows decoded at once
ROWS_AHEAD = 128  # at most, in `read_ahead`
_HELD = 2 * ROWS_AHEAD  # batches kept


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
        self._file: _OpenFile | None = None
        self._batches: dict[int, list[Any]] = {}  # number of the first row → texts

    @classmethod
    def of_files(cls, files: Sequence[Path], column: str = "text") -> "ParquetTexts":
        """The texts of local files. Raises SaapError when one cannot be read."""
        import pyarrow.parquet as pq

        rows = []
        for file in files:
            try:
                rows.append(pq.read_metadata(file).num_rows)
            except (OSError, ValueError) as error:
                raise SaapError(f"cannot read {file}: {first_line(error)}") from error
        return cls(rows, lambda number: files[number], column)

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
        """Read rows, `ROWS_AHEAD` at most, in file order; in another order a row group would be decoded repeatedly."""
        for row in sorted(rows):
            self._batch(row)

    def _batch(self, row: int) -> tuple[int, list[Any]]:
        """The batch that holds the row: the number of its first row, and its texts."""
        for first, texts in self._batches.items():
            if first <= row < first + len(texts):
                return first, texts
        first, texts = self._read(row)
        self._batches[first] = texts
        if len(self._batches) > _HELD:
            del self._batches[next(iter(self._batches))]
        return first, texts

    def _read(self, row: int) -> tuple[int, list[Any]]:
        number = bisect.bisect_right(self._ends, row)
        if self._file is None or self._file.number != number:
            path = self._open(number)
            try:
                self._file = _OpenFile(path, number, self._column)
            except (OSError, ValueError) as error:
                raise SaapError(f"cannot read {path}: {first_line(error)}") from error
        begin = self._ends[number - 1] if number else 0
        try:
            first, texts = self._file.batch(row - begin)
        except (OSError, ValueError) as error:
            raise SaapError(f"cannot read {self._file.path}: {first_line(error)}") from error
        return begin + first, texts

    def _text(self, value: Any, row: int) -> str:
        if isinstance(value, str):
            return value
        number = bisect.bisect_right(self._ends, row)
        begin = self._ends[number - 1] if number else 0
        raise SaapError(
            f"{self._open(number)}, row {row - begin + 1}, column {self._column}: a text is expected, found {value!r}"
        )


class _OpenFile:
    """One Parquet file, read forwards within a row group."""

    def __init__(self, path: Path, number: int, column: str) -> None:
        import pyarrow.parquet as pq

        self.path, self.number = path, number
        # without these a whole column of a row group is held at once
        self._parquet = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        if column not in self._parquet.schema_arrow.names:
            raise ValueError(f"there is no column {column}, only {self._parquet.schema_arrow.names}")
        self._column = column
        about = self._parquet.metadata
        self._ends = list(itertools.accumulate(about.row_group(g).num_rows for g in range(about.num_row_groups)))
        self._batches: Iterator[Any] = iter(())
        self._next = self._end = 0  # the row that the next batch begins with, and the end of its row group

    def batch(self, row: int) -> tuple[int, list[Any]]:
        if not self._next <= row < self._end:
            group = bisect.bisect_right(self._ends, row)
            self._next, self._end = self._ends[group - 1] if group else 0, self._ends[group]
            self._batches = self._parquet.iter_batches(
                batch_size=_BATCH, row_groups=[group], columns=[self._column], use_threads=False
            )
        for batch in self._batches:
            first, self._next = self._next, self._next + len(batch)
            if row < self._next:
                return first, batch.column(0).to_pylist()
        raise ValueError(f"row {row + 1} is missing: the file is damaged")
