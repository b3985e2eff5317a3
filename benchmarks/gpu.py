"""The steps of benchmarks/gpu.sh, each in a process of its own with a time limit, most important first.

Prints a JSON line as each ends: step, ok, seconds, its figures, and `missed`, the targets that they do not reach. The
first line names device, versions and date, the last one what went through. What is missing on the machine is found
before anything runs, and ends it with the list. Exit code 1 when a step failed, missed a target, or was cut off.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

ALL = 470  # seconds for everything
NEEDED = ("torch", "transformers", "accelerate", "psutil")
OPTIONAL = ("peft", "bitsandbytes")  # the recipes lora and qlora

Figures = dict[str, Any]
# step → (figure, '>=' or '<=', target), checked at full size on a GPU
TARGETS: dict[str, tuple[tuple[str, str, float], ...]] = {
    "kernels": (("triton_error", "<=", 1e-5), ("int4_error", "<=", 0.01)),
    "scoring": (("seconds_scoring", "<=", 2.0), ("time_ratio", ">=", 3.0), ("peak_above_weights_gib", "<=", 3.0)),
    "decode": (
        ("decode_ratio_20", ">=", 1.2),
        ("decode_ratio_50", ">=", 1.7),
        ("decode_ratio_50_int4", ">=", 3.0),
        ("bandwidth_share_dense", ">=", 0.8),
        ("bandwidth_share_50", ">=", 0.8),
    ),
    "whole_run": (("perplexity_error_dense", "<=", 1e-3), ("plan_difference", "<=", 0.01)),
}


def kernels(device: str, tiny: bool) -> Figures:
    import gpu_steps

    return gpu_steps.kernels(device, tiny)


def scoring(device: str, tiny: bool) -> Figures:
    """The ranking of the method against autograd's way, at LLaMA-7B's shape, 50 × 128 tokens."""
    import scoring
    from common import last_line

    size = ["--shape", "tiny", "--samples", "4", "--length", "16"] if tiny else ["--shape", "llama-7b"]
    figures = last_line(scoring.main, ["--device", device, "--dtype", "bfloat16", "--rounds", "2", *size])
    figures["seconds_scoring"] = figures.pop("seconds")
    figures["peak_above_weights_gib"] = figures["peak_above_weights_ratio"] * figures["weight_bytes"] / 2**30
    return figures


def decode(device: str, tiny: bool) -> Figures:
    """Tokens a second of dense, pruned and int4 models, by CUDA graphs on a GPU, and their share of the bandwidth."""
    import speed
    from common import last_line

    size = (
        ["--shape", "tiny", "--prompt", "8", "--new", "4", "--runs", "2"]
        if tiny
        else ["--shape", "llama-7b", "--runs", "5"]
    )
    return last_line(speed.main, ["--device", device, *size])


def fisher_and_refit(device: str, tiny: bool) -> Figures:
    import gpu_steps

    return gpu_steps.fisher_and_refit(device, tiny)


def training(device: str, tiny: bool) -> Figures:
    """Steps of each recipe whose packages are here (on a CPU only our own): tokens a second and peaks."""
    import recovery
    from common import last_line

    recipes: dict[str, str | None] = {"groupwise": None, "lora": "peft", "qlora": "bitsandbytes"}
    if device == "cpu":  # a process each, for its resident memory: ten seconds of imports
        recipes = {"groupwise": None}
    here = [name for name, needs in recipes.items() if needs is None or importlib.util.find_spec(needs)]
    size = ["--shape", "tiny", "--length", "16", "--repeats", "1"] if tiny else ["--shape", "llama-1b"]
    figures = last_line(recovery.main, ["--device", device, "--recipes", *here, *size])
    return figures | {"left_out": sorted(set(recipes) - set(here))}


def whole_run(device: str, tiny: bool) -> Figures:
    import gpu_steps

    return gpu_steps.whole_run(device, tiny)


STEPS: dict[str, tuple[Callable[[str, bool], Figures], int]] = {  # and seconds it may take
    "kernels": (kernels, 110),
    "scoring": (scoring, 100),
    "decode": (decode, 200),
    "fisher_and_refit": (fisher_and_refit, 90),
    "training": (training, 110),
    "whole_run": (whole_run, 60),
}


def _child(step: str, device: str, tiny: bool, pipe: Any) -> None:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            figures = STEPS[step][0](device, tiny)
        pipe.send({"ok": True, **figures})
    except BaseException as error:
        traceback.print_exc()
        pipe.send({"ok": False, "error": f"{type(error).__name__}: {error}"[:500]})


def run_step(step: str, device: str, tiny: bool, limit: float) -> Figures:
    """What a step found, in a child process that is ended after `limit` seconds."""
    context = multiprocessing.get_context("fork")  # torch and transformers are imported once
    ours, theirs = context.Pipe(duplex=False)
    start = time.perf_counter()
    child = context.Process(target=_child, args=(step, device, tiny, theirs))
    child.start()
    theirs.close()
    found: Figures
    try:
        found = ours.recv() if ours.poll(limit) else {"ok": False, "error": f"cut off after {limit:.0f} s"}
    except EOFError:
        child.join()
        found = {"ok": False, "error": f"the process ended with {child.exitcode}"}
    child.join(5)
    if child.is_alive():
        child.kill()
        child.join()
    full = device.startswith("cuda") and not tiny and found["ok"]
    missed = missed_targets(found, TARGETS.get(step, ())) if full else []
    return {"step": step, "ok": found.pop("ok"), "seconds": round(time.perf_counter() - start, 1), **found} | (
        {"missed": missed} if full else {}
    )


def missed_targets(found: Figures, targets: tuple[tuple[str, str, float], ...]) -> list[str]:
    """The targets a step's figures do not reach, a figure that is not there among them."""
    return [
        f"{figure} {relation} {target:g}"
        for figure, relation, target in targets
        if figure not in found or (found[figure] < target if relation == ">=" else found[figure] > target)
    ]


