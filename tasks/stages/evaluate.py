"""One benchmark on one checkpoint."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from storage.keys import digest
from storage.tables import write_table
from tasks.artifact import Artifact, Source
from tasks.compute import compute_settings
from tasks.config import ACCURACIES, RunConfig
from tasks.data import DATA, benchmark_file, data_name, read_data
from tasks.inputs import Checkpoint, Data, load_model, load_tokenizer
from tasks.outside import Outside
from tasks.stage import Summary, dtype_of, stage
from tasks.step import Step

PAPERS_WINDOW = 128


class Metrics(Artifact):
    """metrics.parquet and items.parquet; of accuracies also lm-eval's own results."""


def _params(config: RunConfig, benchmark: str) -> dict[str, Any]:
    options, params = config.evaluate, {"benchmark": benchmark, **dtype_of(config)}
    if benchmark in ACCURACIES:
        return params | {"limit": options.limit, "samples": options.samples, "harness": version("lm-eval")}
    return params | {"windows": list(options.windows), "max_tokens": options.max_tokens, "bos": options.bos}


def _fingerprint(outside: Outside, inputs: Mapping[str, Source], benchmark: str) -> str:
    data = None if outside.missing(benchmark) else outside.data(benchmark)
    model = outside.model  # as a folder, its tokenizer comes from outside as well
    return digest([model.weights, model.tokenizer, data] if inputs["checkpoint"].path else [None, data])


@stage(version=4, publishes=Metrics, params=_params, fingerprint=_fingerprint)
def evaluate(step: Step, folder: Path, *, checkpoint: Checkpoint, data: Data) -> Summary:
    benchmark = step.config()["benchmark"]
    measured = (
        _accuracies(step, folder, checkpoint, data)
        if benchmark in ACCURACIES
        else _perplexities(step, checkpoint, data)
    )
    rows = [{**row, "benchmark": benchmark, "data": data_name(data.name)} for row in measured]
    write_table(folder, "metrics", rows)
    write_table(
        folder, "items", [{**row, "item": i, "value": value} for row in rows for i, value in enumerate(row["items"])]
    )
    return {f"{row['metric']} ({row['protocol']})": round(row["value"], 4) for row in rows}


def _accuracies(step: Step, folder: Path, checkpoint: Checkpoint, data: Data) -> list[dict[str, Any]]:
    """Rows of metrics; lm-eval's own results, and its per-sample logs if they are wanted, go into the folder."""
    import saap

    config, benchmark = step.config(), step.config()["benchmark"]
    model = load_model(step, checkpoint, float_weights=True)
    with benchmark_file(data.name, benchmark) as file:
        metrics, results = saap.accuracy(
            model,
            load_tokenizer(step),
            benchmark,
            data_file=file,
            limit=config["limit"],
            batch_tokens=128 * compute_settings(step)["batch_size"],
        )
    samples = results.pop("samples")[benchmark]
    (folder / "lm_eval.json").write_text(json.dumps(results, indent=1))
    if config["samples"]:
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return [asdict(metric) for metric in metrics]


def _perplexities(step: Step, checkpoint: Checkpoint, data: Data) -> list[dict[str, Any]]:
    """Rows of metrics: one for each window length that the model's positions and the text allow.

    Raises TooShort where that is none.
    """
    import saap
    from saap.errors import SaapError, TooShort
    from saap.evaluation.perplexity import window_bos

    config, benchmark = step.config(), step.config()["benchmark"]
    model = load_model(step, checkpoint, float_weights=True)
    column = DATA[benchmark].columns[0]
    text = [row[column] for row in read_data(data.name, benchmark)]
    tokenizer = load_tokenizer(step)
    bos = window_bos(model, tokenizer, config["bos"])
    before = "no BOS" if bos is None else "BOS before each"
    longest = getattr(model.config, "max_position_embeddings", None)  # ALiBi models have no limit
    limited = f", first {config['max_tokens']} tokens" if config["max_tokens"] else ""
    rows: list[dict[str, Any]] = []
    short: TooShort | None = None
    for window in config["windows"]:
        if longest is not None and window + (bos is not None) > longest:
            if window <= longest:  # a place short of what the model allows
                log = logging.getLogger("saap")
                log.warning("windows of %d are not measured: a BOS before each is beyond %d positions", window, longest)
            continue
        try:
            found = saap.perplexity(
                model,
                text,
                tokenizer,
                window=window,
                max_tokens=config["max_tokens"],
                batch_tokens=256 * compute_settings(step)["batch_size"],
                bos=bos,
                name=benchmark,
            )
        except TooShort as error:
            logging.getLogger("saap").warning("%s is not measured in windows of %d: %s", benchmark, window, error)
            short = error
            continue
        rows.append(
            {
                **asdict(found),
                "metric": "perplexity",
                "protocol": f"{DATA[benchmark].place}, windows of {window}, {before}{limited}",
                "harness": None,
                "task_version": None,
                "papers": window == PAPERS_WINDOW,
            }
        )
    if short is not None and not rows:
        raise short
    if not rows:
        raise SaapError(
            f"no window of evaluate.windows = {config['windows']} fits the model's {longest} positions"
            f"{' behind a BOS' if bos is not None else ''}: name a shorter one"
        )
    return rows
