"""Speed, memory and size of the variants of a run, alternating in one process."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from storage.tables import write_table
from tasks.compute import forget, settings
from tasks.stage import stage_task
from tasks.step import Step


@stage_task("speed")
def speed(step: Step, folder: Path) -> dict[str, Any]:
    import saap

    config = step.config()
    dtype, device = config.pop("dtype"), settings(step)["device"]
    config.pop("machine")
    in_llama_cpp = config.pop("llama_cpp")
    forget()
    models = {name: saap.load(step.folder(name), dtype=dtype, device=device) for name in step_variants(step)}
    sizes = {name: saap.size_of(model) for name, model in models.items()}
    for model in models.values():
        saap.use_int4_kernels(model)
    rows = saap.compare_speed(models, sizes, **config)
    if in_llama_cpp:
        from saap.export.speed import llama_cpp_speed

        models.clear()
        rows += llama_cpp_speed({name: step.folder(name) for name in sizes}, sizes, **config)
    write_table(folder, "speed", [asdict(row) for row in rows])
    return {row.variant: f"{row.tokens_per_s:.1f} tokens/s" for row in rows}


def step_variants(step: Step) -> list[str]:
    """dense, pruned and, if there is one, recovered: in that order."""
    names = {name for name, *_ in (*step.inputs, *step.outside)}
    return [variant for variant in ("dense", "pruned", "recovered") if variant in names]