def missing(device: str) -> list[str]:
    """What the machine lacks. A child process asks for the GPU: what forks later must not have its context."""
    wanted = NEEDED + (("triton",) if device.startswith("cuda") else ())
    lacking = [f"the package {name}" for name in wanted if importlib.util.find_spec(name) is None]
    if not lacking and device.startswith("cuda"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            if pool.apply(_cuda_devices) == 0:
                lacking.append("a GPU that torch sees")
    return lacking


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _describe(device: str, tiny: bool, pipe: Any) -> None:
    import torch
    from common import where

    pipe.send({"device": where(device), "torch": torch.__version__, "cuda": torch.version.cuda, "tiny": tiny})


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: whether it runs, not how fast")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    arguments = parser.parse_args()
    device, tiny = arguments.device, arguments.tiny
    if lacking := missing(device):
        raise SystemExit("missing here: " + "; ".join(lacking) + " (benchmarks/gpu.sh --wheels brings packages)")
    import transformers.models.llama.modeling_llama

    import saap  # noqa: F401  # both in the parent, for all steps

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_describe, args=(device, tiny, theirs))
    child.start()
    about = ours.recv() if ours.poll(60) else {"device": device}
    child.join()
    without = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    print(
        json.dumps({**about, "transformers": transformers.__version__, "without": without, "date": today}), flush=True
    )
    good = []
    for step in arguments.steps:
        patience = 10 if tiny else 1  # toy sizes are for whether it runs, on a machine that may be busy
        left = patience * ALL - (time.perf_counter() - began)
        limit = min(patience * STEPS[step][1], left)
        if limit < 5:
            print(json.dumps({"step": step, "ok": False, "error": "no time was left"}), flush=True)
            continue
        found = run_step(step, device, tiny, limit)
        print(json.dumps(found), flush=True)
        if found["ok"] and not found.get("missed"):
            good.append(step)
    bad = [step for step in arguments.steps if step not in good]
    print(json.dumps({"good": good, "bad": bad, "seconds": round(time.perf_counter() - began, 1)}))
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
