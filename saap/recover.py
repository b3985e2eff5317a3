"""Recovery: fine-tune a pruned model as an int4 model, so that nothing is to be quantised afterwards (SAAP §III-D)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from saap.adapter import add_adapters, merge_adapters
from saap.errors import SaapError
from saap.quantize import to_groupwise
from saap.texts import alpaca_example


@dataclass(frozen=True)
class TrainingStep:
    """One logged optimiser step; loss is the mean over the steps since the last one logged."""

    step: int
    epoch: float
    loss: float
    learning_rate: float


def recover(
    model: nn.Module,
    rows: list[dict[str, str]],
    tokenizer: Any,
    work: str | Path,
    *,
    group_size: int = 32,
    rank: int = 64,
    alpha: float = 16.0,
    epochs: float = 2.0,
    batch_size: int = 128,
    micro_batch_size: int = 8,
    learning_rate: float = 1e-4,
    warmup_steps: int = 100,
    max_length: int = 256,
    save_steps: int = 50,
    seed: int = 0,
) -> tuple[nn.Module, list[TrainingStep]]:
    """Quantise to group-wise int4, train pooled adapters on Alpaca rows, merge them into the float zeros.

    Args:
        model: float model (its weights are quantised, not changed in place); rows: instruction, input, output.
        work: folder for the trainer's checkpoints. When it holds one of an interrupted call with the same arguments,
            training goes on from there, with the same data order, optimiser and random state.
        batch_size: examples an optimiser step; micro_batch_size: examples at once on the device (divides it).
        learning_rate: AdamW, linear warm-up over warmup_steps optimiser steps, then linear to zero.
        max_length: tokens an example is cut at. Loss is on the response only.

    Returns the int4 model, merged, and the logged steps.
    Raises SaapError for bad arguments or a loss that is not finite.
    """
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments, set_seed
    from transformers.trainer_callback import TrainerCallback

    if micro_batch_size < 1 or batch_size < 1 or batch_size % micro_batch_size:
        raise SaapError(f"batch_size {batch_size} must be a multiple of micro_batch_size {micro_batch_size}")
    examples = [alpaca_example(row, tokenizer, max_length) for row in rows]
    examples = [e for e in examples if any(label != -100 for label in e["labels"])]
    if len(examples) < micro_batch_size:
        raise SaapError(
            f"recovery has {len(examples)} examples whose answer begins within max_length {max_length}, "
            f"fewer than micro_batch_size {micro_batch_size}: give more examples or raise max_length"
        )

    class AdapterTrainer(Trainer):
        """Saves and restores the adapters only: the int4 weights never change."""

        def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
            folder = Path(output_dir or work)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(_trained_state(small), folder / "adapters.safetensors")

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return _Order([e["length"] for e in examples], batch_size, seed)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
            state = load_file(Path(resume_from_checkpoint) / "adapters.safetensors")
            small.load_state_dict(state, strict=False)

    class Bar(TrainerCallback):
        """Steps, rate and time left, with the last loss."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="recover", unit="step")

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)
                self.bar.update(state.global_step - self.bar.n)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    set_seed(seed)
    device = next(model.parameters()).device
    small = to_groupwise(model, group_size)
    add_adapters(small, rank, alpha)
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=epochs,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=batch_size // micro_batch_size,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a ruined model must show
        save_steps=save_steps,
        save_total_limit=2,
        seed=seed,
        use_cpu=device.type == "cpu",
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
        disable_tqdm=True,
    )
    trainer = AdapterTrainer(
        model=small,
        args=arguments,
        train_dataset=_Examples(examples),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[Bar()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_checkpoint(Path(work)))
    steps = [
        TrainingStep(int(entry["step"]), entry["epoch"], entry["loss"], entry["learning_rate"])
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    bad = [s.step for s in steps if not torch.isfinite(torch.tensor(s.loss))]
    if bad:
        raise SaapError(f"the training loss is not finite at step {bad[0]}: lower recover.learning_rate")
    return merge_adapters(small).eval(), steps


class _Order(torch.utils.data.Sampler):
    """Examples of like length together, in an order that depends on the seed and the epoch alone.

    The trainer's own grouping draws from the global random state, which differs after resuming inside an epoch.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class _Examples(torch.utils.data.Dataset):
    def __init__(self, examples: list[dict[str, Any]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: self.examples[index][name] for name in ("input_ids", "labels")}


def _trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def _last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that was written to the end: the trainer writes trainer_state.json last."""
    folders = sorted(work.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    for folder in reversed(folders):
        try:
            json.loads((folder / "trainer_state.json").read_text())
            return str(folder)
        except (OSError, json.JSONDecodeError):
            continue
    return None
