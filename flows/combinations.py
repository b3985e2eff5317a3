"""The runs that a [sweep] table stands for. Imports neither torch nor Prefect."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.config import ConfigError, RunConfig, load_config
from tasks.toml import fields_of, read_toml, toml_value

MOST = 10_000


def combinations(config: str, overrides: Sequence[str] = ()) -> list[list[str]]:
    """The overrides of each run: the product of the lists in the file's [sweep] table.

    [sweep]
    "model.path" = ["smollm2-135m", "/models/other"]
    "prune.ratio" = [0.2, 0.5]

    overrides: what is set for all runs; each must be a configuration with them. Raises ConfigError, also when one of
    them sets an axis: the runs would be named by values that they do not have.
    """
    axes = _axes(config)
    if fixed := sorted(
        axis for axis in axes if axis in ("store", "store_remote") or axis.partition(".")[0] == "execute"
    ):
        raise ConfigError(f"{', '.join(fixed)} in {config}: a whole sweep has one, so it cannot be an axis of it")
    texts: dict[str, list[str]] = {path: [toml_value(value) for value in values] for path, values in axes.items()}
    varied = {field for path, values in texts.items() for text in values for field in fields_of(f"{path}={text}")}
    if double := sorted(varied & {field for override in overrides for field in fields_of(override)}):
        raise ConfigError(f"{', '.join(double)}: an axis of the sweep in {config} cannot be set too; change the file")
    for path, values in texts.items():
        if len(set(values)) < len(values):
            double_value = next(value for value in values if values.count(value) > 1)
            raise ConfigError(f"the axis {path} of the sweep in {config} has {double_value} twice")
    found = list(itertools.islice(itertools.product(*texts.values()), MOST + 1))
    if len(found) > MOST:
        raise ConfigError(f"the sweep in {config} has more than {MOST:,} runs: shorten its lists")
    runs = [[f"{path}={text}" for path, text in zip(axes, chosen, strict=True)] for chosen in found]
    for run in runs:
        try:
            load_config(config, (*run, *overrides))
        except ConfigError as error:
            named = f"{', '.join(run)}: " if run is not runs[0] else ""  # what the first has, all may have
            raise ConfigError(f"{named}{error}") from error
    return runs


def base_of(config: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """What all runs of a sweep's file share, as its first run has it; a file without [sweep] as it is.

    Without the values of its axes a file may be none that can be run.
    """
    axes = _axes(config) if "sweep" in read_toml(config) else {}
    chosen = (f"{path}={toml_value(values[0])}" for path, values in axes.items())
    return load_config(config, (*chosen, *overrides))


def _axes(config: str | Path) -> dict[str, list[Any]]:
    """The file's [sweep] table. Raises ConfigError where it is none of lists."""
    axes = read_toml(config).get("sweep")
    if not isinstance(axes, dict) or not axes or not all(isinstance(v, list) and v for v in axes.values()):
        raise ConfigError(f'{config} needs a [sweep] table of lists, e.g. "prune.ratio" = [0.2, 0.5]')
    return axes
