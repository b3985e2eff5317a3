"""README.md of a checkpoint, as a model card in the hub's form."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from saap.errors import SaapError
from saap.export.gguf import check_config
from saap.export.uniform import STOCK
from saap.models.checkpoint import load_config
from saap.models.families import Experts, family_of

HOW_TO_LOAD = """\
With transformers 5.20 or newer and nothing else; the layers have widths of their own, so their classes come along as a
file:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{place}")
```

With the package (`import saap` first) the same without `trust_remote_code`.
"""
CITE = """\
```bibtex
@article{zheng2024saap,
  title   = {Adaptive Pruning for Large Language Models with Structural Importance Awareness},
  author  = {Zheng and others},
  journal = {arXiv preprint arXiv:2412.15127},
  year    = {2024}
}
```
"""


@dataclass(frozen=True)
class Origin:
    """How a checkpoint came to be.

    base_model: hub id or name; licence: the base model's identifier, None when it does not say; stages: name →
    settings, in the order they ran; data: role → the name of its data; key: of the artifact; run_id: of the run;
    removed: the share of the prunable parameters that went, None when unknown.
    """

    base_model: str
    licence: str | None
    stages: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, str]
    key: str
    run_id: str
    versions: Mapping[str, str] = field(default_factory=dict)
    removed: float | None = None


def model_card(
    folder: str | Path,
    origin: Origin,
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    speed: Sequence[Mapping[str, Any]] = (),
    place: str | None = None,
) -> str:
    """The card of the checkpoint in `folder`: front matter, method, widths, data, results, loading, licence, citation.

    metrics: benchmark, metric, value, stderr, n, protocol, data of each number; speed: rows of figures; place: what to
    load it by, the folder's name if absent.
    """
    config = load_config(folder)
    groupwise = getattr(config, "groupwise", None)
    criterion = origin.stages.get("rank", {}).get("criterion")
    recipe = origin.stages.get("recover", {}).get("recipe")
    recovered = (
        f"recovered in int{groupwise.get('bits', 4)}" if groupwise else f"recovered by {recipe}" if recipe else ""
    )
    name = origin.base_model.rpartition("/")[2]
    went = "pruned" if origin.removed is None else f"{origin.removed:.0%} of its prunable parameters removed"
    ranked = f"the criterion '{criterion}'" if criterion else "structural importance (SAAP, arXiv 2412.15127)"
    removed = _removed(config)
    cut = f": whole {removed}, ranked by {ranked}, were removed, so that it is a smaller model of the same kind"
    licence = origin.licence or "not stated by the model this was made from"
    parts = [
        _front_matter(origin, name, metrics, groupwise),
        f"# {', '.join(filter(None, (name, went, recovered)))}\n",
        f"Made from {_linked(origin.base_model)} by the saap pipeline"
        + (cut if removed else "")
        + (f", and it was {recovered} by fine-tuning.\n" if recovered else ".\n"),
        "## How to load\n",
        HOW_TO_LOAD.format(place=place or ".") + _exports(config),
    ]
    if metrics:
        parts += ["## Results\n", _table(metrics, ("benchmark", "metric", "value", "stderr", "n", "protocol", "data"))]
    if speed:
        parts += ["## Size and speed\n", _table(speed, tuple(speed[0]))]
    parts += ["## Method\n", "Every stage and its settings:\n"]
    settings = [{"stage": s, "settings": _listed(values)} for s, values in origin.stages.items()]
    parts.append(_table(settings, ("stage", "settings")))
    parts += ["## Data\n", _table([{"role": r, "data": d} for r, d in origin.data.items()], ("role", "data"))]
    rows = _widths(config)
    parts += ["## Widths\n", f"Dense: {_dense(config)}. Kept:\n", _table(rows, tuple(rows[0]))]
    parts += ["## Licence\n", f"That of the base model: {licence}. Pruning and recovery do not change its terms.\n"]
    parts += ["## Citation\n", CITE]
    made = ", ".join(f"{package} {number}" for package, number in origin.versions.items())
    parts.append(f"Artifact `{origin.key}` of run `{origin.run_id}`" + (f"; {made}.\n" if made else ".\n"))
    return "\n".join(parts)


def _removed(config: Any) -> str:
    """The kinds that some layer has fewer of than the dense model: 'attention heads and MLP channels'."""
    dense, fewer = _dense_layer(config), set()
    for row in _widths(config):
        full = _widths_of(config, dense, row["layer"])
        fewer |= {column for column in full if row[column] != full[column]}
    kinds = {"heads": "attention heads", "query heads": "attention heads", "experts": "experts"}
    found = [kind for column, kind in (kinds | {"MLP channels": "MLP channels"}).items() if column in fewer]
    return " and ".join(filter(None, (", ".join(found[:-1]), *found[-1:])))


def _exports(config: Any) -> str:
    """What else the checkpoint can become. Nothing for a family that both exports refuse."""
    ways = []
    with suppress(SaapError):
        check_config(config)
        ways.append("llama.cpp: `saap export gguf`")
    if config.model_type.removeprefix("saap_") in STOCK:
        ways.append("a stock class of equal layers (vLLM and others): `saap export uniform`")
    return f"\nFor {'; for '.join(ways)}.\n" if ways else ""


def _front_matter(origin: Origin, name: str, metrics: Sequence[Mapping[str, Any]], groupwise: Any) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(row["benchmark"]),
            dataset_name=f"{row['benchmark']} ({row['data']})",
            metric_type=str(row["metric"]),
            metric_value=round(float(row["value"]), 6),
            metric_name=str(row["protocol"]),
        )
        for row in metrics
    ]
    data = ModelCardData(
        base_model=origin.base_model if origin.base_model.count("/") == 1 else None,
        license=origin.licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["saap", "structured-pruning", "custom_code", *([f"int{groupwise.get('bits', 4)}"] if groupwise else [])],
        model_name=f"{name}-saap" if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _linked(model: str) -> str:
    return f"[{model}](https://huggingface.co/{model})" if model.count("/") == 1 else f"`{model}`"


def _widths(config: Any) -> list[dict[str, Any]]:
    return [{"layer": layer, **_widths_of(config, own, layer)} for layer, own in enumerate(config.per_layer_config)]


def _widths_of(config: Any, own: Any, layer: int) -> dict[str, Any]:
    """Column → width of a layer, whose config is `own`."""
    heads = {"query heads": own.num_attention_heads, "KV heads": getattr(own, "num_key_value_heads", None)}
    if hasattr(own, "kept_heads"):
        heads = {"heads": own.num_attention_heads if own.kept_heads is None else len(own.kept_heads)}
    return heads | _inner(config, own, layer)


def _inner(config: Any, own: Any, layer: int) -> dict[str, Any]:
    family = family_of(config)
    channels = getattr(own, "intermediate_size", None) or 4 * own.hidden_size
    if not isinstance(family, Experts):
        return {"MLP channels": channels}
    if not family.has_experts(own, layer):
        return {"experts": "none", "MLP channels": channels}
    return {"experts": getattr(own, family.layout.count), "MLP channels": getattr(own, family.layout.width)}


def _dense_layer(config: Any) -> Any:
    """The dense model's widths, under the names that a layer's config has for them."""
    fields = config.to_dict()  # the config itself refuses to tell what differs from layer to layer
    mapped = {name: fields[stored] for name, stored in config.attribute_map.items() if stored in fields}
    return SimpleNamespace(**fields | mapped)


def _dense(config: Any) -> str:
    dense, family = _dense_layer(config), family_of(config)
    shared = getattr(dense, "num_key_value_heads", None)
    inner = f"{dense.intermediate_size or 4 * dense.hidden_size} channels a layer"
    if isinstance(family, Experts):
        count, width = getattr(dense, family.layout.count), getattr(dense, family.layout.width)
        inner = f"{count} experts of {width} channels a layer with experts"
    return f"{dense.num_attention_heads} heads" + (f" over {shared} KV heads" if shared else "") + f", {inner}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in values.items() if value is not None)


def _table(rows: Sequence[Mapping[str, Any]], columns: tuple[str, ...]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
