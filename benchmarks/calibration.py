"""Drawing calibration sequences from a set as large as BookCorpus: what is drawn is read, against reading all of it.

    python benchmarks/calibration.py                 # makes 9 GB of Parquet in a temporary folder; two minutes
    python benchmarks/calibration.py --rows 5000000

The set is of random sentences, one a row, in row groups of 1,000 rows and of a million (what a writer makes of it by
default). Reading all of it, as before, is measured on 5 million rows, in turn with drawing from the same file. Each
measurement is a process of its own, which imports of saap what the calibrate stage does: seconds from opening the file
to the last sequence, and those the processor worked, which other work on the machine disturbs less; the most memory
held while drawing beyond what the libraries take, and that of the whole process, torch and transformers included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

COUNT, LENGTH = 50, 128
GROUPS = (1 << 20, 1000)  # rows in a row group
WORDS = 5000


def make(file: Path, rows: int, group: int) -> None:
    """Write sentences of 5 to 19 random words, drawn from 200,000."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    words = [f"{'abcdefghijklmnopqrst'[i % 20]}{i}" for i in range(WORDS)]
    pool = pa.array([" ".join(words[w] for w in rng.integers(0, WORDS, n)) for n in rng.integers(5, 20, 200_000)])
    with pq.ParquetWriter(file, pa.schema([("text", pa.string())])) as writer:
        for begin in range(0, rows, 1 << 20):
            numbers = rng.integers(0, len(pool), min(1 << 20, rows - begin))
            writer.write_table(pa.table({"text": pool.take(pa.array(numbers))}), row_group_size=group)
    os.sync()  # or the disk is still busy with it while the first one reads


def make_tokenizer(folder: Path) -> None:
    """Write one that cuts at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>").save_pretrained(folder)


def measure(way: str, file: Path, seed: int) -> dict[str, Any]:
    """Draw in this process. way: 'drawn', or 'all' for every row as a dict first."""
    from common import held, most_held

    from saap import ParquetTexts, load_tokenizer, sample_tokens

    words = load_tokenizer(file.parent)
    words("warm up")
    found: dict[str, Any] = {}

    def draw() -> None:
        began, worked = time.perf_counter(), time.process_time()
        if way == "drawn":
            texts: Any = ParquetTexts.of_files([file])
        else:
            texts = read_everything(file)
            np.random.default_rng(seed).permutation(len(texts))
        _, rows = sample_tokens(texts, words, count=COUNT, length=LENGTH, seed=seed)
        seconds, cpu = time.perf_counter() - began, time.process_time() - worked
        found.update(seconds=seconds, cpu_seconds=cpu, rows=rows.tolist())

    before = held("cpu")
    peak = most_held(draw, "cpu")
    return {**found, "peak_mb": (peak - before) / 2**20, "process_mb": peak / 2**20}


def read_everything(file: Path) -> list[str]:
    """The earlier way: each row a dict, then one dict with the wanted column only."""
    import pyarrow.parquet as pq

    rows = pq.read_table(file).to_pylist()
    for row in rows:
        assert not [column for column in ("text",) if not isinstance(row, dict) or column not in row]
    rows = [{column: row[column] for column in ("text",)} for row in rows]
    return [row["text"] for row in rows]


def apart(way: str, file: Path, seed: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", way, str(file), str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def middle(found: list[dict[str, Any]], field: str) -> float:
    return statistics.median(one[field] for one in found)


def report(name: str, found: list[dict[str, Any]]) -> None:
    seconds = [one["seconds"] for one in found]
    spread = (max(seconds) - min(seconds)) / statistics.median(seconds)
    memory = " | ".join(f"{middle(found, field):.0f}" for field in ("peak_mb", "process_mb"))
    print(
        f"| {name} | {middle(found, 'seconds'):.2f} | {spread:.0%} | {middle(found, 'cpu_seconds'):.2f} | {memory} |",
        flush=True,
    )


def compare(file: Path, rows: int, group: int, rounds: int) -> dict[str, float]:
    """Draw from a set and read all of it, in turn: how many times longer and larger reading all is."""
    make(file, rows, group)
    drawn, everything = [], []
    for seed in range(rounds):
        drawn.append(apart("drawn", file, seed))
        everything.append(apart("all", file, seed))
    report(f"{rows:,} rows in groups of {group:,}, drawn", drawn)
    report(f"{rows:,} rows in groups of {group:,}, all read", everything)
    pairs = list(zip(drawn, everything, strict=True))
    ratios = {
        name: statistics.median(whole[field] / one[field] for one, whole in pairs)
        for name, field in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds"), ("memory_ratio", "peak_mb"))
    }
    return {name: round(ratio, 1) for name, ratio in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=74_004_228, help="of the large set; BookCorpus has 74,004,228")
    parser.add_argument("--compared", type=int, default=5_000_000, help="rows of the set that is read whole too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, file, seed = options.measure
        print(json.dumps(measure(way, Path(file), int(seed))))
        return
    large = []
    print("| | seconds | spread | CPU seconds | MB for drawing | MB in all |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.parquet"
        make_tokenizer(file.parent)
        for group in GROUPS:
            make(file, options.rows, group)
            found = [apart("drawn", file, seed) for seed in range(options.rounds)]
            report(f"{options.rows:,} rows in groups of {group:,}, drawn", found)
            large.append(found)
        assert [one["rows"] for one in large[0]] == [one["rows"] for one in large[1]], "the row groups are seen"
        ratios = {group: compare(file, options.compared, group, options.rounds) for group in GROUPS}
    print(
        json.dumps(
            {
                "rows": options.rows,
                "seconds": round(max(middle(found, "seconds") for found in large), 2),
                "cpu_seconds": round(max(middle(found, "cpu_seconds") for found in large), 2),
                "peak_mb": round(max(middle(found, "peak_mb") for found in large)),
                "process_mb": round(max(middle(found, "process_mb") for found in large)),
                **{f"{name}_to_read_all": {g: ratios[g][name] for g in GROUPS} for name in ratios[GROUPS[0]]},
                "rounds": options.rounds,
            }
        )
    )


if __name__ == "__main__":
    main()
