"""The configuration of a run: what a TOML file may say, checked before anything starts.

Nothing here imports torch or Prefect, so that `saap plan` and `--help` start fast.
"""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, ValidationError

from tasks.criteria import needs_of, wrong_search
from tasks.how import Compute, Execute, Section, wrong_execution
from tasks.recovery import Recover, wrong_recovery
from tasks.toml import ConfigError, fields_of, one_line, parse_value, read_toml, sections_of, short
from tasks.values import Amount, Count, Layer, Ratio, Seed, Target, Text, distinct, parse_target

ACCURACIES = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "winogrande", "openbookqa")
PERPLEXITIES = ("wikitext2", "ptb")
Benchmark = Literal[
    "arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "winogrande", "openbookqa", "wikitext2", "ptb"
]


class Model(Section):
    path: Text = Field(
        "smollm2-135m",
        description="'smollm2-135m' or 'gemma3-270m' (embedded), a local folder, or a hub id like org/name",
    )
    revision: Text | None = Field(None, description="hub revision; the newest when absent")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of weights and arithmetic")


class Calibrate(Section):
    count: Count = Field(50, description="calibration sequences")
    length: Annotated[Count, Field(ge=2)] = Field(128, description="tokens a sequence")
    seed: Seed = Field(0, description="which sequences are drawn")
    own: Annotated[int, Field(ge=0, le=10**6)] | Literal["auto"] = Field(
        "auto", description="sequences that the dense model writes itself, added to these; auto: 206 for saap_plus"
    )


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
        "reap",
        "random",
    ] = Field("saap", description="what ranks the groups; [score], [fuse], [fluctuation] are saap's")
    variant: Literal["vectorize", "param_first", "param_mix"] = Field("param_first", description="of llm_pruner")
    query_heads: Literal["as_coded", "served"] = Field(
        "as_coded",
        description="llm_pruner, grouped queries: heads counted as its code does, or those the KV head serves",
    )
    cuts: Annotated[tuple[Ratio, ...], AfterValidator(distinct)] = Field(
        (0.1, 0.2, 0.35), description="ratios below prune.ratio after which saap_plus ranks what is left again"
    )
    take_heads: Literal["pooled", "measured"] = Field(
        "measured", description="saap_plus: heads go where a measured loss says so, at each cut, or as the order has it"
    )

    def cuts_for(self, ratio: float) -> list[float]:
        """Where saap_plus cuts as it ranks: below the plan's ratio, and at that too if heads are measured."""
        return [cut for cut in sorted(self.cuts) if cut < ratio] + [ratio] * (self.take_heads == "measured")


class Prune(Section):
    ratio: Ratio = Field(0.2, description="share of all prunable parameters to remove")
    target: Target | None = Field(
        None,
        description="in place of ratio, which is then found: parameters ('80M'), bytes of weights ('120MB') or "
        "decoding speed beside the dense model's ('1.5x')",
    )
    search: Literal["auto", "global", "uniform", "uniform_down"] = Field(
        "auto",
        description="one budget for all layers, a share of each (heads rounded, or rounded down), or the criterion's",
    )
    direction: Literal["lowest", "highest"] = Field("lowest", description="end of the ranking that is removed")
    kinds: Literal["pooled", "equal", "mlp"] = Field(
        "pooled", description="heads and channels in one order, the same share of each, or channels only"
    )
    heads: Literal["kv", "query"] = Field(
        "kv",
        description="a group of attention: a KV head and its query heads, or a query head (always so with one KV head)",
    )
    compensation: Literal["auto", "none", "bias", "least_squares"] = Field(
        "auto",
        description="for what was removed: its mean as a bias, a refit of what stays, nothing, or the criterion's",
    )
    ridge: Annotated[float, Field(gt=0, le=1e6)] | Literal["held_out"] = Field(
        "held_out",
        description="least_squares: how much the refit holds on to the weights, or the best on text held back",
    )
    protect: Annotated[tuple[Layer, ...], AfterValidator(distinct)] = Field(
        (0, 1, 2, -1), description="layers left whole; negative: from the end"
    )
    align: Count = Field(32, description="MLP channels are kept in multiples of this")

    @property
    def target_is_speed(self) -> bool:
        return self.target is not None and parse_target(self.target)[0] == "speed"


