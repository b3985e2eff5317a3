"""The model card of a published checkpoint: what the manifests before it say."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.artifacts import ArtifactStore
from tasks.data import data_name
from tasks.model_source import base_model
from tasks.step import Step

if TYPE_CHECKING:
    from saap.export.model_card import Origin

PACKAGES = ("saap", "torch", "transformers")
MODELS = ("gguf", "model", "dense")  # what manifests call the model when it lies outside the store


def write_card(step: Step, folder: Path, summary: Mapping[str, Any] | None = None) -> None:
    """README.md of the checkpoint that the step has just saved. Without metrics: those are measured on the artifact."""
    from saap.export.model_card import model_card

    about: dict[str, Any] = {"stage": step.stage, "key": step.key, "params": step.config(), "run_id": step.run_id}
    about |= {"inputs": step.inputs, "outside": dict(step.outside), "summary": summary or {}}
    (folder / "README.md").write_text(model_card(folder, origin_of(ArtifactStore(step.store), about)), encoding="utf-8")


def origin_of(store: ArtifactStore, manifest: Mapping[str, Any]) -> "Origin":
    """Where an artifact comes from, by its manifest and those of all it was made from, as far as the store has them."""
    from saap.export.model_card import Origin

    manifests = _ancestors(store, manifest)
    stages = {about["stage"]: about["params"] for about in manifests if about["params"]}
    outside = {name: path for about in manifests for name, path in about["outside"].items()}
    path = next((outside[name] for name in MODELS if name in outside), None)
    name, licence = base_model(Path(path)) if path else ("unknown", None)
    roles = {"calibrate": "calibration", "recovery_text": "recovery, prose", "recover": "recovery"}
    data = {
        roles[about["stage"]]: data_name(about["outside"]["data"])
        for about in manifests
        if about["stage"] in roles and "data" in about["outside"]
    }
    versions = manifest.get("versions") or {name: version(name) for name in PACKAGES}
    key, run_id = f"{manifest['stage']}/{manifest['key']}", manifest["run_id"]
    versions = {name: versions.get(name, "unknown") for name in PACKAGES}
    removed = next((cut for about in manifests if (cut := about["summary"].get("removed_of_prunable"))), None)
    return Origin(name, licence, stages, data, key, run_id, versions, removed)


def _ancestors(store: ArtifactStore, manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The manifests of all stages before, earliest first, and `manifest` last."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}

    def visit(about: Mapping[str, Any]) -> None:
        inputs: Sequence[Sequence[str]] = about["inputs"]
        for _, stage, key in inputs:
            if (stage, key) not in found and (before := store.inspect(stage, key)[0]) is not None:
                visit(before)
        found[about["stage"], about["key"]] = about

    visit(manifest)
    return list(found.values())
