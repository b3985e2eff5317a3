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
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

import saap
from saap.export.gguf import export_gguf
from saap.export.llama_cpp import LlamaCpp
from storage.keys import Fingerprints
from tasks.sources import DATA, mini_folder, model_source

PROMPT, WINDOW = 32, 256


def checkpoints(folder: Path, ratio: float) -> dict[str, Path]:
    """Stand-ins for a run's dense, pruned and recovered checkpoints, below `folder`."""
    places = {name: folder / name for name in ("dense", "pruned", "recovered")}
    saap.convert_gguf(model_source("smollm2-135m", None, Fingerprints(folder)).path, places["dense"])
    dense, tokenizer = saap.load(places["dense"]), saap.load_tokenizer(places["dense"])
    groups = saap.discover(dense)
    pruned = saap.prune(dense, saap.select(saap.weight_norms(dense) / groups.parameters, groups, ratio))
    saap.save(pruned, places["pruned"], tokenizer)
    saap.save(saap.to_groupwise(pruned, 32), places["recovered"], tokenizer)
    return places


def seconds_a_token(model: LlamaCpp, prompt: list[int], new_tokens: int) -> float:
    model.clear()
    token = int(model.feed(prompt, last_only=True)[0].argmax())
    start = time.perf_counter()
    for _ in range(new_tokens):
        token = int(model.feed([token])[0].argmax())
    return (time.perf_counter() - start) / new_tokens


def perplexities(folder: Path, file: Path, ids: torch.Tensor, threads: int) -> tuple[float, float]:
    """(torch's, llama.cpp's) of the same windows and the same stored weights."""
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
        models, files = {}, {}
        for variant, folder in folders.items():
            files[variant] = work / f"{variant}.gguf"
            export_gguf(folder, files[variant])
            models[variant] = LlamaCpp(files[variant], context=512, threads=arguments.threads)
        rates: dict[str, list[float]] = {variant: [] for variant in models}
        for run in tqdm(range(arguments.runs + 1), desc="decode", unit="run"):
            for variant, model in models.items():
                seconds = seconds_a_token(model, ids[:PROMPT].tolist(), arguments.new_tokens)
                if run:  # the first one warms up
                    rates[variant].append(1 / seconds)
        for model in models.values():
            model.close()
        for variant, found in rates.items():
            low, middle, high = np.percentile(found, [25, 50, 75])
            ratio = np.median(np.array(found) / rates["dense"])
            row = {"variant": variant, "type": "Q4_1" if variant == "recovered" else "F16"}
            row |= {"megabytes": round(files[variant].stat().st_size / 1e6, 1), "tokens_per_s": round(middle, 1)}
            row |= {"spread": round((high - low) / middle, 3), "ratio": round(float(ratio), 2)}
            if arguments.tokens:
                part = ids[: min(arguments.tokens, len(ids)) // WINDOW * WINDOW]
                ours, theirs = perplexities(folders[variant], files[variant], part, arguments.threads)
                row |= {"torch_perplexity": round(ours, 3), "llama_cpp_perplexity": round(theirs, 3)}
            rows.append(row)
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, {arguments.runs} runs")
    print("  ".join(f"{column:>20}" for column in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>20}" for value in row.values()))
    print(json.dumps({"threads": arguments.threads, "new_tokens": arguments.new_tokens, "rows": rows}))


if __name__ == "__main__":
    main()
