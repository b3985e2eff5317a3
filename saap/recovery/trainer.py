"""transformers' Trainer, set to save adapters only, to keep one data order, and to show and log what we want."""

import logging
import math
import pickle
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from saap.errors import SaapError, not_finite
from saap.progress import tqdm
from saap.recovery.budget import UNPLANNED, Budget
from saap.recovery.loss import Student
from saap.recovery.order import Examples, Order, inputs, padded
from saap.recovery.training import STATE, Training, ended, last_checkpoint, settle

ADAPTERS = "adapters.safetensors"
_log = logging.getLogger("saap")


def train(
    student: Student,
    examples: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
    tokenizer: Any,
    work: Path,
    training: Training,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Train what requires a gradient, from the last checkpoint in `work` if there is one.

    Returns the trainer's log: entries with loss, learning_rate and tokens_per_s, and entries with eval_loss.
    """
    order, budget = Order([e["length"] for e in examples], training.batch_size, training.seed), None
    if training.minutes is not None:
        in_order = sorted(e["length"] for e in held_out)
        measured = sum(padded(in_order, training.micro_batch_size))
        budget = Budget(training, work, lambda: order.tokens(training.micro_batch_size), measured)
    checkpoint = last_checkpoint(work)
    arguments = _arguments(work, training, device, bool(held_out), budget)
    arguments.eval_on_start = bool(held_out) and checkpoint is None  # what later ones are compared with
    callbacks: list[TrainerCallback] = [_Finish(bool(held_out)), _Rising()]
    if training.patience is not None:
        if not held_out:
            raise SaapError("patience needs a held-out part: raise recover.held_out or give more examples")
        callbacks.append(EarlyStoppingCallback(training.patience))
    trainer = _AdapterTrainer(
        model=student,
        args=arguments,
        train_dataset=Examples(examples),
        eval_dataset=Examples(held_out),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=callbacks,
    )
    if trainer.is_fsdp_enabled:
        raise SaapError("accelerate's own FSDP cannot share out int4 codes: call recover(…, fsdp=shard.claimed())")
    trainer.student = student
    trainer.held_out = [inputs(e) for e in sorted(held_out, key=lambda e: e["length"])]
    trainer.order, trainer.budget = order, budget
    if budget is not None:
        trainer.add_callback(budget)
    trainer.add_callback(_Progress(trainer))
    trainer.remove_callback(PrinterCallback)
    if checkpoint is not None:
        if trainer.is_world_process_zero():
            _log.info("recovery goes on behind step %s", checkpoint.rpartition("-")[2])
        settle(checkpoint)
        if ended(checkpoint):
            trainer.finish_from(checkpoint)
            return list(trainer.state.log_history)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except pickle.UnpicklingError as error:
        raise SaapError(f"{checkpoint} holds a pickled object that is not a tensor: remove it") from error
    return list(trainer.state.log_history)


def _arguments(
    work: Path, training: Training, device: torch.device, held_out: bool, budget: Budget | None
) -> "OneDevice":
    """The trainer's arguments. held_out: whether there are rows to choose the best checkpoint by."""
    arguments = OneDevice(
        own_device=str(device),
        output_dir=str(work),
        num_train_epochs=training.epochs,
        max_steps=-1 if budget is None else budget.steps or UNPLANNED,
        per_device_train_batch_size=training.micro_batch_size,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        lr_scheduler_type="constant_with_warmup" if training.schedule == "constant" else training.schedule,
        optim="adamw_torch",
        bf16=training.precision == "bfloat16",
        fp16=training.precision == "float16",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a ruined model must show
        eval_strategy="steps" if held_out else "no",
        eval_steps=training.save_steps,
        save_steps=training.save_steps,
        save_total_limit=2,
        load_best_model_at_end=held_out,
        metric_for_best_model="eval_loss" if held_out else None,
        greater_is_better=False if held_out else None,
        restore_callback_states_from_checkpoint=training.patience is not None,
        seed=training.seed,
        use_cpu=device.type == "cpu",
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # the codes never change
        disable_tqdm=True,
    )
    if training.precision == "float32":
        arguments.mixed_precision = "no"  # by itself it is what accelerate's launcher was told
    at_once = training.micro_batch_size * arguments.world_size
    if training.batch_size % at_once:
        raise SaapError(
            f"batch_size {training.batch_size} must be a multiple of micro_batch_size {training.micro_batch_size} "
            f"times the {arguments.world_size} processes"
        )
    arguments.gradient_accumulation_steps = training.batch_size // at_once
    return arguments


@dataclass
class OneDevice(TrainingArguments):
    """Training on the device the model is on, unless a launcher gives each process its own.

    By itself the trainer takes the first GPU. It wraps the model in DataParallel when it sees several, and then a batch
    has as many times the examples.
    """

    own_device: str = "cpu"

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Half of the steps at most, as in `Budget.rate`: a short training has its peak and its schedule too."""
        return min(super().get_warmup_steps(num_training_steps), num_training_steps // 2)

    @cached_property
    def _setup_devices(self) -> torch.device:
        found: torch.device = super()._setup_devices
        if self.distributed_state.distributed_type != DistributedType.NO:
            return found
        device = torch.device(self.own_device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._n_gpu = min(self._n_gpu, 1)
        self.distributed_state.device = device
        return device


class _AdapterTrainer(Trainer):
    """Saves and restores the adapters only: nothing else ever changes."""

    student: Student
    held_out: list[dict[str, Any]]
    order: Order
    budget: Budget | None = None
    tokens: Any = 0
    began = 0.0

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or "")
        folder.mkdir(parents=True, exist_ok=True)
        learned = {name: p.detach() for name, p in self.student.named_parameters() if p.requires_grad}
        (folder / ADAPTERS).write_bytes(save(learned))  # save_file lets the owner alone read it

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.student.load_state_dict(load_file(Path(resume_from_checkpoint) / ADAPTERS), strict=False)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def finish_from(self, checkpoint: str) -> None:
        """What is left to do behind the last step of a training that was killed there."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        self._load_from_checkpoint(self.state.best_model_checkpoint or checkpoint)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.budget is None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.budget.rate)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.tokens = self.tokens + inputs["attention_mask"].sum()
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            rate = float(self.tokens) * self.args.world_size / (time.perf_counter() - self.began)
            logs["tokens_per_s"] = rate
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean loss over all labelled tokens of the held-out examples, without the teacher; on every process."""
        self.student.eval()
        size, total, count = self.args.per_device_train_batch_size, 0.0, 0
        for start in range(0, len(self.held_out), size):
            batch = self._prepare_inputs(self.data_collator(self.held_out[start : start + size]))
            total += float(self.student(**batch, num_items_in_batch=1)["loss"])
            count += int((batch["labels"] != -100).sum())
        metrics = {"eval_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Progress(TrainerCallback):
    """A bar with steps, rate, time left and the last loss. It also measures tokens_per_s."""

    def __init__(self, trainer: _AdapterTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hidden, self.seen = not state.is_world_process_zero, state.global_step
        self.bar = tqdm(
            total=_planned(state), initial=state.global_step, desc="recover", unit="step", disable=hidden or None
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.tokens, self.trainer.began = 0, time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", tokens_per_s=f"{logs['tokens_per_s']:.0f}", refresh=False)
            self.bar.total = _planned(state)
            self.bar.update(state.global_step - self.seen)
            self.seen = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def _planned(state: Any) -> int | None:
    return None if state.max_steps == UNPLANNED else int(state.max_steps)


class _Finish(TrainerCallback):
    """Measures the held-out loss after the last step too."""

    def __init__(self, held_out: bool) -> None:
        self.held_out = held_out

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.held_out and state.global_step >= state.max_steps:
            control.should_evaluate = True


class _Rising(TrainerCallback):
    """Ends a training that ruins the model: its loss is not finite, or 1.2 times what it was before the first step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and not math.isfinite(logs.get("loss", 0.0)):  # before a checkpoint of it is written
            raise SaapError(f"the training loss is not finite at step {state.global_step}: lower recover.learning_rate")

    def on_evaluate(self, args: Any, state: Any, control: Any, *more: Any, model: Any = None, **kwargs: Any) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if not state.global_step and not math.isfinite(losses[0]):
            raise not_finite("the held-out loss before the first step", model)
        if not losses[-1] <= 1.2 * losses[0]:
            raise SaapError(
                f"the held-out loss has risen from {losses[0]:.2f} to {losses[-1]:.2f} by step {state.global_step}: "
                "lower recover.learning_rate"
            )
