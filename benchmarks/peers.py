"""Against the peers, side by side in one run: evaluation, scoring, training, and the ranking of `saap_plus`.

    python benchmarks/peers.py                     # all four; half an hour on two idle cores
    python benchmarks/peers.py --only ranking --samples 8

evaluation  `saap.accuracy` of the seven tasks against `lm_eval.simple_evaluate` (PyPI), at equal numbers.
scoring     `saap.score` against three forward passes made with the faster float32 product this processor has, and
            against one backward pass of autograd a sample (plain torch).
training    a step of `Groupwise` against one of QLoRA by peft and bitsandbytes (PyPI): speed, and peak memory.
ranking     mask Fisher, ranking with its cuts, and the refit of `saap_plus` at 0.5, against LLM-Pruner's importance
            pass as its code makes it (plain torch): a backward pass of autograd a sample with the gradients of all
            weights, their squares added up, and the sums over the groups of |W·g − ½·W²·h|.

Prints a line a part and, as its last line, one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import embedded, last_line, processor
from torch import nn

import saap
from saap.evaluation.speed import in_turn
from saap.models.groups import group_matrices
from saap.models.products import FastLinears
from tasks.config import RunConfig

Figures = dict[str, Any]


def evaluation(arguments: argparse.Namespace) -> Figures:
    import evaluation

    limit = ["--data", arguments.data, "--limit", str(arguments.items), "--rounds", str(arguments.rounds)]
    found = last_line(evaluation.main, limit)
    equal = [value for name, value in found.items() if name.endswith("_equal")]
    return {
        "evaluation_over_lm_eval": found["ratio"],
        "evaluation_equal": all(equal),
        "evaluation_of_bound": found["of_bound"],
    }


def scoring(arguments: argparse.Namespace) -> Figures:
    import scoring

    plain = scoring.forward

    def fast_forward(model: nn.Module, tokens: torch.Tensor) -> None:
        with FastLinears():
            plain(model, tokens)

    scoring.forward = fast_forward
    found = last_line(scoring.main, ["--samples", str(arguments.samples), "--rounds", str(arguments.rounds)])
    return {
        "scoring_over_three_forwards": found["floor_ratio"],
        "scoring_of_bound": found["of_bound"],
        "scoring_over_autograd": found["time_ratio"],
        "scoring_peak_above_weights": found["peak_above_weights_ratio"],
        "scoring_error": found["max_relative_error"],
        "scoring_median_error": found["median_relative_error"],
    }


def training(arguments: argparse.Namespace) -> Figures:
    import recovery

    found = last_line(recovery.main, ["--recipes", "groupwise", "plain_qlora", "--repeats", str(arguments.rounds)])
    peaks = found["peak_bytes"]
    return {
        "groupwise_of_bound": found["of_bound"]["groupwise"],
        "groupwise_over_qlora": found["groupwise_over_plain_qlora_speed"],
        "groupwise_peak_over_qlora": round(peaks["groupwise"] / peaks["plain_qlora"], 3),
    }


def ranking(arguments: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        model = saap.load(embedded(Path(folder)))
    tokens = torch.randint(
        0, model.config.vocab_size, (arguments.samples, 128), generator=torch.Generator().manual_seed(0)
    )
    sides = {
        "ours": seconds_of(lambda: saap_plus_at_half(model, tokens)),
        "llm_pruner": seconds_of(lambda: llm_pruner_importance(model, tokens)),
    }
    taken = in_turn(sides, arguments.rounds, 0, "rounds")
    ratio = sorted(theirs / ours for ours, theirs in zip(taken["ours"], taken["llm_pruner"], strict=True))
    return {
        "ranking_over_llm_pruner": round(ratio[len(ratio) // 2], 3),
        "ranking_seconds": {side: round(min(seconds), 2) for side, seconds in taken.items()},
    }


def saap_plus_at_half(model: nn.Module, tokens: torch.Tensor) -> nn.Module:
    """From the Fisher information to the refitted model, with heads in one order and a ridge of 1."""
    ratio = 0.5
    cuts = [cut for cut in RunConfig().criterion.cuts if cut < ratio]
    score = saap.CRITERIA["saap_plus"](model, saap.mask_fisher(model, tokens), tokens, cuts)
    keep = saap.select(score, saap.discover(model), ratio, search="global")
    return saap.refit(saap.prune(model, keep), model, keep, tokens)


def llm_pruner_importance(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Σ |W·g − ½·W²·h| of each row or column of each matrix: g the mean gradient, h the mean of its squares."""
    model.requires_grad_(True)
    parameters = list(model.parameters())
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for ids in tokens[:, None]:
        model(ids, labels=ids, use_cache=False).loss.backward()
        for parameter, square, summed in zip(parameters, squares, total, strict=True):
            assert parameter.grad is not None
            square.addcmul_(parameter.grad, parameter.grad)
            summed.add_(parameter.grad)
        model.zero_grad()
    model.requires_grad_(False)
    number = {id(parameter): n for n, parameter in enumerate(parameters)}
    found = []
    for *_, part, linear in group_matrices(model):
        n, weight = number[id(linear.weight)], linear.weight.detach()
        mixed = weight * total[n] / len(tokens) - 0.5 * weight.square() * squares[n] / len(tokens)
        found.append(mixed.abs().sum(1 - part.axis))
    return found


def seconds_of(action: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return timed


PARTS = {"evaluation": evaluation, "scoring": scoring, "training": training, "ranking": ranking}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", default="mini", help="a data folder (docs/data.md), for the evaluation")
    parser.add_argument("--items", type=int, default=36, help="items a benchmark of the evaluation")
    parser.add_argument("--samples", type=int, default=50, help="of 128 tokens, for scoring and ranking")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(processor())
    figures: Figures = {}
    for part in arguments.only:
        found = PARTS[part](arguments)
        print(part, json.dumps(found), flush=True)
        figures |= found
    print(json.dumps({**figures, "machine": processor()}))


if __name__ == "__main__":
    main()
