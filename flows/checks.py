"""Finds before a run what would end it at a late stage. Imports torch, but only inside the functions."""

import contextlib
import io
import shlex
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tasks.config import ACCURACIES, RunConfig
from tasks.criteria import NEEDS, needs_of
from tasks.families import check_family
from tasks.model_source import ModelSource, embedded_config
from tasks.stages.prune import check_removed, prune_params
from tasks.toml import ConfigError


@dataclass(frozen=True)
class Facts:
    """A model as its files describe it: empty (on the meta device), its config, its coupled groups, the last names of
    its linear layers.

    tokens, begins, ends: how many tokens the tokenizer has, whether it has one for the beginning of a text, and one for
    its end. behind: whether windows begin with BOS by `evaluate.bos = "auto"`.
    """

    model: Any
    config: Any
    groups: Any
    linears: frozenset[str]
    tokens: int
    begins: bool
    ends: bool
    behind: bool


def check_remote(config: RunConfig, *, look_only: bool = False) -> None:
    """Whether the remote store can be read and, without look_only, written. Raises StorageError."""
    if config.store_remote is not None:
        from storage.remote import remote_of

        remote_of(config.store_remote).files.check(Path(config.store), write=not look_only)


def check_before_start(config: RunConfig, source: ModelSource) -> None:
    """What can be known of a run without computing anything. `source` is the model of the configuration.

    Raises ConfigError or SaapError, in one line that says what to do: for a device that is not there, a model that
    cannot be read or is of a family that cannot do what is asked, a tokenizer that does not fit it, a plan that cannot
    be reached, sizes beyond the model's positions.
    """
    _check_device(config)
    _check_launch(config)
    if config.execute.runner == "ray" and find_spec("prefect_ray") is None:
        raise ConfigError("execute.runner = 'ray' needs Ray: pip install -c constraints.txt 'saap[ray]'")
    if config.speed.llama_cpp and find_spec("xllamacpp") is None:
        raise ConfigError("speed.llama_cpp needs llama.cpp: pip install -c constraints.txt xllamacpp")
    facts = facts_of(source, config.prune.heads)
    _check_family(config, facts)
    _check_offload(config, source)
    _check_tokenizer(config, source, facts)
    _check_llama_cpp(config, source, facts)
    _check_plan(config, facts)
    _check_lengths(config, facts)


