"""One benchmark on one checkpoint."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from storage.tables import write_table
from tasks.compute import checkpoint, settings
from tasks.config import ACCURACIES
from tasks.sources import DATA, data_file, data_name, read_data
from tasks.stage import stage_task
from tasks.step import Step

PAPERS_WINDOW = 128


@stage_task("evaluate")
def evaluate(step: Step, folder: Path) -> dict[str, Any]:
    config, benchmark = step.config(), step.config()["benchmark"]
    model, tokenizer = checkpoint(step, "checkpoint", float_weights=True)
    data = step.outside_value("data")
    if benchmark in ACCURACIES:
        rows = _accuracy(model, tokenizer, benchmark, data, config, settings(step)["batch_size"], folder)
    else:
        rows = _perplexity(model, tokenizer, benchmark, data, config, settings(step)["batch_size"])
    write_table(folder, "metrics", [{"benchmark": benchmark, "data": data_name(data), **row} for row in rows])
    return {f"{row['metric']} ({row['protocol']})": round(row["value"], 4) for row in rows}


def _accuracy(
    model: Any, tokenizer: Any, benchmark: str, data: str, config: dict[str, Any], batch_size: int, folder: Path
) -> list[dict[str, Any]]:
    import saap

    metrics, results = saap.accuracy(
        model,
        tokenizer,
        benchmark,
        data_file=data_file(data, benchmark),
        limit=config["limit"],
        batch_size=2 * batch_size,  # items are shorter than calibration sequences
    )
    (folder / "lm_eval.json").write_text(json.dumps(results, indent=1))
    return [asdict(metric) for metric in metrics]


def _perplexity(
    model: Any, tokenizer: Any, benchmark: str, data: str, config: dict[str, Any], batch_size: int
) -> list[dict[str, Any]]:
    import saap

    column = DATA[benchmark].columns[0]
    text = [row[column] for row in read_data(data, benchmark)]
    longest = getattr(model.config, "max_position_embeddings", None)  # ALiBi models have no limit
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
            batch_tokens=256 * batch_size,
            name=benchmark,
        )
        limited = f", first {config['max_tokens']} tokens" if config["max_tokens"] else ""
        rows.append(
            {
                **asdict(found),
                "metric": "perplexity",
                "protocol": f"{DATA[benchmark].place}, windows of {window}{limited}",
                "papers": window == PAPERS_WINDOW,
            }
        )
    return rows
