"""Accuracies by `saap.accuracy` against lm-eval's own evaluation of the same items, model and process, in turn.

    python benchmarks/evaluation.py --data FOLDER           # official data sets; the embedded pack when absent
    python benchmarks/evaluation.py --model FOLDER --limit 50

The other side is `lm_eval.simple_evaluate` with its Hugging Face model, as `lm-eval run --batch_size N` calls it; the
index of tasks that the command line makes first (some seconds) is not counted. Both sides must find the same
accuracies. Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import embedded

import saap
from saap.evaluation.accuracy import task_file
from tasks.data import data_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; the embedded SmolLM2-135M when absent")
    parser.add_argument("--data", default="mini", help="a data folder (docs/data.md)")
    parser.add_argument("--benchmarks", nargs="+", default=list(saap.ACCURACY), choices=saap.ACCURACY)
    parser.add_argument("--limit", type=int, default=16, help="items a benchmark")
    parser.add_argument("--batch-size", type=int, default=16, help="of lm-eval's side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = arguments.model or embedded(work / "model")
        model = saap.load(folder, dtype=arguments.dtype, device=arguments.device)
        tokenizer = saap.load_tokenizer(folder)
        files = {benchmark: data_file(arguments.data, benchmark) for benchmark in arguments.benchmarks}
        specs = {benchmark: str(task_file(work, benchmark, files[benchmark])) for benchmark in files}
        tasks = TaskManager(include_defaults=False)

        def stock(benchmark: str) -> dict[str, float]:
            lm = HFLM(model, tokenizer=tokenizer, batch_size=arguments.batch_size, softmax_dtype="float32")
            found = simple_evaluate(lm, tasks=[specs[benchmark]], limit=arguments.limit, task_manager=tasks)
            return {metric: found["results"][benchmark].get(f"{metric},none") for metric in ("acc", "acc_norm")}

        def ours(benchmark: str) -> dict[str, float]:
            found, _ = saap.accuracy(model, tokenizer, benchmark, data_file=files[benchmark], limit=arguments.limit)
            return dict.fromkeys(("acc", "acc_norm")) | {metric.metric: metric.value for metric in found}

        print(
            f"{arguments.limit} items a benchmark, {arguments.dtype}, {arguments.device}, "
            f"{torch.get_num_threads()} threads, {arguments.rounds} rounds; "
            f"lm-eval at batch size {arguments.batch_size}"
        )
        print("benchmark        lm-eval     ours  ratio  spread  equal")
        # with one thread on a CPU the processor's time, so that other work on the machine does not count
        alone = torch.get_num_threads() == 1 and arguments.device == "cpu"
        clock = time.process_time if alone else time.perf_counter
        figures: dict[str, float] = {}
        total = {"lm-eval": 0.0, "ours": 0.0}
        for benchmark in files:
            seconds: dict[str, list[float]] = {"lm-eval": [], "ours": []}
            results = {}
            for _ in range(arguments.rounds):
                for side, evaluate in (("lm-eval", stock), ("ours", ours)):
                    start = clock()
                    results[side] = evaluate(benchmark)
                    seconds[side].append(clock() - start)
            ratios = np.array(seconds["lm-eval"]) / seconds["ours"]
            medians = {side: float(np.median(values)) for side, values in seconds.items()}
            for side, median in medians.items():
                total[side] += median
            equal = results["lm-eval"] == results["ours"]
            figures[f"{benchmark}_ratio"] = round(float(np.median(ratios)), 2)
            print(
                f"{benchmark:<14} {medians['lm-eval']:8.2f} s {medians['ours']:6.2f} s {np.median(ratios):5.2f}× "
                f"{np.ptp(ratios) / np.median(ratios):6.0%}  {equal}"
            )
            figures[f"{benchmark}_equal"] = equal
    figures["ratio"] = round(total["lm-eval"] / total["ours"], 2)
    print(f"all            {total['lm-eval']:8.2f} s {total['ours']:6.2f} s {figures['ratio']:5.2f}×")
    print(json.dumps({"device": arguments.device, "threads": torch.get_num_threads(), **figures}))


if __name__ == "__main__":
    main()
