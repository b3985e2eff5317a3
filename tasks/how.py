"""How and where the work is done: the sections of a configuration that are in no key."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.values import Arguments, Count, Text


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Compute(Section):
    """How the work is done. Never part of a stage key: it changes time and memory, not results."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = Field(
        "auto", description="auto (a GPU if there is one), cpu, cuda, cuda:1 …"
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(None, description="CPU threads; all cores if absent")
    batch_size: Count = Field(8, description="sequences at once in evaluation and statistics")
    offload: bool = Field(
        False, description="score and prune a model larger than the device: its layers come from disk one by one"
    )
    launch: Arguments | None = Field(
        None,
        description="train in several processes: arguments of `accelerate launch`; '--multi_gpu' or '--use_fsdp'",
    )


class Execute(Section):
    """Where steps run. Never part of a stage key."""

    runner: Literal["serial", "processes", "ray"] = Field(
        "serial", description="steps one by one in this process, side by side in processes, or on a Ray cluster"
    )
    slots: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="of processes: how many steps at once; a slot has a GPU, or its share of the cores"
    )
    address: Text | None = Field(
        None, description="of ray: 'host:6379' or 'ray://host:10001'; a cluster of its own if absent"
    )


def wrong_execution(compute: Compute, execute: Execute) -> str | None:
    """What does not go together, or None."""
    if execute.runner != "processes" and execute.slots != 1:
        return f"execute.slots is for execute.runner = 'processes', not for '{execute.runner}'"
    if execute.runner != "ray" and execute.address is not None:
        return f"execute.address is for execute.runner = 'ray', not for '{execute.runner}'"
    if compute.launch is not None and ":" in compute.device:
        return "compute.launch gives each process a GPU of its own: with it set compute.device = 'cuda'"
    if execute.runner == "serial":
        return None
    if compute.launch is not None:
        return "compute.launch trains in several processes, and a slot has one device: use execute.runner = 'serial'"
    if ":" in compute.device:
        return f"a slot has a GPU of its own: with execute.runner = '{execute.runner}' set compute.device = 'cuda'"
    return None
