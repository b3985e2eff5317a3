"""Rows of data files in the form the stages take; what is wrong is named by file, row and column. Without torch."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tasks.toml import ConfigError

Row = dict[str, Any]


class _Wrong(ValueError):
    def __init__(self, column: str, expected: str, found: Any) -> None:
        super().__init__(f"column {column}: {expected} is expected, found {repr(found)[:60]}")


def needed_for(role: str) -> str:
    """A role, as messages name it: prose to recover on is read as the text to calibrate on is."""
    return "calibration or prose to recover on" if role == "calibration" else role


def checked_rows(file: Path, role: str, columns: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a file, one by one, in the official form of the role; of benchmarks further columns as they are.

    Taken where the meaning is clear: `input` missing or null, choices as a list of pairs, numbers for labels.
    Raises ConfigError for a damaged file, a missing column, a file without rows, a value that is not as expected, and
    at the end where texts or answers are blank in all rows.
    """
    fix = FORMS.get(role, _texts(*columns))
    number, said = 0, role in FORMS
    for number, row in enumerate(_rows(file, None if role in FORMS else columns), 1):
        if not isinstance(row, dict):
            raise ConfigError(
                f"{file}, row {number}: an object with {', '.join(columns)} is expected, found {row!r:.60}"
            )
        may_lack = ("input",) if role == "recovery" else ()
        missing = [column for column in columns if column not in row and column not in may_lack]
        if missing:
            raise ConfigError(
                f"{file} lacks the column {', '.join(missing)} in row {number}, needed for {needed_for(role)}; it has "
                f"{sorted(row)}"
            )
        row |= {column: "" for column in may_lack if row.get(column) is None}
        try:
            fix(row)
        except _Wrong as wrong:
            raise ConfigError(f"{file}, row {number}, {wrong}") from wrong
        said = said or bool(row[columns[-1]].strip())
        yield row
    if not number:
        raise ConfigError(f"{file} has no rows")
    if not said:
        raise ConfigError(f"{file}: the column {columns[-1]} is blank in every row, needed for {needed_for(role)}")


def check_text_column(file: Path, role: str, column: str) -> int:
    """How many rows a Parquet file of texts has, checked without reading it where it says how many are null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        schema = parquet.schema_arrow
        if column not in schema.names:
            raise ConfigError(
                f"{file} lacks the column {column}, needed for {needed_for(role)}; it has {sorted(schema.names)}"
            )
        _check_once(file, schema.names, (column,))
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise ConfigError(f"{file}, column {column}: text is expected, found {kind}")
        if not parquet.metadata.num_rows:
            raise ConfigError(f"{file} has no rows")
        place, row = parquet.schema.names.index(column), 0
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            known = group.column(place).statistics
            if known is None or not known.has_null_count or known.null_count:
                _find_null(parquet, number, column, row, file)
            row += group.num_rows
        return int(parquet.metadata.num_rows)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"cannot read {file}: {str(error).splitlines()[0]}") from error


def _check_once(file: Path, names: list[str], wanted: tuple[str, ...] | list[str]) -> None:
    if twice := [column for column in wanted if names.count(column) > 1]:
        raise ConfigError(f"{file} has the column {twice[0]} {names.count(twice[0])} times: leave one")


def _find_null(parquet: Any, group: int, column: str, row: int, file: Path) -> None:
    for batch in parquet.iter_batches(row_groups=[group], columns=[column], use_threads=False):
        texts = batch.column(0)
        if texts.null_count:
            row += texts.is_null().to_pylist().index(True)
            raise ConfigError(f"{file}, row {row + 1}, column {column}: text is expected, found None")
        row += len(texts)


def write_parquet(rows: list[Row], columns: tuple[str, ...], file: Path) -> Path:
    """Rows as a Parquet file; columns that are not named go along where Arrow finds one type for them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.Table.from_pylist(rows)
    except pa.ArrowException:
        table = pa.Table.from_pylist([{column: row[column] for column in columns} for row in rows])
    pq.write_table(table, file)
    return file


