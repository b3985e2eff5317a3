"""Dense, pruned and recovered models in llama.cpp: file size, decode speed, and perplexity beside torch's.

    python benchmarks/gguf_speed.py
    python benchmarks/gguf_speed.py --dense FOLDER --pruned FOLDER --recovered FOLDER --threads 2

Without folders: the embedded model, pruned by weight norms to --ratio and quantised without training; that has the
speed and size of a real run, not its quality. All variants decode in turn in this process, on the CPU; ratios are those
of paired runs. The last line is one JSON object.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import embedded
from torch.nn import functional as F
from tqdm.auto import tqdm

import saap
from saap.export.gguf import export_gguf
from saap.export.llama_cpp import LlamaCpp
from saap.export.llama_cpp_speed import llama_cpp_speed
from tasks.data import DATA, mini_folder

PROMPT, WINDOW = 128, 256


def checkpoints(folder: Path, ratio: float) -> dict[str, Path]:
    """Stand-ins for a run's dense, pruned and recovered checkpoints, below `folder`."""
    places = {name: folder / name for name in ("dense", "pruned", "recovered")}
    embedded(places["dense"])
    dense, tokenizer = saap.load(places["dense"]), saap.load_tokenizer(places["dense"])
    groups = saap.discover(dense)
    pruned = saap.prune(dense, saap.select(saap.weight_norms(dense) / groups.parameters, groups, ratio))
    saap.save(pruned, places["pruned"], tokenizer)
    saap.save(saap.to_groupwise(pruned, 32), places["recovered"], tokenizer)
    return places


def perplexities(folder: Path, file: Path, ids: torch.Tensor, threads: int) -> tuple[float, float]:
    """(torch's, llama.cpp's) of the same windows and the same stored weights."""
    export_gguf(folder, file)
    model = saap.dequantize(saap.load(folder))
    losses: dict[str, list[float]] = {"torch": [], "llama.cpp": []}
    with LlamaCpp(file, context=WINDOW, threads=threads) as other, torch.no_grad():
        for window in tqdm(ids.view(-1, WINDOW), desc=f"perplexity of {file.stem}", unit="window"):
            for name, logits in (
                ("torch", model(window[None]).logits[0].float()),
                ("llama.cpp", torch.from_numpy(other.logits(window.tolist()))),
            ):
                losses[name].append(F.cross_entropy(logits[:-1], window[1:]).item())
    return float(np.exp(np.mean(losses["torch"]))), float(np.exp(np.mean(losses["llama.cpp"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dense", "pruned", "recovered"):
        parser.add_argument(f"--{name}", type=Path, help=f"folder of the {name} checkpoint")
    parser.add_argument("--ratio", type=float, default=0.2, help="of the stand-ins")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048, help="of the perplexity; 0: leave it out")
    parser.add_argument("--text", type=Path, default=mini_folder() / f"{DATA['wikitext2'].place}.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        given = {v: getattr(arguments, v) for v in ("dense", "pruned", "recovered")}
        folders = given if all(given.values()) else checkpoints(work, arguments.ratio)
        tokenizer = saap.load_tokenizer(folders["dense"])
        text = "\n\n".join(row["text"] for row in saap.read_rows(arguments.text, ("text",)))
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        sizes = {variant: saap.size_of(saap.load(folder)) for variant, folder in folders.items()}
        tokens = {"prompt_tokens": PROMPT, "new_tokens": arguments.new_tokens}
        for variant, speed in zip(folders, llama_cpp_speed(folders, sizes, **tokens, runs=arguments.runs), strict=True):
            row = {"variant": variant, "type": speed.dtype, "megabytes": round(speed.weight_bytes / 1e6, 1)}
            row |= {"tokens_per_s": round(speed.tokens_per_s, 1), "spread": round(speed.tokens_per_s_spread, 3)}
            row |= {"ratio": round(speed.decode_ratio, 2), "prefill": round(speed.prefill_tokens_per_s, 1)}
            row |= {"prefill_ratio": round(speed.prefill_ratio, 2)}
            if arguments.tokens:
                part = ids[: min(arguments.tokens, len(ids)) // WINDOW * WINDOW]
                ours, theirs = perplexities(folders[variant], work / f"{variant}.gguf", part, arguments.threads)
                row |= {"torch_perplexity": round(ours, 3), "llama_cpp_perplexity": round(theirs, 3)}
            rows.append(row)
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, {arguments.runs} runs")
    print("  ".join(f"{column:>20}" for column in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>20}" for value in row.values()))
    print(json.dumps({"threads": arguments.threads, "new_tokens": arguments.new_tokens, "rows": rows}))


if __name__ == "__main__":
    main()