class Evaluate(Section):
    benchmarks: Annotated[tuple[Benchmark, ...], AfterValidator(distinct)] = Field(
        get_args(Benchmark), description="which of the nine"
    )
    variants: Annotated[tuple[Literal["dense", "pruned", "recovered"], ...], AfterValidator(distinct)] = Field(
        ("dense", "pruned", "recovered"), description="which models of the run"
    )
    limit: Amount | None = Field(None, description="first so many items of each accuracy benchmark; all if absent")
    windows: Annotated[tuple[Annotated[Count, Field(ge=2)], ...], AfterValidator(distinct)] = Field(
        (128, 2048), description="perplexity window lengths, tokens"
    )
    max_tokens: Amount | None = Field(None, description="first so many tokens of each text; all if absent")
    bos: Literal["auto", "always", "never"] = Field(
        "auto", description="BOS before each window; auto: if the tokenizer adds one, and not for LLaMA"
    )
    samples: bool = Field(False, description="keep lm-eval's per-sample logs (prompts, answers, log-likelihoods) too")


class Speed(Section):
    prompt_tokens: Count = Field(128, description="tokens of the prompt")
    new_tokens: Annotated[Count, Field(ge=2)] = Field(128, description="tokens generated")
    runs: Annotated[int, Field(ge=0, le=100_000)] = Field(10, description="timed runs; 0 leaves the stage out")
    warmup: Annotated[int, Field(ge=0, le=100_000)] = Field(3, description="runs before timing")
    llama_cpp: bool = Field(False, description="time GGUF exports in llama.cpp too; needs xllamacpp")


class RunConfig(Section):
    name: Annotated[Text, Field(max_length=200)] = Field("run", description="the run's, in tables and Prefect's UI")
    data: Text = Field("mini", description="'mini' (embedded), 'hub', or a folder of data sets")
    store: Text = Field("saap_store", description="folder for artifacts and the warehouse")
    store_remote: Text | None = Field(None, description="shared by hosts: a URL like s3://bucket/prefix, or a folder")
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
    execute: Execute = Field(default_factory=Execute)

    def settled(self) -> "RunConfig":
        """The same with the criterion's choice in the place of 'auto'."""
        needs = needs_of(self.criterion.name)

        def chosen(section: Section, *fields: str) -> Section:
            auto = [field for field in fields if getattr(section, field) == "auto"]
            return section.model_copy(update={field: getattr(needs, field) for field in auto})

        return self.model_copy(
            update={"calibrate": chosen(self.calibrate, "own"), "prune": chosen(self.prune, "search", "compensation")}
        )


def load_config(file: str | Path | None, overrides: tuple[str, ...] = ()) -> RunConfig:
    """A checked configuration from a TOML file (None: the defaults) and `section.field=value` overrides.

    Values of overrides are TOML; what is not TOML is taken as a string. Raises ConfigError.
    """
    values = read_toml(file) if file is not None else {}
    values.pop("sweep", None)  # which runs a sweep makes of the file, not part of any of them
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set takes section.field=value, got {short(override)}")
        set_value(values, path.strip(), parse_value(text.strip()))
    named = {field for override in overrides for field in fields_of(override)} & {"prune.ratio", "prune.target"}
    if len(named) == 1:  # it takes the place of the other in a file
        values["prune"].pop("target" if "prune.ratio" in named else "ratio", None)
    return check_config(values)


def set_value(values: dict[str, Any], path: str, value: Any) -> None:
    """values['a']['b'] = value for the path 'a.b'; a dict for a section sets the fields it names.

    Raises ConfigError for a path that names no field.
    """
    *sections, field = path.split(".")
    if not all(part.strip() for part in (*sections, field)):
        raise ConfigError(f"'{one_line(path)}' names no field: write section.field, as in prune.ratio")
    if (section := sections_of(RunConfig).get(path)) is not None:
        if not isinstance(value, dict):
            raise ConfigError(
                f"{path} is a section: name a field of it, as in {path}.{next(iter(section.model_fields))}"
            )
        for name, item in value.items():
            set_value(values, f"{path}.{name}", item)
        return
    for name in sections:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{one_line(path)} names a field inside {name}, which is not a section")
    values[field] = value


