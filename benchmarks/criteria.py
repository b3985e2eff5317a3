"""Criteria and compensations on text that is neither calibration nor test: what choices in saap_plus were made by.

    python benchmarks/criteria.py --data FOLDER                     # a data folder (docs/data.md); about 20 minutes
    python benchmarks/criteria.py --data FOLDER --criteria saap_plus: saap_plus:0.25 --compensation least_squares

Calibration is drawn from the first three quarters of the novels; perplexities are on windows of the last quarter, and
of Alpaca's instructions and answers. The figure that counts is their geometric mean. `saap_plus:0.1,0.2` ranks again
after cuts of 0.1 and 0.2, `saap_plus:` ranks once, `saap_plus` has the defaults. Prints a table and, as its last line,
one JSON object.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import embedded, where
from torch.nn import functional as F

import saap
from saap.pruning.plan import PROTECTED
from tasks.config import Criterion
from tasks.criteria import NEEDS, SAAP
from tasks.data import read_data


def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Of tokens int64 (windows, length), each window on its own."""
    losses = []
    with torch.no_grad():
        for batch in windows.to(model.device).split(8):
            logits = model(batch, use_cache=False).logits[:, :-1].float()
            losses.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item() * len(batch))
    return math.exp(sum(losses) / len(windows))


def statistics_of(model: Any, tokens: torch.Tensor, seed: int) -> Callable[[str], Any]:
    """A criterion's argument by its name, computed on first use."""
    makers: dict[str, Callable[[], Any]] = {
        "score": lambda: saap.score(model, tokens),
        "gradients": lambda: saap.taylor_sums(model, tokens),
        "activations": lambda: saap.input_moments(model, tokens),
        "fisher": lambda: saap.mask_fisher(model, tokens),
        "tokens": lambda: tokens,
        "seed": lambda: seed,
        "variant": lambda: "param_first",
        "protect": lambda: PROTECTED,
        "align": lambda: 32,
    }
    return cache(lambda name: makers[name]())


def ranking(spec: str, model: Any, ratio: float, known: Callable[[str], Any]) -> np.ndarray:
    """The score of each group; spec: a criterion's name, and for saap_plus the cuts it ranks again after."""
    name, colon, cuts = spec.partition(":")
    if name == "saap":
        groups = saap.discover(model)
        fused, *_ = saap.fuse(*known("score"), groups)
        return saap.asi(saap.fluctuation(fused, saap.weight_norms(model)), groups)
    chosen = [float(cut) for cut in cuts.split(",") if cut] if colon else Criterion().cuts
    needs = (*NEEDS[name].statistics, *NEEDS[name].options)
    given = {need: [c for c in chosen if c < ratio] if need == "cuts" else known(need) for need in needs}
    return saap.CRITERIA[name](model, **given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; the embedded SmolLM2-135M when absent")
    parser.add_argument("--data", required=True, help="a data folder (docs/data.md), or hub")
    parser.add_argument("--criteria", nargs="+", default=["saap", "wanda_sp", "flap", "saap_plus:", "saap_plus"])
    parser.add_argument("--compensation", nargs="+", default=["none", "least_squares"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--ridge", type=float, default=1.0, help="of the refit")
    parser.add_argument("--seed", type=int, default=0, help="which calibration sequences, of 50 × 128 tokens")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of each text")
    parser.add_argument("--length", type=int, default=128, help="tokens of a held-out window")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        source = arguments.model or embedded(Path(folder))
        model = saap.load(source, dtype="bfloat16", device=arguments.device)
        tokenizer = saap.load_tokenizer(source)
    novels = [row["text"] for row in read_data(arguments.data, "calibration")]
    alpaca = ["\n".join(row.values()) + "\n" for row in read_data(arguments.data, "recovery")]
    end = len(novels) * 3 // 4
    tokens, _ = saap.sample_tokens(novels[:end], tokenizer, count=50, length=128, seed=arguments.seed)
    held_out = [
        saap.sample_tokens(texts, tokenizer, count=arguments.windows, length=arguments.length, seed=0)[0]
        for texts in (novels[end:], alpaca)
    ]
    groups, known = saap.discover(model), statistics_of(model, tokens, arguments.seed)

    def measured(label: str, ratio: float, heads: int, lean: Any, seconds: float) -> float:
        found = [perplexity(lean, windows) for windows in held_out]
        mean = math.exp(sum(map(math.log, found)) / 2)
        print(
            f"{label:<40}{ratio:>5g}{heads:>7}{found[0]:>9.1f}{found[1]:>9.1f}{mean:>9.1f}{seconds:>7.0f}", flush=True
        )
        return round(mean, 2)

    windows = f"{arguments.windows} × {arguments.length} tokens of each text"
    print(f"{windows}, ridge {arguments.ridge:g}, bfloat16, {where(arguments.device)}")
    print(f"{'criterion, compensation':<40}ratio  heads   novels   alpaca     mean      s")
    figures = {"dense": measured("dense", 0, 0, model, 0)}
    for ratio in arguments.ratios:
        for spec in arguments.criteria:
            start = time.perf_counter()
            score = ranking(spec, model, ratio, known)
            search = (SAAP if spec == "saap" else NEEDS[spec.partition(":")[0]]).search
            keep = saap.select(score, groups, ratio, search=search)
            ranked = time.perf_counter() - start
            for compensation in arguments.compensation:
                start = time.perf_counter()
                small = saap.prune(model, keep)
                if compensation == "bias":
                    saap.add_mean_bias(small, model, keep, known("activations"))
                elif compensation == "least_squares":
                    saap.refit(small, model, keep, tokens, ridge=arguments.ridge)
                label, heads = f"{spec}, {compensation}", int((~keep & (groups.kind == "attention")).sum())
                took = ranked + time.perf_counter() - start
                figures[f"{label}, {ratio:g}"] = measured(label, ratio, heads, small, took)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
