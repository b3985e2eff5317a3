"""What a run would do, and why: compared with what the store holds. Imports neither torch nor Prefect."""

from typing import Any

from storage.artifacts import ArtifactStore
from tasks.step import Step

Manifest = dict[str, Any]


def preview_rows(steps: list[Step]) -> list[tuple[str, str, str, str]]:
    """(step, 'cached', 'fetch', 'run' or 'skip', why, key) for every step of a run."""
    store, url = ArtifactStore(steps[0].store), steps[0].store_remote
    there = _in_remote(url, store, steps) if url else set()
    rows, missing = [], {}
    made: dict[str, list[Manifest]] = {}
    for step in steps:
        if step.missing is not None:
            rows.append((step.label, "skip", step.missing, step.key))
            continue
        manifest, fault = store.inspect(step.stage, step.key)
        if manifest is not None:
            rows.append((step.label, "cached", f"made by run {manifest['run_id']}", step.key))
            continue
        if (step.stage, step.key) in there:
            rows.append((step.label, "fetch", f"it is in {url}", step.key))
            continue
        missing[step.stage, step.key] = step.label
        upstream = sorted({missing[stage, key] for _, stage, key in step.inputs if (stage, key) in missing})
        if fault is not None:
            why = f"damaged: {fault}"
        elif upstream:
            why = f"after {', '.join(upstream)}"
        else:
            why = _what_changed(store, step, made)
        rows.append((step.label, "run", why, step.key))
    return rows


def _in_remote(url: str, store: ArtifactStore, steps: list[Step]) -> set[tuple[str, str]]:
    """The artifacts that a run would fetch."""
    from storage.remote import remote_of

    wanted = {(step.stage, step.key) for step in steps if step.missing is None}
    return remote_of(url).which(one for one in sorted(wanted) if store.inspect(*one)[0] is None)


def _what_changed(store: ArtifactStore, step: Step, made: dict[str, list[Manifest]]) -> str:
    """How the step differs from the newest artifact of its stage (and benchmark).

    made: stage → manifests, read once: an evaluation has dozens of steps, and a store thousands of manifests.
    """
    if step.stage not in made:
        found = (store.read_manifest(step.stage, folder.name) for folder in store.root.glob(f"{step.stage}/[!.]*/"))
        made[step.stage] = sorted((m for m in found if m is not None), key=lambda manifest: manifest["finished_at"])
    params = step.config()
    benchmark = params.get("benchmark")
    newest = next((m for m in reversed(made[step.stage]) if m["params"].get("benchmark") == benchmark), None)
    if newest is None:
        return "never made"
    names = sorted(params.keys() | newest["params"].keys())
    changed = [
        f"{name} {newest['params'].get(name)} → {params.get(name)}"
        for name in names
        if newest["params"].get(name) != params.get(name)
    ]
    return ", ".join(changed) or "other inputs (model, data, code version or earlier stage)"
