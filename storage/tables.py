"""The Parquet files that stages publish: their schemas, and how they are written and read."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import StorageError

KIND = pa.dictionary(pa.int8(), pa.string())
_ROWS_AT_ONCE = 1 << 20


def _schema(*fields: tuple[str, pa.DataType, str]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, metadata={"doc": doc}) for name, kind, doc in fields])


_SAMPLE = ("sample", pa.int32(), "calibration sample, from 0")
_GROUP = (
    ("layer", pa.int32(), "decoder layer, from 0"),
    ("kind", KIND, "attention (a KV head with its query heads, or a query head), expert, or mlp (a channel)"),
    ("unit", pa.int32(), "number of the group within its layer and kind, from 0"),
)

SCHEMAS: dict[str, pa.Schema] = {
    "calibration": _schema(
        _SAMPLE,
        ("position", pa.int32(), "place in the sequence, from 0"),
        ("token", pa.int32(), "token id"),
        ("source_row", pa.int64(), "row of the text source the sequence begins in"),
    ),
    "importance": _schema(
        _SAMPLE,
        *_GROUP,
        ("vector", pa.float32(), "coarse importance I^V (eq. 1)"),
        ("element", pa.float32(), "fine importance I^E (eq. 2)"),
    ),
    "fused": _schema(_SAMPLE, *_GROUP, ("fused", pa.float64(), "fused importance (eq. 9)")),
    "lambdas": _schema(
        *_GROUP,
        ("lambda_vector", pa.float64(), "λ₁ of the scope the group is in"),
        ("lambda_element", pa.float64(), "λ₂ of the scope the group is in"),
    ),
    "groups": _schema(
        *_GROUP,
        ("parameters", pa.int64(), "parameters removed with the group"),
        ("rank_score", pa.float64(), "what the criterion ranks by: the lowest go first"),
        ("weight_norm_sq", pa.float64(), "sum of squares of the group's weights; this and the rest of criterion saap"),
        ("mean_fused", pa.float64(), "mean over the samples of the fused importance"),
        ("fluctuation", pa.float64(), "M (eq. 10)"),
        ("asi", pa.float64(), "adaptive stability indicator (eq. 11)"),
    ),
    "taylor": _schema(
        *_GROUP,
        ("vectorize", pa.float64(), "sum over rows of |sum of weight times mean gradient|"),
        ("param_first", pa.float64(), "sum of |weight times mean gradient|"),
        ("param_mix", pa.float64(), "the same with the second-order term inside"),
        ("vectorize_as_coded", pa.float64(), "with grouped queries: query heads counted as in LLM-Pruner's code"),
        ("param_first_as_coded", pa.float64(), "the same"),
        ("param_mix_as_coded", pa.float64(), "the same"),
    ),
    "fisher": _schema(
        *_GROUP, ("fisher", pa.float64(), "mean over the samples of its squared first-order share in the loss")
    ),
    "moments": _schema(
        ("layer", pa.int32(), "decoder layer, from 0"),
        ("kind", KIND, "attention (inputs of o_proj) or mlp (of down_proj)"),
        ("channel", pa.int32(), "input channel, from 0"),
        ("mean", pa.float64(), "over all calibration tokens"),
        ("variance", pa.float64(), "over all calibration tokens, unbiased"),
        ("norm", pa.float64(), "square root of the sum of squares"),
    ),
    "plan": _schema(*_GROUP, ("kept", pa.bool_(), "whether the group stays")),
    "widths": _schema(
        ("layer", pa.int32(), "decoder layer, from 0"),
        ("kind", KIND, "attention, expert or mlp; the parameters of an expert's channels count under mlp"),
        ("units", pa.int32(), "groups in the dense model"),
        ("kept", pa.int32(), "groups that stay"),
        ("parameters", pa.int64(), "parameters of the dense structure"),
        ("kept_parameters", pa.int64(), "parameters that stay"),
    ),
    "training": _schema(
        ("step", pa.int32(), "optimiser step, from 1"),
        ("epoch", pa.float64(), "passes over the data"),
        ("loss", pa.float64(), "mean training loss, nats a labelled token"),
        ("learning_rate", pa.float64(), "learning rate of the step"),
        ("tokens_per_s", pa.float64(), "tokens trained on a second, padding not counted"),
        ("held_out_loss", pa.float64(), "mean loss on the held-out rows after the step; null where not measured"),
    ),
    "metrics": _schema(
        ("benchmark", pa.string(), "one of the nine"),
        ("metric", pa.string(), "acc, acc_norm or perplexity"),
        ("value", pa.float64(), "accuracy in 0…1, or perplexity"),
        ("stderr", pa.float64(), "standard error of value"),
        ("n", pa.int64(), "items, or windows of text"),
        ("protocol", pa.string(), "how it was measured"),
        ("harness", pa.string(), "lm-eval and its version; none for perplexity, which is our own code"),
        ("task_version", pa.string(), "lm-eval's version of the task"),
        ("papers", pa.bool_(), "whether it is the number that the papers' tables show"),
        ("data", pa.string(), "where the data came from: mini, hub, or a folder's name"),
    ),
    "items": _schema(
        ("benchmark", pa.string(), "one of the nine"),
        ("metric", pa.string(), "acc, acc_norm or perplexity"),
        ("protocol", pa.string(), "how it was measured"),
        ("item", pa.int32(), "number of the item or window, from 0"),
        ("value", pa.float64(), "1 right, 0 wrong; of a window the mean NLL, nats a token"),
    ),
    "layer_times": _schema(
        ("kind", pa.string(), "of the structures that are narrower, in every layer"),
        ("kept", pa.float64(), "share of their units that stays"),
        ("time", pa.float64(), "for a token, beside the dense model's: median of the paired ratios"),
    ),
    "speed": _schema(
        ("variant", pa.string(), "dense, pruned or recovered; with ' in llama.cpp' after it when timed there"),
        ("tokens_per_s", pa.float64(), "decode, median; on a GPU by CUDA graphs"),
        ("tokens_per_s_spread", pa.float64(), "interquartile range over median"),
        ("decode_ratio", pa.float64(), "median of the paired ratios to dense"),
        ("eager_tokens_per_s", pa.float64(), "decode without CUDA graphs, median"),
        ("prefill_tokens_per_s", pa.float64(), "prompt tokens a second, median"),
        ("prefill_ratio", pa.float64(), "median of the paired ratios to dense"),
        ("parameters", pa.int64(), "logical parameters; an int4 weight counts as one"),
        ("active_parameters", pa.int64(), "of them those one token passes: of experts as many as the router picks"),
        ("weight_bytes", pa.int64(), "bytes of weights, scales and zeros as stored"),
        ("peak_bytes", pa.float64(), "weights, and the most allocated beside them on the GPU; NaN on a CPU"),
        ("macs_per_token", pa.int64(), "multiply-accumulates for one new token"),
        ("dtype", pa.string(), "of the layer weights"),
        ("device", pa.string(), "what it ran on"),
        ("threads", pa.int32(), "CPU threads"),
        ("batch_size", pa.int32(), "sequences decoded at once"),
        ("prompt_tokens", pa.int32(), "tokens of the prompt"),
        ("new_tokens", pa.int32(), "tokens generated"),
        ("runs", pa.int32(), "timed runs"),
    ),
}


def write_table(folder: Path, name: str, columns: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> Path:
    """Write `<folder>/<name>.parquet` in the schema of that name, from columns or from rows."""
    schema = SCHEMAS[name]
    if isinstance(columns, Mapping):
        table = pa.table({f.name: pa.array(columns[f.name]).cast(f.type) for f in schema}, schema=schema)
    else:
        table = pa.Table.from_pylist([dict(row) for row in columns], schema=schema)
    path = folder / f"{name}.parquet"
    pq.write_table(table, path, compression="zstd")
    return path


def read_table(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The columns of `<folder>/<name>.parquet` as arrays. Raises StorageError when it is not such a file."""
    path = folder / f"{name}.parquet"
    try:
        table = _read(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise StorageError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    if table.schema.names != SCHEMAS[name].names:
        raise StorageError(f"{path} has columns {table.schema.names}, expected {SCHEMAS[name].names}")
    return {column: table[column].to_numpy() for column in table.schema.names}


def load_table(folder: Path, name: str) -> pa.Table:
    """`<folder>/<name>.parquet` as a table. Columns that were added to the schema after it was written are not in it.

    Raises StorageError when it is not such a file.
    """
    path = folder / f"{name}.parquet"
    schema = SCHEMAS[name]
    try:
        table = _read(path)
        known = pa.schema([field for field in schema if field.name in table.schema.names])
        table = table.select(known.names)
        return table if table.schema.equals(known) else table.cast(known)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _read(path: Path) -> pa.Table:
    """Not pq.read_table: that imports pandas, for half a second, and takes three times as long for a small file."""
    with pq.ParquetFile(path) as file:
        return file.read()


def check_table(folder: Path, name: str) -> None:
    """Raises StorageError when `<folder>/<name>.parquet` is not such a file, as far as its schema tells."""
    path = folder / f"{name}.parquet"
    try:
        found = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    if not found.equals(SCHEMAS[name]):
        raise StorageError(f"{path} has columns {found.names}, expected {SCHEMAS[name].names}")


class SampleWriter:
    """Writes (samples, groups) values as rows (sample, layer, kind, unit, …), a batch of samples at a time."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema, groups: Mapping[str, np.ndarray]) -> None:
        self._writer, self._schema, self._next = writer, schema, 0
        self._groups = {
            "layer": pa.array(groups["layer"]),
            "kind": pa.array(groups["kind"]).cast(KIND),
            "unit": pa.array(groups["unit"]),
        }

    def write(self, **values: np.ndarray) -> None:
        """Append samples: each value is (batch, N), N groups in the order given at the start."""
        for row in range(len(next(iter(values.values())))):
            columns = {
                "sample": pa.array(np.full(len(self._groups["layer"]), self._next, np.int32)),
                **self._groups,
                **{name: pa.array(value[row]) for name, value in values.items()},
            }
            self._writer.write_table(pa.table([columns[n] for n in self._schema.names], schema=self._schema))
            self._next += 1


@contextmanager
def sample_writer(folder: Path, name: str, groups: Mapping[str, np.ndarray]) -> Iterator[SampleWriter]:
    """Open `<folder>/<name>.parquet` ('importance' or 'fused') for writing. groups: layer, kind, unit (N,)."""
    schema = SCHEMAS[name]
    # coordinates repeat or count up, floats share their exponents: each compresses best in an encoding of its own
    encodings = {
        field.name: "BYTE_STREAM_SPLIT" if pa.types.is_floating(field.type) else "DELTA_BINARY_PACKED"
        for field in schema
        if field.name != "kind"
    }
    with pq.ParquetWriter(
        folder / f"{name}.parquet", schema, compression="zstd", use_dictionary=["kind"], column_encoding=encodings
    ) as writer:
        yield SampleWriter(writer, schema, groups)


def read_samples(folder: Path, name: str) -> dict[str, np.ndarray]:
    """What `sample_writer` wrote: layer, kind, unit (N,) and each value as (samples, N).

    The coordinates, which every sample repeats, are read once, and the values a million rows at a time: of a 70B they
    are 115 million. Raises StorageError when it is not such a file.
    """
    path = folder / f"{name}.parquet"
    check_table(folder, name)
    values = [column for column in SCHEMAS[name].names if column not in ("sample", "layer", "kind", "unit")]
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20) as parquet:
            rows = parquet.metadata.num_rows
            last = parquet.read_row_group(parquet.num_row_groups - 1, columns=["sample"])
            samples = last["sample"][-1].as_py() + 1
            groups = _first_rows(parquet, ["layer", "kind", "unit"], rows // samples)
            found = {column: np.empty(rows, SCHEMAS[name].field(column).type.to_pandas_dtype()) for column in values}
            at = 0
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=values):
                for column in values:
                    found[column][at : at + len(batch)] = batch.column(column).to_numpy()
                at += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    return groups | {column: array.reshape(samples, -1) for column, array in found.items()}


def _first_rows(parquet: pq.ParquetFile, columns: list[str], count: int) -> dict[str, np.ndarray]:
    """kind as a str array."""
    batches: list[pa.RecordBatch] = []
    for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=columns):
        batches.append(batch)
        if sum(map(len, batches)) >= count:
            break
    table = pa.Table.from_batches(batches).slice(0, count)
    found = {column: table[column].to_numpy() for column in columns}
    return found | {"kind": found["kind"].astype(str)}
