"""Zero-shot accuracies through lm-eval's stock tasks, on the hub's data or on files in the official layout."""

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from saap.errors import DataUnavailable, SaapError
from saap.texts import read_rows


@dataclass(frozen=True)
class Benchmark:
    """The metric in the papers' column, the columns its data must have, and the folder of its stock task in lm-eval."""

    papers: str
    columns: tuple[str, ...]
    folder: str


ACCURACY = {
    "arc_easy": Benchmark("acc", ("question", "choices", "answerKey"), "arc"),
    "arc_challenge": Benchmark("acc_norm", ("question", "choices", "answerKey"), "arc"),
    "boolq": Benchmark("acc", ("question", "passage", "label"), "super_glue/boolq"),
    "hellaswag": Benchmark("acc_norm", ("activity_label", "ctx_a", "ctx_b", "endings", "label"), "hellaswag"),
    "piqa": Benchmark("acc", ("goal", "sol1", "sol2", "label"), "piqa"),
    "winogrande": Benchmark("acc", ("sentence", "option1", "option2", "answer"), "winogrande"),
    "openbookqa": Benchmark("acc_norm", ("question_stem", "choices", "answerKey"), "openbookqa"),
}


@dataclass(frozen=True)
class Metric:
    """One number of one benchmark; `papers` marks the metric that the papers' tables show.

    stderr: NaN for a single item.
    items: 0 or 1 for each of the n items, in the order of the data; value is their mean.
    """

    metric: str
    value: float
    stderr: float
    n: int
    protocol: str
    harness: str
    task_version: str
    papers: bool
    items: list[float]


def accuracy(
    model: nn.Module,
    tokenizer: Any,
    benchmark: str,
    *,
    data_file: str | Path | None = None,
    limit: int | None = None,
    batch_tokens: int = 1024,
) -> tuple[list[Metric], dict[str, Any]]:
    """acc (and acc_norm where the task has it) of one of `ACCURACY`, and lm-eval's own results as it gives them.

    data_file: .parquet or .jsonl with the split's rows in the data set's official columns; None downloads what is the
    newest on the hub. For a fixed commit give a file that you downloaded at that commit, as the pipeline does.
    limit: the first so many items only. The results hold lm-eval's per-sample logs under "samples".
    Raises SaapError for an unknown benchmark or unusable data, DataUnavailable when a download fails.
    """
    from lm_eval import simple_evaluate

    from saap.evaluation.harness import SharedQuestionLM

    if benchmark not in ACCURACY:
        raise SaapError(f"unknown benchmark '{benchmark}'; known: {', '.join(ACCURACY)}")
    about = ACCURACY[benchmark]
    if data_file is not None:
        read_rows(data_file, about.columns)
    _quieten()
    lm = SharedQuestionLM(model, tokenizer, batch_tokens)
    with tempfile.TemporaryDirectory() as folder, _downloading(benchmark, data_file is None):
        spec = benchmark if data_file is None else str(task_file(Path(folder), benchmark, Path(data_file)))
        # the bootstrap only serves metrics without a closed-form standard error, and these all have one
        results = simple_evaluate(lm, tasks=[spec], limit=limit, task_manager=_task_manager(), bootstrap_iters=100)
    found = results["results"][benchmark]
    samples = sorted(results["samples"][benchmark], key=lambda sample: sample["doc_id"])
    harness, task_version = f"lm-eval {version('lm-eval')}", str(results["versions"][benchmark])
    metrics = [
        Metric(
            metric=name,
            value=float(found[f"{name},none"]),
            stderr=_number(found[f"{name}_stderr,none"]),
            n=results["n-samples"][benchmark]["effective"],
            protocol=f"{harness} task v{task_version}, 0-shot" + (f", first {limit}" if limit else ""),
            harness=harness,
            task_version=task_version,
            papers=name == about.papers,
            items=[float(sample[name]) for sample in samples],
        )
        for name in ("acc", "acc_norm")
        if f"{name},none" in found
    ]
    return metrics, json.loads(json.dumps(results, default=str))


def _number(value: Any) -> float:
    return math.nan if value == "N/A" else float(value)


@lru_cache(maxsize=1)
def _quieten() -> None:
    """Let lm-eval look at the machine once, for which it starts ten programs a result, ask no git and draw no bar.

    git, which is asked about the user's folder, would complain on the screen outside a repository.
    """
    from lm_eval import evaluator
    from lm_eval.api import task
    from torch.utils import collect_env

    evaluator.get_git_commit_hash = lambda: None
    task.tqdm = lambda docs, **_: docs
    collect_env.get_pretty_env_info = lru_cache(maxsize=1)(collect_env.get_pretty_env_info)


@contextlib.contextmanager
def _downloading(benchmark: str, from_hub: bool) -> Iterator[None]:
    from huggingface_hub.errors import HTTPError  # of the client that this version of huggingface_hub has

    try:
        yield
    except (OSError, HTTPError) as error:
        if (
            not from_hub or getattr(error, "errno", None) is not None
        ):  # an errno: of this machine's disk, not of the hub
            raise
        raise DataUnavailable(
            f"cannot download {benchmark} from the hub ({type(error).__name__}): check the network, or put its file "
            "into a data folder"
        ) from error


@lru_cache(maxsize=1)
def _task_manager() -> Any:
    import lm_eval.tasks

    stock = Path(lm_eval.tasks.__file__).parent
    # indexing all of lm-eval's tasks takes eight seconds, these six folders none
    folders = sorted({str(stock / about.folder) for about in ACCURACY.values()})
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)


def task_file(folder: Path, benchmark: str, data_file: Path) -> Path:
    """`<folder>/<benchmark>.yaml`: the stock task with only the place of its data changed, by lm-eval's `include`.

    `lm-eval run --include_path <folder> --tasks <benchmark>` runs the same.
    """
    stock = _task_manager().task_index[benchmark].yaml_path
    # the stock tasks name further splits; zero-shot runs never read them
    files = {name: str(data_file.resolve()) for name in ("train", "validation", "test")}
    overrides = {
        "include": str(stock),
        "task": benchmark,
        "dataset_path": "parquet" if data_file.suffix == ".parquet" else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
    }
    file = folder / f"{benchmark}.yaml"
    file.write_text(json.dumps(overrides))  # JSON is YAML
    return file