@lru_cache(maxsize=32)
def facts_of(source: ModelSource, heads: str = "kv") -> Facts:
    """Facts of a model, from config.json, the headers of the weight files and the tokenizer; read once a process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from saap import calibration_bos, choose_heads, discover, load_tokenizer
    from saap.models.checkpoint import load_config
    from saap.models.validation import check_sizes

    if source.kind == "gguf":
        config: Any = AutoConfig.for_model(**embedded_config(source.path))
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        tokens, begins, ends, behind = config.vocab_size, True, True, False  # they have positions to spare
    else:
        config = load_config(source.path)
        if getattr(config, "groupwise", None):
            raise ConfigError(
                f"the model in {source.path} is in int4 codes, and pruning needs float weights: give the pruned model "
                f"it was made from, or what `saap export uniform {source.path} FOLDER` writes"
            )
        model = check_sizes(config, source.path)
        tokenizer = load_tokenizer(source.path)
        begins, ends = (token is not None for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
        tokens, behind = len(tokenizer), calibration_bos(config.model_type, tokenizer) is not None
    linears = {
        name.rpartition(".")[2]
        for layer in _layers(model)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    choose_heads(model, heads)
    return Facts(model, config, discover(model), frozenset(linears), tokens, begins, ends, behind)


def _layers(model: Any) -> Any:
    from saap import family_of

    return family_of(model.config).layers(model)


def _check_device(config: RunConfig) -> None:
    import torch

    if config.execute.runner == "ray":
        return  # the nodes have the devices
    device, there = config.compute.device, torch.cuda.device_count()
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= there:
        raise ConfigError(
            f"compute.device = '{device}' is not there: torch finds {there} GPUs; give 'auto', 'cpu' or one of them"
        )
    on_cpu = device == "cpu" or (device == "auto" and not there)
    if not on_cpu and config.execute.slots > there:
        raise ConfigError(f"execute.slots = {config.execute.slots}, but torch finds {there} GPUs: a slot has one")
    if on_cpu and config.recover.recipe != "none" and config.recover.precision == "float16":
        raise ConfigError("recover.precision = 'float16' needs a GPU: use 'bfloat16' or 'float32'")


def _check_launch(config: RunConfig) -> None:
    """Whether accelerate takes the arguments, and would start our program with them and no other."""
    arguments, ours = config.compute.launch, ["-m", "saap.recovery.launch", "job"]
    if arguments is None or config.recover.recipe == "none":
        return
    from accelerate.commands.launch import launch_command_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parsed = launch_command_parser().parse_args([*shlex.split(arguments), *ours])
        script, processes = parsed.training_script, parsed.num_processes or 1  # None: a file of accelerate's says it
    except SystemExit:
        script, processes = "", 1
    if script != ours[1]:
        why = said.getvalue().strip().rpartition("error: ")[2].splitlines() if "error: " in said.getvalue() else []
        raise ConfigError(
            f"compute.launch = '{arguments}' is not what `accelerate launch` takes before a program"
            f"{': ' + why[0] if why else ''}; give options like --multi_gpu --num_processes 2"
        )
    if config.recover.batch_size % (config.recover.micro_batch_size * processes):
        raise ConfigError(
            f"recover.batch_size = {config.recover.batch_size} must be a multiple of recover.micro_batch_size = "
            f"{config.recover.micro_batch_size} times the {processes} processes of compute.launch: lower "
            "recover.micro_batch_size"
        )


def _check_family(config: RunConfig, facts: Facts) -> None:
    from saap import family_of
    from saap.models.families import Experts

    kind, recover = facts.config.model_type, config.recover
    if isinstance(family_of(facts.config), Experts):
        _check_experts(config, kind)
    if recover.recipe == "groupwise" and not family_of(facts.config).int4:
        raise ConfigError(f"{kind} has no int4 recovery: set recover.recipe to 'lora', 'qlora' or 'none'")
    unknown = sorted(set(recover.targets) - facts.linears)
    if recover.recipe != "none" and unknown:
        raise ConfigError(
            f"no layer is called {', '.join(unknown)}: recover.targets may name {', '.join(sorted(facts.linears))}"
        )


def _check_llama_cpp(config: RunConfig, source: ModelSource, facts: Facts) -> None:
    """Whether what llama.cpp is timed on can be written."""
    if not config.speed.llama_cpp:
        return
    from gguf import GGUFWriter

    from saap import load_tokenizer
    from saap.export.gguf import check_config
    from saap.export.vocabulary import write_vocabulary

    check_config(facts.config)
    if source.kind == "folder":
        write_vocabulary(GGUFWriter(None, "deci"), load_tokenizer(source.path), facts.config.vocab_size)


def _check_experts(config: RunConfig, kind: str) -> None:
    """What mixtures of experts do not have yet; searches and kinds are the plan's to refuse."""
    name, cut = config.criterion.name, prune_params(config)
    if not needs_of(name).experts:
        able = ", ".join(known for known, needs in NEEDS.items() if needs.experts)
        raise ConfigError(f"criterion '{name}' does not rank the experts of a {kind}: criterion.name may be {able}")
    if name == "reap" and cut["search"] != "global" and cut["kinds"] != "mlp":
        raise ConfigError(
            f"reap ranks no heads, of which prune.search = '{cut['search']}' takes a share: set prune.kinds to 'mlp'"
        )
    if cut["compensation"] == "bias":
        raise ConfigError(
            f"prune.compensation = 'bias' is not made for experts ({kind}): set it to 'least_squares' or 'none'"
        )
    if config.prune.target_is_speed:
        raise ConfigError(
            f"a target of speed is not made for experts ({kind}): give prune.target in parameters or bytes"
        )
    if config.compute.offload:
        raise ConfigError(f"compute.offload is not made for experts ({kind}): set it to false")


