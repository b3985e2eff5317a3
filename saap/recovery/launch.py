"""Recovery from folder to folder, in this process or in several that accelerate's launcher starts.

accelerate launch --multi_gpu -m saap.recovery.launch JOB.json
"""

import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saap.errors import SaapError


@dataclass(frozen=True)
class Job:
    """What `run` is to do. checkpoint, tokenizer, teacher, work, output: folders; options: fields of the recipe."""

    checkpoint: str
    tokenizer: str
    teacher: str | None
    rows: list[dict[str, Any]]
    work: str
    output: str
    recipe: str
    options: dict[str, Any]
    training: dict[str, Any]
    dtype: str = "float32"
    device: str = "cpu"


def run(job: Job) -> list[dict[str, Any]]:
    """Load, recover and save; in several processes, the first one saves. Returns the training steps as dicts."""
    from saap.models.checkpoint import load, save
    from saap.models.tokenizer import load_tokenizer
    from saap.recovery.recipes import RECIPES
    from saap.recovery.recover import Training, recover
    from saap.recovery.shard import claimed

    fsdp = claimed()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if job.device == "cuda" and "LOCAL_RANK" in os.environ else job.device
    device = "cpu" if fsdp else device  # a model that is to be shared out may be larger than a GPU
    # autocast would round a float32 teacher's weights anew for every batch
    dtype = job.training.get("precision", job.dtype) if job.dtype == "float32" else job.dtype
    teacher = load(job.teacher, dtype=dtype, device=device) if job.teacher else None
    tokenizer = load_tokenizer(job.tokenizer)
    recipe = RECIPES[job.recipe](**{**job.options, "targets": tuple(job.options.get("targets", ()))})
    recovered, steps = recover(
        load(job.checkpoint, dtype=job.dtype, device=device),
        job.rows,
        tokenizer,
        job.work,
        recipe,
        Training(**job.training),
        teacher,
        fsdp=fsdp,
    )
    if os.environ.get("RANK", "0") == "0":
        save(recovered, job.output, tokenizer)
    return [asdict(step) for step in steps]


def run_launched(job: Job, arguments: str) -> list[dict[str, Any]]:
    """`run` in the processes of `accelerate launch ARGUMENTS`. Raises SaapError when they fail; they say why."""
    file, answer = Path(job.work) / "job.json", Path(job.work) / "steps.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    answer.unlink(missing_ok=True)
    file.write_text(json.dumps({"job": asdict(job), "answer": str(answer), "parent": os.getpid()}))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(arguments)]
    command = [*launcher, "-m", "saap.recovery.launch", str(file)]
    environment = {**os.environ, **({"ACCELERATE_USE_CPU": "true"} if job.device == "cpu" else {})}
    code = subprocess.run(command, env=environment).returncode
    if code or not answer.is_file():
        raise SaapError(f"`accelerate launch {arguments}` failed ({code}); its processes say why above")
    steps: list[dict[str, Any]] = json.loads(answer.read_text())
    return steps


def _die_with(parent: int) -> None:
    """End this process when its parent is gone, because the next run may then start to work in the folder."""
    while os.path.exists(f"/proc/{parent}"):
        time.sleep(1)
    os._exit(1)


def _quiet() -> None:
    """Hide what the libraries print and the bars of every file that is read; our own progress bar stays."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    for name in ("bitsandbytes", "transformers.trainer_utils"):  # the second: of times that it does without
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    if os.path.exists("/proc"):
        threading.Thread(target=_die_with, args=(asked["parent"],), daemon=True).start()
    _quiet()
    try:
        steps = run(Job(**asked["job"]))
    except SaapError as error:
        sys.exit(f"error: {error}")
    if os.environ.get("RANK", "0") == "0":
        Path(asked["answer"]).write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