def check_config(values: dict[str, Any]) -> RunConfig:
    """The configuration that the values are. Raises ConfigError, also for values that do not go together."""
    try:
        # as JSON, where a list may stand for a tuple although types are strict: true is no 1, "5" no 5
        config = RunConfig.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors())) from error
    if config.prune.target is not None and "ratio" in config.prune.model_fields_set:
        raise ConfigError("give prune.ratio or prune.target, not both: with a target the ratio is found")
    if wrong := wrong_combination(config):
        raise ConfigError(wrong)
    return config


def wrong_combination(config: RunConfig) -> str | None:
    """What does not go together, in a line, or None."""
    cut = config.prune
    if wrong := wrong_recovery(config.recover) or wrong_search(config.criterion.name, cut.search, cut.direction):
        return wrong
    if config.store.startswith("~"):
        return f"store = '{config.store}': '~' is a shell's word and would be a folder of that name; write the path out"
    again = config.criterion.name == "saap_plus" and config.criterion.cuts_for(config.prune.ratio)
    if again and (cut.search not in ("auto", "global") or cut.direction != "lowest" or cut.kinds != "pooled"):
        return (
            "saap_plus cuts the lowest of all kinds while it ranks: leave prune.search, prune.direction and "
            "prune.kinds as they are, or set criterion.cuts = [] and criterion.take_heads = 'pooled'"
        )
    settled = config.settled()
    measured = again and config.criterion.take_heads == "measured"
    held_out = cut.ridge == "held_out" and (again or settled.prune.compensation == "least_squares")
    there = config.calibrate.count + int(settled.calibrate.own)
    for applies, least, what in (
        (measured, 6, "criterion.take_heads = 'measured'"),
        (held_out, 2, "prune.ridge = 'held_out'"),
        (config.criterion.name == "saap", 2, "the fluctuation of criterion.name = 'saap'"),
    ):
        if applies and there < least:
            return f"{what} needs {least} calibration sequences, not {there}: raise calibrate.count or calibrate.own"
    if config.recover.recipe == "qlora" and "--use_fsdp" in shlex.split(config.compute.launch or ""):
        return "NF4 weights cannot be shared out: with recover.recipe = 'qlora' use --multi_gpu in compute.launch"
    if cut.target_is_speed and not config.speed.runs:
        return f"prune.target = '{cut.target}' is checked by the speed stage: set speed.runs to 1 or more"
    if cut.target_is_speed and config.execute.runner == "ray":
        return f"prune.target = '{cut.target}' is of one machine: with it use execute.runner = 'serial' or 'processes'"
    return wrong_execution(config.compute, config.execute)


def _explain(faults: Any) -> str:
    """The first four fields that are wrong. One that may be of two kinds has a fault for each."""
    said: dict[str, list[str]] = {}
    for fault in faults:
        where, section = _where(fault["loc"])
        if fault["type"] == "extra_forbidden":
            said[where] = [f"unknown config key '{one_line(where)}'; known here: {', '.join(section.model_fields)}"]
            continue
        message = fault["msg"].removeprefix("Value error, ")
        words = said.setdefault(where, [f"config {where}: ", "", f", got {short(fault['input'])}"])
        words[1] += f" or {message.removeprefix('Input should be ')}" if words[1] else message[0].lower() + message[1:]
    return "; ".join("".join(words) for words in list(said.values())[:4])


def _where(place: tuple[int | str, ...]) -> tuple[str, Any]:
    """(section.field of a fault, without the kind of a value that pydantic tried; its section)."""
    section: Any = RunConfig
    for number, part in enumerate(place):
        if part not in section.model_fields:  # unknown
            return ".".join(map(str, place[: number + 1])), section
        if part not in sections_of(section):
            items = [str(item) for item in place[number + 1 :] if isinstance(item, int)]
            return ".".join([*map(str, place[: number + 1]), *items]), section
        section = section.model_fields[part].annotation
    return ".".join(map(str, place)), section
