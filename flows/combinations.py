"""The runs that a [sweep] table stands for. Imports neither torch nor Prefect."""

import itertools
from collections.abc import Sequence

from tasks.config import ConfigError, load_config
from tasks.toml import parse_value, read_toml, toml_value

MOST = 10_000


def combinations(config: str, overrides: Sequence[str] = ()) -> list[list[str]]:
    """The overrides of each run: the product of the lists in the file's [sweep] table.

    [sweep]
    "model.path" = ["smollm2-135m", "/models/other"]
    "prune.ratio" = [0.2, 0.5]

    overrides: what is set for all runs; each must be a configuration with them. Raises ConfigError, also when one of
    them sets an axis: the runs would be named by values that they do not have.
    """
    axes = read_toml(config).get("sweep")
    if not isinstance(axes, dict) or not axes or not all(isinstance(v, list) and v for v in axes.values()):
        raise ConfigError(f'{config} needs a [sweep] table of lists, e.g. "prune.ratio" = [0.2, 0.5]')
    if fixed := sorted(
        axis for axis in axes if axis in ("store", "store_remote") or axis.partition(".")[0] == "execute"
    ):
        raise ConfigError(f"{', '.join(fixed)} in {config}: a whole sweep has one, so it cannot be an axis of it")
    if double := sorted(axes.keys() & {field for override in overrides for field in _fields(override)}):
        raise ConfigError(f"{', '.join(double)}: an axis of the sweep in {config} cannot be set too; change the file")
    texts: dict[str, list[str]] = {path: [toml_value(value) for value in values] for path, values in axes.items()}
    for path, values in texts.items():
        if len(set(values)) < len(values):
            double_value = next(value for value in values if values.count(value) > 1)
            raise ConfigError(f"the axis {path} of the sweep in {config} has {double_value} twice")
    found = list(itertools.islice(itertools.product(*texts.values()), MOST + 1))
    if len(found) > MOST:
        raise ConfigError(f"the sweep in {config} has more than {MOST:,} runs: shorten its lists")
    runs = [[f"{path}={text}" for path, text in zip(axes, chosen, strict=True)] for chosen in found]
    for run in runs:
        load_config(config, (*run, *overrides))
    return runs


def _fields(override: str) -> list[str]:
    """What an override sets: one field, or those of a whole section."""
    path, _, text = override.partition("=")
    value = parse_value(text)
    return [f"{path.strip()}.{name}" for name in value] if isinstance(value, dict) else [path.strip()]
