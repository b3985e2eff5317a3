"""The section [recover] of a configuration, and what does not go together in it."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from tasks.how import Section
from tasks.toml import ConfigError
from tasks.values import Amount, Count, Seed, Share, Text, distinct


class Recover(Section):
    recipe: Literal["groupwise", "lora", "qlora", "none"] = Field(
        "groupwise", description="group-wise codes that merge exactly; peft's LoRA; LoRA over NF4; or no recovery"
    )
    examples: Amount | None = Field(
        None, description="how many to train on; as many as there are instruction rows if absent"
    )
    choose: Literal["long", "first"] = Field(
        "long", description="which instruction rows: of three times as many those of the longest answers, or the first"
    )
    prose: Share = Field(
        0.3, description="share of the examples that is prose; what is neither this nor own is Alpaca's"
    )
    prose_from: Text | None = Field(
        None,
        description="a file of texts, a data folder or 'hub' to draw prose from; as for the calibration if absent",
    )
    own: Share = Field(0.3, description="share of the examples that the dense model writes itself")
    bits: Annotated[int, Field(ge=2, le=8)] = Field(4, description="of a groupwise code")
    group_size: Annotated[Count, Field(ge=2)] = Field(32, description="inputs that share a scale and a zero")
    groups: Count | None = Field(
        None, description="scales a row has, whatever its width; takes the place of group_size"
    )
    rounding: Literal["nearest", "feedback"] = Field(
        "nearest", description="each weight to its nearest code, or codes that make up for each other's rounding"
    )
    rank: Count = Field(64, description="rank of the adapters")
    alpha: Annotated[float, Field(gt=0, le=1e6)] = Field(16.0, description="adapters are scaled by alpha / rank")
    targets: Annotated[tuple[Text, ...], AfterValidator(distinct)] = Field(
        (), description='layers with an adapter, e.g. ["q_proj", "v_proj"]; all if empty'
    )
    epochs: Annotated[float, Field(gt=0, le=10_000)] = Field(1.0, description="passes over the rows")
    minutes: Annotated[float, Field(gt=0, le=100_000)] | None = Field(
        None, description="train for so long in place of epochs; the first steps say how many there will be"
    )
    batch_size: Count = Field(8, description="examples an optimiser step")
    micro_batch_size: Count = Field(8, description="examples at once on a device; in no key")
    learning_rate: Annotated[float, Field(gt=0, le=100)] = Field(5e-4, description="AdamW")
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = Field(10, description="optimiser steps of linear warm-up")
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="learning rate after the warm-up")
    max_length: Annotated[Count, Field(ge=8)] = Field(256, description="tokens an example is cut at")
    loss_on: Literal["response", "text"] = Field("response", description="loss on the answer, or on the prompt too")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="of the arithmetic in training; float16 on a GPU only"
    )
    gradient_checkpointing: bool = Field(False, description="less memory for activations, a third more time; in no key")
    distill: Share = Field(
        0.0, description="share in the loss of KL(dense model ‖ this one); 0: plain cross-entropy, no dense model held"
    )
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.04, description="share of the rows, the last ones, 128 at most, to choose the best checkpoint by"
    )
    patience: Count | None = Field(
        None, description="stop when the held-out loss has not fallen so many times in a row; never if absent"
    )
    save_steps: Count = Field(50, description="optimiser steps between checkpoints to resume from, and held-out losses")
    seed: Seed = Field(
        0, description="data order, adapters at the start, what is held out, and which prose and own text"
    )

    @property
    def shares(self) -> dict[str, float]:
        """Of the examples that are no instructions."""
        return {"prose": self.prose, "own": self.own}

    @property
    def instructions(self) -> int | None:
        """How many of the examples are instructions; None without a number of examples."""
        return None if self.examples is None else self.examples - sum(counts(self.shares, self.examples).values())


def counts(shares: dict[str, float], examples: int) -> dict[str, int]:
    """How many of so many examples are prose, and how many the model's own. shares: of these two."""
    prose = round(shares["prose"] * examples)
    return {"prose": prose, "own": round((shares["prose"] + shares["own"]) * examples) - prose}


def check_rows(examples: int, others: int, rows: int) -> None:
    """Raises ConfigError where so many instruction rows and other sequences are fewer than the examples."""
    if rows < examples - others:
        beside = f" beside {others} other sequences" if others else ""
        raise ConfigError(
            f"recover.examples = {examples} asks for {examples - others} instruction rows{beside}, the data has "
            f"{rows}: lower it, or raise recover.prose or recover.own"
        )


def wrong_recovery(recover: Recover) -> str | None:
    """What does not go together, in a line."""
    if recover.batch_size % recover.micro_batch_size:
        return "recover.batch_size must be a multiple of recover.micro_batch_size"
    if recover.recipe == "none":
        return None
    if recover.prose + recover.own > 1:
        return (
            f"recover.prose = {recover.prose} and recover.own = {recover.own} are shares of the examples: together at "
            "most 1"
        )
    if recover.examples is None and recover.prose + recover.own == 1:
        return "recover.prose and recover.own leave no instruction rows to count: say how many recover.examples"
    shares = recover.shares
    for name, count in {} if recover.examples is None else counts(shares, recover.examples).items():
        if (share := shares[name]) and not count:
            return f"recover.{name} = {share} of recover.examples = {recover.examples} is less than one: raise either"
    held_out = None if recover.examples is None else min(int(recover.examples * recover.held_out), 128)
    if recover.patience is not None and (not recover.held_out or held_out == 0):
        return "recover.patience needs a held-out part: raise recover.held_out or recover.examples"
    if recover.examples is not None and recover.examples - (held_out or 0) < recover.micro_batch_size:
        return (
            f"recover.examples = {recover.examples} leaves fewer to train on than recover.micro_batch_size = "
            f"{recover.micro_batch_size}: raise the one or lower the other"
        )
    return None
