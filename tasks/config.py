"""The configuration of a run: what a TOML file may say, checked before anything starts.

Nothing here imports torch or Prefect, so that `saap plan` and `--help` start fast.
"""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ACCURACIES = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "winogrande", "openbookqa")
PERPLEXITIES = ("wikitext2", "ptb")
Benchmark = Literal[
    "arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "winogrande", "openbookqa", "wikitext2", "ptb"
]
Positive = Annotated[int, Field(ge=1)]


class ConfigError(ValueError):
    """A configuration that cannot be run. The message is one line."""

    exit_code = 2


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(Section):
    path: str = Field(
        "smollm2-135m", description="'smollm2-135m' (embedded), a local folder, or a hub id like org/name"
    )
    revision: str | None = Field(None, description="hub revision; the newest when absent")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of weights and arithmetic")


class Calibrate(Section):
    count: Positive = Field(50, description="calibration sequences")
    length: Annotated[int, Field(ge=2)] = Field(128, description="tokens a sequence")
    seed: int = Field(0, description="which sequences are drawn")


class Score(Section):
    hessian: Literal["none", "fisher"] = Field("none", description="second-order term in the coarse score too")
    vector_unit: Literal["row", "group"] = Field("row", description="what the coarse score sums before |·|")


class Fuse(Section):
    fusion: Literal["adaptive", "weighted", "vector", "element"] = Field("adaptive", description="eq. 9, or simpler")
    lambda_scope: Literal["kind", "layer_kind", "global", "group"] = Field("kind", description="where λ is shared")


class Fluctuation(Section):
    fluctuation: Literal["var_weight", "var", "cv", "mean"] = Field("var_weight", description="eq. 10, or simpler")
    asi_scope: Literal["layer_kind", "kind", "global"] = Field(
        "layer_kind", description="over what ASI is standardised"
    )


class Criterion(Section):
    name: Literal[
        "saap",
        "saap_plus",
        "saap_gates",
        "llm_pruner",
        "wanda_sp",
        "flap",
        "gisp",
        "hywia",
        "loraprune",
        "lorashear",
        "magnitude",
        "random",
    ] = Field("saap", description="what ranks the groups; [score], [fuse], [fluctuation] are saap's")
    variant: Literal["vectorize", "param_first", "param_mix"] = Field("param_first", description="of llm_pruner")
    query_heads: Literal["as_coded", "served"] = Field(
        "as_coded",
        description="llm_pruner, grouped queries: heads counted as its code does, or those the KV head serves",
    )
    cuts: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.1, 0.2, 0.35), description="ratios below prune.ratio after which saap_plus ranks what is left again"
    )


class Prune(Section):
    ratio: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="share of all prunable parameters to remove")
    search: Literal["auto", "global", "uniform", "uniform_down"] = Field(
        "auto",
        description="one budget for all blocks, a share of each (heads rounded, or rounded down), or as published",
    )
    direction: Literal["lowest", "highest"] = Field("lowest", description="end of the ranking that is removed")
    kinds: Literal["pooled", "equal", "mlp"] = Field(
        "pooled", description="heads and channels in one order, the same share of each, or channels only"
    )
    compensation: Literal["auto", "none", "bias", "least_squares"] = Field(
        "auto",
        description="for what was removed: its mean as a bias, a refit of what stays, nothing, or the criterion's",
    )
    protect: tuple[int, ...] = Field((0, 1, 2, -1), description="blocks left whole; negative: from the end")
    align: Positive = Field(32, description="MLP channels are kept in multiples of this")


class Recover(Section):
    recipe: Literal["groupwise", "lora", "qlora", "none"] = Field(
        "groupwise", description="group-wise codes that merge exactly; peft's LoRA; LoRA over NF4; or no recovery"
    )
    examples: Positive | None = Field(
        None, description="instruction rows to train on, the first so many; all if absent"
    )
    bits: Annotated[int, Field(ge=2, le=8)] = Field(4, description="of a groupwise code")
    group_size: Annotated[int, Field(ge=2)] = Field(32, description="inputs that share a scale and a zero")
    groups: Positive | None = Field(
        None, description="scales a row has, whatever its width; takes the place of group_size"
    )
    rank: Positive = Field(64, description="rank of the adapters")
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="adapters are scaled by alpha / rank")
    targets: tuple[str, ...] = Field((), description='layers with an adapter, e.g. ["q_proj", "v_proj"]; all if empty')
    epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="passes over the rows")
    batch_size: Positive = Field(8, description="examples an optimiser step")
    micro_batch_size: Positive = Field(8, description="examples at once on a device")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="AdamW")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(10, description="optimiser steps of linear warm-up")
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="learning rate after the warm-up")
    max_length: Annotated[int, Field(ge=8)] = Field(256, description="tokens an example is cut at")
    loss_on: Literal["response", "text"] = Field("response", description="loss on the answer, or on the prompt too")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="of the arithmetic in training; float16 on a GPU only"
    )
    gradient_checkpointing: bool = Field(False, description="less memory for activations, a third more time")
    distill: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share in the loss of KL(dense model ‖ this one); 0: plain cross-entropy, no dense model held"
    )
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.04, description="share of the rows, the last ones, 128 at most, to choose the best checkpoint by"
    )
    patience: Positive | None = Field(
        None, description="stop when the held-out loss has not fallen so many times in a row; never if absent"
    )
    save_steps: Positive = Field(
        50, description="optimiser steps between checkpoints to resume from, and held-out losses"
    )
    seed: int = Field(0, description="data order and adapter initialisation")


