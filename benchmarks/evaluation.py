"""Accuracies by `saap.accuracy` against lm-eval's own evaluation of the same items, model and process, in turn.

    python benchmarks/evaluation.py --data FOLDER           # official data sets; the embedded pack when absent
    python benchmarks/evaluation.py --model FOLDER --limit 50

The other side is `lm_eval.simple_evaluate` with its Hugging Face model, as `lm-eval run --batch_size N` calls it; the
index of tasks that the command line makes first (some seconds) is not counted. Both sides must find the same
accuracies. "Of bound" is the share of our seconds that our matrix products would take, were each as fast as the fastest
one here. Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import clock, embedded, fastest_product_of, operations_of
from torch import nn
from transformers import PreTrainedTokenizerBase

import saap
from saap.evaluation.accuracy import task_file
from tasks.data import data_file

Evaluate = Callable[[str], dict[str, float | None]]  # a benchmark's name → its accuracies


def the_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; the embedded SmolLM2-135M when absent")
    parser.add_argument("--data", default="mini", help="a data folder (docs/data.md)")
    parser.add_argument("--benchmarks", nargs="+", default=list(saap.ACCURACY), choices=saap.ACCURACY)
    parser.add_argument("--limit", type=int, default=16, help="items a benchmark")
    parser.add_argument("--batch-size", type=int, default=16, help="of lm-eval's side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


def stock(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    files: dict[str, Path],
    arguments: argparse.Namespace,
    work: Path,
) -> Evaluate:
    """lm-eval's own evaluation, of tasks written to `work`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    specs = {benchmark: str(task_file(work, benchmark, file)) for benchmark, file in files.items()}
    tasks = TaskManager(include_defaults=False)

    def evaluate(benchmark: str) -> dict[str, float | None]:
        lm = HFLM(model, tokenizer=tokenizer, batch_size=arguments.batch_size, softmax_dtype="float32")
        found = simple_evaluate(lm, tasks=[specs[benchmark]], limit=arguments.limit, task_manager=tasks)
        return {metric: found["results"][benchmark].get(f"{metric},none") for metric in ("acc", "acc_norm")}

    return evaluate


def ours(model: nn.Module, tokenizer: PreTrainedTokenizerBase, files: dict[str, Path], limit: int) -> Evaluate:
    """`saap.accuracy` of the same items."""

    def evaluate(benchmark: str) -> dict[str, float | None]:
        found, _ = saap.accuracy(model, tokenizer, benchmark, data_file=files[benchmark], limit=limit)
        return dict.fromkeys(("acc", "acc_norm")) | {metric.metric: metric.value for metric in found}

    return evaluate


def timed(sides: dict[str, Evaluate], benchmark: str, rounds: int, device: str) -> tuple[dict[str, list[float]], bool]:
    """The seconds of each side, in turn, and whether both found the same accuracies."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    results = {}
    for _ in range(rounds):
        for side, evaluate in sides.items():
            start = clock(device)
            results[side] = evaluate(benchmark)
            seconds[side].append(clock(device) - start)
    return seconds, results["lm-eval"] == results["ours"]


def compare(sides: dict[str, Evaluate], model: nn.Module, arguments: argparse.Namespace) -> dict[str, float]:
    """Prints a line a benchmark and one of all; the figures of the last line."""
    print("benchmark        lm-eval     ours  ratio  spread  equal")
    figures: dict[str, float] = {}
    total = {"lm-eval": 0.0, "ours": 0.0}
    operations, speed = 0, 0.0
    for benchmark in dict.fromkeys(arguments.benchmarks):
        seconds, equal = timed(sides, benchmark, arguments.rounds, arguments.device)
        operations += operations_of(lambda name=benchmark: sides["ours"](name))  # type: ignore[misc]
        # again and again: other work on the machine disturbs it
        speed = max(speed, fastest_product_of(model))
        ratios = np.array(seconds["lm-eval"]) / seconds["ours"]
        medians = {side: float(np.median(values)) for side, values in seconds.items()}
        for side, median in medians.items():
            total[side] += median
        figures[f"{benchmark}_ratio"] = round(float(np.median(ratios)), 2)
        print(
            f"{benchmark:<14} {medians['lm-eval']:8.2f} s {medians['ours']:6.2f} s {np.median(ratios):5.2f}× "
            f"{np.ptp(ratios) / np.median(ratios):6.0%}  {equal}"
        )
        figures[f"{benchmark}_equal"] = equal
    figures["ratio"] = round(total["lm-eval"] / total["ours"], 2)
    print(f"all            {total['lm-eval']:8.2f} s {total['ours']:6.2f} s {figures['ratio']:5.2f}×")
    figures["of_bound"] = round(operations / speed / total["ours"], 3)
    print(
        f"ours: {operations / 1e9:.0f} GFLOP, the fastest product {speed / 1e9:.0f} a second, "
        f"{figures['of_bound']:.0%} of bound"
    )
    return figures


def main() -> None:
    arguments = the_arguments()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = arguments.model or embedded(work / "model")
        model = saap.load(folder, dtype=arguments.dtype, device=arguments.device)
        tokenizer = saap.load_tokenizer(folder)
        files = {benchmark: data_file(arguments.data, benchmark) for benchmark in arguments.benchmarks}
        sides = {
            "lm-eval": stock(model, tokenizer, files, arguments, work),
            "ours": ours(model, tokenizer, files, arguments.limit),
        }
        print(
            f"{arguments.limit} items a benchmark, {arguments.dtype}, {arguments.device}, "
            f"{torch.get_num_threads()} threads, {arguments.rounds} rounds; "
            f"lm-eval at batch size {arguments.batch_size}"
        )
        figures = compare(sides, model, arguments)
    print(json.dumps({"device": arguments.device, "threads": torch.get_num_threads(), **figures}))


if __name__ == "__main__":
    main()