def _check_offload(config: RunConfig, source: ModelSource) -> None:
    if config.compute.offload and source.kind == "folder" and check_family(source.path)["model_type"] == "baichuan":
        raise ConfigError(
            f"compute.offload does not go with the Baichuan in {source.path}, whose W_pack is split when it is loaded: "
            "set it to false, or give the folder that saap.save(saap.load(…), folder, saap.load_tokenizer(…)) writes"
        )


def _check_tokenizer(config: RunConfig, source: ModelSource, facts: Facts) -> None:
    if facts.tokens > facts.config.vocab_size:
        raise ConfigError(
            f"the tokenizer in {source.path} has {facts.tokens} tokens, the model embeddings for "
            f"{facts.config.vocab_size}: give the tokenizer that belongs to it"
        )
    measured = set(config.evaluate.benchmarks) if config.evaluate.variants else set()
    if config.evaluate.bos == "always" and measured - set(ACCURACIES) and not facts.begins:
        raise ConfigError(
            f"the tokenizer in {source.path} has no BOS token: set evaluate.bos to 'auto' or 'never', or bos_token in "
            "its tokenizer_config.json"
        )
    answers = bool(measured & set(ACCURACIES))
    if not facts.ends and (config.recover.recipe != "none" or answers):
        raise ConfigError(
            f"the tokenizer in {source.path} names no end-of-text token, which recovery teaches and lm-eval needs: set "
            "eos_token in its tokenizer_config.json or eos_token_id in config.json"
        )


def _check_plan(config: RunConfig, facts: Facts) -> None:
    """Whether the ratio can be reached, which does not depend on the scores. That of a target has yet to be found."""
    if config.prune.target is not None and "ratio" not in config.prune.model_fields_set:
        return
    import numpy as np

    from saap import select

    cut = config.settled().prune
    widest = max((len(index) for _, kind, index in facts.groups.structures() if kind == "mlp"), default=0)
    if cut.kinds != "attention" and cut.align > widest:
        raise ConfigError(f"prune.align = {cut.align} is more than the {widest} channels of the widest MLP: lower it")
    score = np.zeros(len(facts.groups))
    options: dict[str, Any] = {"protect": cut.protect, "align": cut.align}
    keep = select(
        score, facts.groups, cut.ratio, search=cut.search, direction=cut.direction, kinds=cut.kinds, **options
    )
    if cut.search != "global":  # the same number of each whatever their scores
        check_removed(keep, prune_params(config))


def _check_lengths(config: RunConfig, facts: Facts) -> None:
    """Sizes beyond the positions of the model, and windows beyond the text."""
    positions = getattr(facts.config, "max_position_embeddings", None)  # ALiBi models have no limit
    if positions is not None and config.calibrate.length > positions:
        raise ConfigError(f"calibrate.length = {config.calibrate.length} is beyond the model's {positions} positions")
    recover = config.recover
    prose = recover.recipe != "none" and recover.prose + recover.own > 0
    if positions is not None and prose and recover.max_length > positions:
        raise ConfigError(
            f"recover.max_length = {recover.max_length}, the tokens of a sequence of prose or own text, is beyond the "
            f"model's {positions} positions: lower it"
        )
    speed = config.speed
    if positions is not None and speed.runs and speed.prompt_tokens + speed.new_tokens > positions:
        raise ConfigError(
            f"speed.prompt_tokens = {speed.prompt_tokens} and speed.new_tokens = {speed.new_tokens} are beyond the "
            f"model's {positions} positions together: lower one of them"
        )
    options = config.evaluate
    if set(options.benchmarks) <= set(ACCURACIES) or not options.variants:
        return
    behind = int(options.bos == "always" or (options.bos == "auto" and facts.behind))
    windows = [window for window in options.windows if positions is None or window + behind <= positions]
    if not options.windows:
        raise ConfigError("evaluate.windows is empty: name at least one, as in [128]")
    if not windows:
        raise ConfigError(
            f"every window of evaluate.windows is beyond the model's {positions} positions"
            f"{' behind a BOS' * behind}: name a shorter one"
        )
    if options.max_tokens is not None and options.max_tokens < max(windows):
        raise ConfigError(
            f"evaluate.max_tokens = {options.max_tokens} is less than the window of {max(windows)} tokens: raise it, "
            "or leave that window out of evaluate.windows"
        )
