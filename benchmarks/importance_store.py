"""Importance of a LLaMA-7B-shaped model on disk: write, read back, and typical SQL over it.

    python benchmarks/importance_store.py

32 × (32 + 11008) groups × 50 samples ≈ 17.7 million rows of log-normal values, the shape real scores have. Prints a
table (median of the repeats and their spread) and, as its last line, one JSON object.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np

from storage.tables import read_samples, sample_writer

QUERIES = {
    "top groups per layer": (
        "select layer, kind, unit, avg(element) as mean_element from importance group by layer, kind, unit "
        "qualify row_number() over (partition by layer order by mean_element desc) <= 10"
    ),
    "mean by layer and kind": "select layer, kind, avg(vector), avg(element) from importance group by all",
    "variance across samples": (
        "select layer, kind, avg(spread) from (select layer, kind, unit, var_samp(element) as spread "
        "from importance group by all) group by all"
    ),
}


def groups(layers: int, heads: int, channels: int) -> dict[str, np.ndarray]:
    layer = heads + channels
    return {
        "layer": np.repeat(np.arange(layers, dtype=np.int32), layer),
        "kind": np.tile(np.repeat(["attention", "mlp"], [heads, channels]), layers),
        "unit": np.tile(np.concatenate([np.arange(heads), np.arange(channels)]).astype(np.int32), layers),
    }


def timed(action: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(median seconds, (max − min) / median)."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    middle = float(np.median(seconds))
    return middle, (max(seconds) - min(seconds)) / middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    coordinates = groups(32, 32, 11008)
    rng = np.random.default_rng(0)
    shape = (arguments.samples, len(coordinates["layer"]))
    vector, element = (rng.lognormal(-6, 2, shape).astype(np.float32) for _ in range(2))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def write() -> None:
            with sample_writer(folder, "importance", coordinates) as writer:
                for start in range(0, arguments.samples, 4):
                    writer.write(vector=vector[start : start + 4], element=element[start : start + 4])

        rows = {"write": timed(write, arguments.repeats)}
        megabytes = (folder / "importance.parquet").stat().st_size / 1e6
        rows["read for fusion"] = timed(lambda: read_samples(folder, "importance"), arguments.repeats)
        back = read_samples(folder, "importance")
        assert np.array_equal(back["vector"], vector)
        with duckdb.connect() as connection:
            connection.execute(f"create view importance as from '{folder}/importance.parquet'")
            for query, sql in QUERIES.items():
                rows[query] = timed(lambda sql=sql: connection.execute(sql).fetchall(), arguments.repeats)

    print(f"{vector.size:,} rows, {megabytes:.0f} MB, {os.cpu_count()} cores, {arguments.repeats} repeats")
    for what, (seconds, spread) in rows.items():
        print(f"{what:<26} {seconds:8.2f} s   spread {spread:.0%}")
    figures = {what.replace(" ", "_") + "_s": round(seconds, 3) for what, (seconds, _) in rows.items()}
    print(json.dumps({"rows": vector.size, "megabytes": round(megabytes, 1), **figures}))


if __name__ == "__main__":
    main()
