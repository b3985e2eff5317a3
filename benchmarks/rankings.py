"""Which groups other threads, processors and dtypes would remove: the table of docs/traps.md.

    python benchmarks/rankings.py                            # the embedded SmolLM2-135M, 4 and 12 samples of 128 tokens
    python benchmarks/rankings.py --model /models/llama      # any local folder of a family we know
    python benchmarks/rankings.py --dtypes                   # the last three rows only: half precision against float32
    python benchmarks/rankings.py --settings "float32" "no oneDNN"

Scores the model once for each setting, each in a process of its own, because torch reads the settings when it starts.
Instruction sets that PyTorch and oneDNN may use stand in for other processors. Prints a table and, as its last line,
one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import embedded, processor

import saap

FEW, MORE = 4, 12  # samples
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
SETTINGS: dict[str, tuple[str, int, dict[str, str]]] = {
    "float32": ("float32", FEW, {}),
    "2 threads": ("float32", FEW, {"OMP_NUM_THREADS": "2"}),
    "4 threads": ("float32", FEW, {"OMP_NUM_THREADS": "4"}),
    "AVX2": ("float32", FEW, AVX2),
    "no vector instructions": ("float32", FEW, {"ATEN_CPU_CAPABILITY": "default"}),
    "no oneDNN": ("float32", FEW, {"NO_ONEDNN": "1"}),  # ours: torch has no variable for it
    "float32, more samples": ("float32", MORE, {}),
    "bfloat16": ("bfloat16", MORE, {}),
    "float16": ("float16", MORE, {}),
}
RATIOS = (0.2, 0.5)
Scores = tuple[np.ndarray, np.ndarray]


def measure(folder: Path, dtype: str, samples: int, file: Path) -> None:
    """In a process of its own: the importances of the model in `folder`, into a file."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.backends.mkldnn.set_flags("NO_ONEDNN" not in os.environ)
    rows = saap.read_rows(Path(__file__).parents[1] / "tasks/mini/bookcorpus_like/passages.jsonl", ("text",))
    tokens, _ = saap.sample_tokens(
        [row["text"] for row in rows], saap.load_tokenizer(folder), count=MORE, length=128, seed=0
    )
    vector, element = saap.score(saap.load(folder, dtype=dtype), tokens[:samples])
    np.savez(file, vector=vector, element=element)


def scores(folder: Path, setting: str) -> Scores:
    dtype, samples, environment = SETTINGS[setting]
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "scores.npz"
        arguments = ["--model", str(folder), "--measure", dtype, str(samples), str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **environment}
        subprocess.run([sys.executable, __file__, *arguments], check=True, env=environment)
        with np.load(file) as found:
            return found["vector"], found["element"]


def removed(found: Scores, groups: saap.Groups, norms: np.ndarray, ratio: float) -> np.ndarray:
    fused, *_ = saap.fuse(*found, groups)
    return ~saap.select(saap.asi(saap.fluctuation(fused, norms), groups), groups, ratio)


def compare(folder: Path, settings: list[str]) -> list[dict[str, object]]:
    model = saap.load(folder)
    groups, norms = saap.discover(model), saap.weight_norms(model)
    rows: list[dict[str, object]] = []
    reference: Scores | None = None
    for setting in settings:
        samples = SETTINGS[setting][1]
        found = scores(folder, setting)
        if setting.startswith("float32"):
            reference = found
        assert reference is not None
        equal = all(np.array_equal(a, b) for a, b in zip(found, reference, strict=True))
        row: dict[str, object] = {"setting": setting, "samples": samples, "bit_equal": equal}
        for ratio in RATIOS:
            mine, theirs = (removed(each, groups, norms, ratio) for each in (found, reference))
            changed = theirs & ~mine
            row |= {f"removed {ratio}": int(theirs.sum()), f"changed {ratio}": int(changed.sum())}
            row[f"heads changed {ratio}"] = int((changed & (groups.kind == "attention")).sum())
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtypes", action="store_true", help="only half precision against float32")
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS], help="only these; a float32 one comes first")
    parser.add_argument("--measure", nargs=3, metavar=("DTYPE", "SAMPLES", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        dtype, samples, file = arguments.measure
        measure(arguments.model, dtype, int(samples), Path(file))
        return
    with tempfile.TemporaryDirectory() as temporary:
        settings = arguments.settings or [*SETTINGS][-3 if arguments.dtypes else 0 :]
        rows = compare(arguments.model or embedded(Path(temporary)), settings)
    print(json.dumps({"machine": processor(), "rows": rows}))


if __name__ == "__main__":
    main()
