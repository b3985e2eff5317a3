"""Recovery: fine-tune a pruned model on instructions, by a recipe that says what is trained (SAAP §III-D)."""

import logging
import math
from array import array
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saap.errors import SaapError
from saap.models.lean import attending, fastest_attention, lean
from saap.recovery.loss import Student
from saap.recovery.recipes import Groupwise, Recipe
from saap.recovery.training import Training, TrainingStep
from saap.texts import teaches, training_example

PLAIN_UP_TO = 512  # tokens: longer examples take torch's fused attention
CODED_ON = 8192  # tokens that the codes are made on
_log = logging.getLogger("saap")
HELD_OUT_AT_MOST = 128  # rows: to tell checkpoints apart; 4 % of Alpaca every 50 steps takes longer than training on it


def recover(
    model: nn.Module,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    work: str | Path,
    recipe: Recipe | None = None,
    training: Training | None = None,
    teacher: nn.Module | None = None,
    *,
    fsdp: bool = False,
) -> tuple[nn.Module, list[TrainingStep]]:
    """Prepare a model by the recipe (default: Groupwise()), train its adapters on the rows, and merge them.

    Args:
        model: a float model. It is used up: keep no other use for it.
        rows: instruction, input, output; or tokens, those of a sequence of prose.
        work: folder for the trainer's checkpoints. When it holds one of an interrupted call with the same arguments,
            training goes on from there, with the same data order, optimiser and random state.
        teacher: the dense model; needed exactly when training.distill is not 0. It is used up too.
        fsdp: share out the frozen weights of both models among the processes (see `shard`); they may come from the
            CPU, and a model with values comes back in the first process only.

    Under accelerate's launcher every process calls this with the same arguments.
    Returns the finished model and the steps. Raises SaapError for bad arguments or a loss that is not finite.
    """
    from accelerate import PartialState
    from transformers import set_seed

    from saap.recovery.shard import average_only_what_learns, gather, shard, skeleton
    from saap.recovery.trainer import train

    recipe, training = recipe or Groupwise(), training or Training()
    device = PartialState().device if fsdp else next(model.parameters()).device
    _check(training, teacher, device)
    learnt_from, held_out = _examples(rows, tokenizer, training)
    set_seed(training.seed)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    prepared = recipe.prepare(model, _windows(learnt_from, training.max_length))
    models = [prepared] if teacher is None else [prepared, teacher.requires_grad_(False).eval()]
    if training.precision == "float32":
        _widen(models)
    empty = skeleton(prepared) if fsdp else None
    precision = getattr(torch, training.precision)
    attention = fastest_attention(prepared, device.type, precision, training.max_length, PLAIN_UP_TO)
    with lean(prepared), attending(prepared, attention):
        for one in models if fsdp else ():
            shard(one, device)
        if training.gradient_checkpointing:
            prepared.gradient_checkpointing_enable({"use_reentrant": False})
        student = Student(prepared, teacher, training.distill)
        if fsdp:
            average_only_what_learns(student)
        steps = _steps(train(student, learnt_from, held_out, tokenizer, Path(work), training, device))
    if empty is not None:
        gather(prepared, empty)
        return (_narrow(recipe.finish(empty), dtypes) if PartialState().is_main_process else empty), steps
    if training.gradient_checkpointing:
        prepared.gradient_checkpointing_disable()
    return _narrow(recipe.finish(prepared), dtypes), steps


def _widen(models: list[nn.Module]) -> None:
    """Make the float weights float32, in place, because a layer computes in their dtype; codes compute in any."""
    for parameter in (p for model in models for p in model.parameters()):
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()


