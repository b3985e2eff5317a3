"""One benchmark on one checkpoint."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from storage.tables import write_table
from tasks.compute import checkpoint, settings
from tasks.config import ACCURACIES
from tasks.data import DATA, MissingData, data_file, data_name, read_data
from tasks.stage import stage_task
from tasks.step import Step

PAPERS_WINDOW = 128


@stage_task("evaluate")
def evaluate(step: Step, folder: Path) -> dict[str, Any]:
    benchmark, data = step.config()["benchmark"], step.outside_value("data")
    rows = _accuracies(step, folder) if benchmark in ACCURACIES else _perplexities(step)
    for row in rows:
        row |= {"benchmark": benchmark, "data": data_name(data)}
    write_table(folder, "metrics", rows)
    write_table(
        folder, "items", [{**row, "item": i, "value": value} for row in rows for i, value in enumerate(row["items"])]
    )
    return {f"{row['metric']} ({row['protocol']})": round(row["value"], 4) for row in rows}


def _accuracies(step: Step, folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics; lm-eval's own results, and its per-sample logs if they are wanted, go into the folder."""
    import saap

    config, benchmark = step.config(), step.config()["benchmark"]
    model, tokenizer = checkpoint(step, "checkpoint", float_weights=True)
    try:
        metrics, results = saap.accuracy(
            model,
            tokenizer,
            benchmark,
            data_file=data_file(step.outside_value("data"), benchmark),
            limit=config["limit"],
            batch_tokens=128 * settings(step)["batch_size"],
        )
    except saap.DataUnavailable as error:
        raise MissingData(str(error)) from error.__cause__
    samples = results.pop("samples")[benchmark]
    (folder / "lm_eval.json").write_text(json.dumps(results, indent=1))
    if config["samples"]:
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return [asdict(metric) for metric in metrics]


def _perplexities(step: Step) -> list[dict[str, Any]]:
    """Rows of metrics: one for each window length that the model's positions allow."""
    import saap

    config, benchmark = step.config(), step.config()["benchmark"]
    model, tokenizer = checkpoint(step, "checkpoint", float_weights=True)
    column = DATA[benchmark].columns[0]
    text = [row[column] for row in read_data(step.outside_value("data"), benchmark)]
    longest = getattr(model.config, "max_position_embeddings", None)  # ALiBi models have no limit
    limited = f", first {config['max_tokens']} tokens" if config["max_tokens"] else ""
    rows = []
    for window in config["windows"]:
        if longest is not None and window > longest:
            continue
        found = saap.perplexity(
            model,
            text,
            tokenizer,
            window=window,
            max_tokens=config["max_tokens"],
            batch_tokens=256 * settings(step)["batch_size"],
            name=benchmark,
        )
        rows.append(
            {
                **asdict(found),
                "metric": "perplexity",
                "protocol": f"{DATA[benchmark].place}, windows of {window}{limited}",
                "harness": None,
                "task_version": None,
                "papers": window == PAPERS_WINDOW,
            }
        )
    return rows
