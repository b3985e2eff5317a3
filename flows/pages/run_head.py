"""The words on a run's page: what was done, the main numbers, the configuration, checkpoints and versions."""

import json
from pathlib import Path
from typing import Any

from flows.pages.section import Rows, Section, ask, words
from flows.printing import rounded
from storage.artifacts import ArtifactStore
from tasks.config import RunConfig

RANKINGS = {"ranking": ("fluctuation", "rank")}


def absent(run: dict[str, Any], config: dict[str, Any], stages: set[str], what: str) -> str:
    """Why a section has nothing to show."""
    if what == "recover" and config.get("recover", {}).get("recipe") == "none":
        return "The configuration asks for no recovery."
    if what == "speed" and config.get("speed", {}).get("runs") == 0:
        return "The configuration asks for no timing."
    if stages & {what, *RANKINGS.get(what, ())}:
        return "The stage is done, but its artifact is no longer in the store."
    name = f"The {what} stage"
    if run["status"] == "running":
        return f"{name} has not been reached yet: this page is written again as the run goes on."
    return f"{name} is missing: the run is {run['status']}. The same command goes on from there."


def sentences(run: dict[str, Any], config: dict[str, Any], kept: Rows, sizes: Rows) -> list[str]:
    """Two sentences: what was done to which model, and the result."""
    did = f"{run['criterion']} was to remove {run['ratio']:.0%} of the prunable parameters of {run['model']}"
    if kept:
        dense, left = (sum(row[name] for row in kept) for name in ("parameters", "kept_parameters"))
        share = 1 - left / dense
        did = f"{run['criterion']} removed {share:.1%} of the prunable parameters of {run['model']}"
    recipe = config.get("recover", {}).get("recipe")
    if recipe == "groupwise":
        did += f", and groupwise training in {config['recover']['bits']}-bit codes recovers it"
    elif recipe in ("lora", "qlora"):
        did += f", and {recipe} training recovers it"
    return [did + f", with the data '{run['data']}'.", *_became({row["variant"]: row for row in sizes})]


def _became(results: dict[str, dict[str, Any]]) -> list[str]:
    dense, last = results.get("dense"), results.get("recovered") or results.get("pruned")
    if dense is None or last is None:
        return []
    said = []
    if dense["wikitext2"] and last["wikitext2"]:
        steps = [rounded(results[v]["wikitext2"]) for v in ("dense", "pruned", "recovered") if v in results]
        said.append(f"WikiText-2 perplexity goes {' → '.join(steps)} ({' → '.join(v for v in results)})")
    if dense["average"] and last["average"]:
        said.append(f"the average of the seven accuracies {dense['average']:.1%} → {last['average']:.1%}")
    if dense["weight_bytes"] and last["weight_bytes"]:
        said.append(f"the weights {dense['weight_bytes'] / 1e6:,.0f} → {last['weight_bytes'] / 1e6:,.0f} MB")
    if last["decode_ratio"]:
        said.append(f"decoding is {last['decode_ratio']:.2f}× as fast")
    text = ", ".join(said)
    return [text[0].upper() + text[1:] + "."] if text else []


def tiles(results: Rows) -> list[tuple[str, str, str]]:
    """(what, the number of the last variant, dense's) for the head of the page."""
    by_variant = {row["variant"]: row for row in results}
    dense, last = by_variant.get("dense"), by_variant.get("recovered") or by_variant.get("pruned")
    if last is None:
        return []
    shown = []
    for name, title, scale, unit in (
        ("parameters", "parameters", 1e-6, " M"),
        ("active_parameters", "active parameters", 1e-6, " M"),
        ("weight_bytes", "weights", 1e-6, " MB"),
        ("tokens_per_s", "tokens a second", 1, ""),
        ("wikitext2", "WikiText-2 perplexity", 1, ""),
        ("average", "average accuracy", 100, " %"),
    ):
        if last[name] is not None and not (name == "active_parameters" and last[name] == last["parameters"]):
            beside = f"dense {rounded(dense[name] * scale)}{unit}" if dense and dense[name] is not None else ""
            shown.append((title, f"{rounded(last[name] * scale)}{unit}", beside))
    return shown


def changed(config: dict[str, Any]) -> Section:
    """The fields that are not at their defaults, as `saap config` prints them."""
    defaults = flat_fields(RunConfig().model_dump(mode="json"))
    rows: Rows = [
        {"field": name, "value": json.dumps(value), "default": json.dumps(defaults.get(name))}
        for name, value in flat_fields(config).items()
        if value != defaults.get(name)
    ]
    columns = (words("field", "field"), words("value", "here"), words("default", "default"))
    nothing = None if rows else "Everything is at its default."
    return Section(
        "config", "Configuration", "What differs from the defaults.", columns, rows, missing=nothing, open=True
    )


def flat_fields(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'prune.ratio': 0.2, …} of a nested configuration."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flat_fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def checkpoints(store: ArtifactStore, connection: Any, run_id: str) -> list[tuple[str, Path]]:
    """(variant, folder) of the checkpoints of the run that are in the store."""
    names = {"prune": "pruned", "recover": "recovered"}
    found = ask(connection, "select stage, key from stage_runs where run_id = ? order by position", run_id)
    folders = [(names[row["stage"]], store.path(row["stage"], row["key"])) for row in found if row["stage"] in names]
    return [(variant, folder) for variant, folder in folders if folder.is_dir()]


def versions(store: ArtifactStore, connection: Any, run_id: str) -> Section:
    """Packages that made the run's artifacts, as their manifests say."""
    made: dict[tuple[str, str], set[str]] = {}
    for row in ask(connection, "select distinct stage, key from stage_runs where run_id = ?", run_id):
        manifest = store.inspect(row["stage"], row["key"])[0] or {}
        for package, version in manifest.get("versions", {}).items():
            made.setdefault((package, version), set()).add(row["stage"])
    rows: Rows = [
        {"package": package, "version": version, "stages": ", ".join(sorted(stages))}
        for (package, version), stages in sorted(made.items())
    ]
    columns = (words("package", "package"), words("version", "version"), words("stages", "stages"))
    return Section(
        "versions", "Versions", columns=columns, rows=rows, missing=None if rows else "No stage is done yet."
    )