def _narrow(model: nn.Module, dtypes: dict[str, torch.dtype]) -> nn.Module:
    """Give the weights the dtypes they had, in place."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    return model


def _examples(
    rows: list[dict[str, Any]], tokenizer: Any, training: Training
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows to train on, and the last rows, which are held out.

    Rows whose answer is empty, or has no label within max_length, are left out: they would teach the model to answer
    nothing. With loss_on = "text" the prompt has labels too.

    Tokens and labels are int32 arrays: a list takes 36 bytes for each.
    """
    examples, answers = [], 0
    asked = sum("tokens" not in row for row in rows)
    for row in rows:
        example = training_example(row, tokenizer, training.max_length, training.loss_on == "text")
        if teaches(row, example):
            compact = {name: array("i", example[name]) for name in ("input_ids", "labels")}
            examples.append({**example, **compact})
            answers += "tokens" not in row
    if examples and asked and not answers:
        raise SaapError(
            f"the answer of none of {asked} instruction rows begins within max_length {training.max_length}: raise "
            "recover.max_length, or train on other text alone (recover.prose and recover.own together 1)"
        )
    if answers < asked:
        _log.warning(
            "%d of %d instruction rows are left out: their answer is empty or does not begin within "
            "recover.max_length = %d",
            *(asked - answers, asked, training.max_length),
        )
    held_out = min(int(len(examples) * training.held_out), HELD_OUT_AT_MOST)
    if training.held_out and not held_out:
        _log.warning(
            "no example is held out (recover.held_out = %g of %d): a loss that rises would not be seen",
            *(training.held_out, len(examples)),
        )
    kept = len(examples) - held_out
    if kept < training.micro_batch_size:
        raise SaapError(
            f"recovery has {kept} examples whose answer begins within max_length {training.max_length}, "
            f"fewer than micro_batch_size {training.micro_batch_size}: give more examples or raise max_length"
        )
    return examples[:kept], examples[kept:]


def _windows(examples: list[dict[str, Any]], length: int) -> torch.Tensor:
    """int64 (D, length): the tokens of the first examples, one behind the other, `CODED_ON` at most."""
    tokens: list[int] = []
    for example in examples:
        tokens += example["input_ids"]
        if len(tokens) >= CODED_ON:
            break
    count = min(len(tokens), CODED_ON) // length
    return torch.tensor(tokens[: count * length] if count else tokens).view(max(count, 1), -1)


def _check(training: Training, teacher: nn.Module | None, device: torch.device) -> None:
    size, micro = training.batch_size, training.micro_batch_size
    if micro < 1 or size < 1 or size % micro:
        raise SaapError(f"batch_size {size} must be a multiple of micro_batch_size {micro}")
    if not 0 <= training.distill <= 1 or not 0 <= training.held_out < 1:
        raise SaapError(f"distill and held_out are shares, got {training.distill} and {training.held_out}")
    if (training.distill > 0) != (teacher is not None):
        raise SaapError("a teacher is needed exactly when distill is not 0")
    for field, known in {
        "schedule": ("linear", "cosine", "constant"),
        "loss_on": ("response", "text"),
        "precision": ("float32", "bfloat16", "float16"),
    }.items():
        if getattr(training, field) not in known:
            raise SaapError(f"{field} must be one of {', '.join(known)}, got {getattr(training, field)!r}")
    if training.precision == "float16" and device.type != "cuda":
        raise SaapError("precision float16 needs a GPU: use bfloat16 or float32")


def _steps(history: list[dict[str, Any]]) -> list[TrainingStep]:
    """The trainer's log as steps. Warns where no held-out loss is below the one before the first step."""
    held_out = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    before, best = held_out.pop(0, math.inf), min(held_out.values(), default=-math.inf)
    if best >= before:
        _log.warning(
            "recovery has not helped: the held-out loss was %.2f before the first step and is %.2f at best after it; "
            "lower recover.learning_rate or give other text",
            *(before, best),
        )
    steps = []
    for entry in (entry for entry in history if "loss" in entry):
        rates = entry["learning_rate"], entry["tokens_per_s"]
        steps.append(
            TrainingStep(int(entry["step"]), entry["epoch"], entry["loss"], *rates, held_out.get(entry["step"]))
        )
    return steps