class Evaluate(Section):
    benchmarks: tuple[Benchmark, ...] = Field(get_args(Benchmark), description="which of the nine")
    variants: tuple[Literal["dense", "pruned", "recovered"], ...] = Field(
        ("dense", "pruned", "recovered"), description="which models of the run"
    )
    limit: Positive | None = Field(None, description="first so many items of each accuracy benchmark; all if absent")
    windows: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (128, 2048), description="perplexity window lengths, tokens"
    )
    max_tokens: Positive | None = Field(None, description="first so many tokens of each text; all if absent")
    samples: bool = Field(False, description="keep lm-eval's per-sample logs (prompts, answers, log-likelihoods) too")


class Speed(Section):
    prompt_tokens: Positive = Field(128, description="tokens of the prompt")
    new_tokens: Annotated[int, Field(ge=2)] = Field(128, description="tokens generated")
    runs: Annotated[int, Field(ge=0)] = Field(10, description="timed runs; 0 leaves the stage out")
    warmup: Annotated[int, Field(ge=0)] = Field(3, description="runs before timing")
    llama_cpp: bool = Field(False, description="time GGUF exports in llama.cpp too; needs xllamacpp")


class Compute(Section):
    """How the work is done. Never part of a stage key: it changes time and memory, not results."""

    device: str = Field("auto", description="auto (a GPU if there is one), cpu, cuda, cuda:1 …")
    threads: Positive | None = Field(None, description="CPU threads; all cores if absent")
    batch_size: Positive = Field(8, description="sequences at once in evaluation and statistics")
    offload: bool = Field(
        False, description="score and prune a model larger than the device: its blocks come from disk one by one"
    )
    launch: str | None = Field(
        None,
        description="train in several processes: arguments of `accelerate launch`; '--multi_gpu' or '--use_fsdp'",
    )


class RunConfig(Section):
    name: str = Field("run", min_length=1, description="what the run is called in tables and in Prefect's UI")
    data: str = Field("mini", description="'mini' (embedded), 'hub', or a folder of data sets")
    store: str = Field("saap_store", description="folder for artifacts and the warehouse")
    model: Model = Field(default_factory=Model)
    calibrate: Calibrate = Field(default_factory=Calibrate)
    score: Score = Field(default_factory=Score)
    fuse: Fuse = Field(default_factory=Fuse)
    fluctuation: Fluctuation = Field(default_factory=Fluctuation)
    criterion: Criterion = Field(default_factory=Criterion)
    prune: Prune = Field(default_factory=Prune)
    recover: Recover = Field(default_factory=Recover)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    speed: Speed = Field(default_factory=Speed)
    compute: Compute = Field(default_factory=Compute)


def load_config(file: str | Path | None, overrides: tuple[str, ...] = ()) -> RunConfig:
    """A checked configuration from a TOML file (None: the defaults) and `section.field=value` overrides.

    Values of overrides are TOML; what is not TOML is taken as a string. Raises ConfigError.
    """
    values = read_toml(file) if file is not None else {}
    values.pop("sweep", None)  # which runs a sweep makes of the file, not part of any of them
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set takes section.field=value, got '{override}'")
        set_value(values, path.strip(), parse_value(text.strip()))
    return check_config(values)


def default_toml() -> str:
    """Every field with its default and description, as a TOML file that `load_config` reads back to the defaults."""
    lines = ["# Everything a run can be told, with the defaults. Leave out what you do not change."]
    sections: list[tuple[str | None, Any]] = [
        (None, RunConfig),
        *((name, f.annotation) for name, f in RunConfig.model_fields.items()),
    ]
    for name, section in sections:
        if not hasattr(section, "model_fields"):
            continue
        if name is not None:
            lines += ["", f"[{name}]"]
        for field, about in section.model_fields.items():
            if about.description is None:
                continue  # a section of its own
            value = f"{field} = {_toml(about.default)}" if about.default is not None else f"# {field} ="
            lines.append(f"{value:<40} # {about.description}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value)


def read_toml(file: str | Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"cannot read the config {file}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error


def parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def set_value(values: dict[str, Any], path: str, value: Any) -> None:
    """values['a']['b'] = value for the path 'a.b'."""
    *sections, field = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{path} names a field inside {section}, which is not a section")
    values[field] = value


def check_config(values: dict[str, Any]) -> RunConfig:
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(fault) for fault in error.errors())) from error
    if config.recover.batch_size % config.recover.micro_batch_size:
        raise ConfigError("recover.batch_size must be a multiple of recover.micro_batch_size")
    return config


def _explain(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        section: Any = RunConfig
        for part in fault["loc"][:-1]:
            section = section.model_fields[part].annotation
        return f"unknown config key '{where}'; known here: {', '.join(section.model_fields)}"
    return f"config {where}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"