def _rows(file: Path, columns: tuple[str, ...] | None) -> Iterator[Any]:
    """The rows of .parquet, JSON lines, or one JSON array; a byte order mark is passed over.

    columns: those to read of a Parquet file, where it has them; all if None.
    """
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(file) as parquet:
                names = parquet.schema_arrow.names
                wanted = names if columns is None else [name for name in names if name in columns]
                if not wanted:
                    raise ConfigError(f"{file} lacks the columns {', '.join(columns or ())}; it has {sorted(names)}")
                _check_once(file, names, wanted)
                for batch in parquet.iter_batches(columns=wanted):
                    yield from batch.to_pylist()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} holds text that is no UTF-8 ({error}): write it again in UTF-8") from error
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"cannot read {file}: {str(error).splitlines()[0]}") from error
        return
    number, first = 0, True
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as stream:
            for line in stream:
                number += 1
                if first and line.lstrip().startswith("["):
                    yield from _parsed(line + stream.read())
                    return
                if line.strip():
                    first = False
                    yield _parsed(line)
    except (OSError, ValueError, RecursionError) as error:
        where = "" if isinstance(error, OSError) else f", line {max(number, 1)}"
        why = "nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise ConfigError(
            f"cannot read {file}{where}: {why}; JSON lines or one JSON array in UTF-8 is expected"
        ) from error


def _parsed(text: str) -> Any:
    value = json.loads(text)
    if re.search(r"\\u[dD][89a-fA-F]", text):  # half of a surrogate pair is no text, and a ValueError here
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise _Wrong(column, "text", value)
    return value


def _texts(*columns: str) -> Callable[[Row], None]:
    def fix(row: Row) -> None:
        for column in columns:
            _text(row, column)

    return fix


def _number(row: Row, column: str, allowed: range) -> int:
    value = row[column]
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if not isinstance(value, (int, bool)) or value not in allowed:
        raise _Wrong(column, f"a number from {allowed.start} to {allowed.stop - 1}", row[column])
    return int(value)


def _choices(question: str) -> Callable[[Row], None]:
    """ARC and OpenBookQA: choices {text: […], label: […]} or a list of {text, label}; answerKey is a label."""

    def fix(row: Row) -> None:
        _text(row, question)
        found = choices = row["choices"]
        if isinstance(choices, list) and choices and all(isinstance(c, dict) for c in choices):
            choices = {name: [c.get(name) for c in choices] for name in ("text", "label")}
        texts, labels = (choices.get(n) for n in ("text", "label")) if isinstance(choices, dict) else (None, None)
        if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels) or len(texts) < 2:
            raise _Wrong("choices", "as many texts as labels, two at least,", found)
        labels = [str(label) if isinstance(label, int) else label for label in labels]
        if not all(isinstance(value, str) for value in (*texts, *labels)):
            raise _Wrong("choices", "text", found)
        key = row["answerKey"]
        key = str(key) if isinstance(key, int) else key
        if not isinstance(key, str) or key.strip() not in labels:
            raise _Wrong("answerKey", f"one of the labels {', '.join(labels)}", row["answerKey"])
        row["choices"], row["answerKey"] = {"text": texts, "label": labels}, key.strip()

    return fix


def _labelled(*columns: str) -> Callable[[Row], None]:
    """BoolQ and PIQA: texts, and a label that is 0 or 1."""

    def fix(row: Row) -> None:
        _texts(*columns)(row)
        row["label"] = _number(row, "label", range(2))

    return fix


def _hellaswag(row: Row) -> None:
    _texts("activity_label", "ctx_a", "ctx_b")(row)
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(text, str) for text in endings):
        raise _Wrong("endings", "a list of texts, two at least,", endings)
    row["label"] = str(_number(row, "label", range(len(endings))))


def _winogrande(row: Row) -> None:
    _texts("option1", "option2")(row)
    if "_" not in _text(row, "sentence"):
        raise _Wrong("sentence", "text with a gap, _,", row["sentence"])
    row["answer"] = str(_number(row, "answer", range(1, 3)))


FORMS: dict[str, Callable[[Row], None]] = {
    "arc_easy": _choices("question"),
    "arc_challenge": _choices("question"),
    "openbookqa": _choices("question_stem"),
    "boolq": _labelled("question", "passage"),
    "piqa": _labelled("goal", "sol1", "sol2"),
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
}
