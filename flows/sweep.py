"""Many runs of one configuration: every combination of the values of a [sweep] table."""

import itertools
from typing import Any

from prefect import flow

from flows.job import prepare
from flows.run import flow_of
from tasks.config import ConfigError, check_config, load_config, read_toml, set_value


def combinations(config: str) -> list[list[str]]:
    """The overrides of each run: the product of the lists in the file's [sweep] table. Raises ConfigError.

    [sweep]
    "model.path" = ["smollm2-135m", "/models/other"]
    "prune.ratio" = [0.2, 0.5]
    """
    values = read_toml(config)
    axes = values.pop("sweep", None)
    if not isinstance(axes, dict) or not all(isinstance(v, list) and v for v in axes.values()):
        raise ConfigError(f'{config} needs a [sweep] table of lists, e.g. "prune.ratio" = [0.2, 0.5]')
    found = []
    for chosen in itertools.product(*axes.values()):
        checked: dict[str, Any] = read_toml(config)
        del checked["sweep"]
        for path, value in zip(axes, chosen, strict=True):
            set_value(checked, path, value)
        check_config(checked)
        found.append([f"{path}={_toml(value)}" for path, value in zip(axes, chosen, strict=True)])
    return found


@flow(name="saap-sweep", validate_parameters=False)
def saap_sweep(config: str, overrides: list[str] | None = None) -> list[str]:
    """Run every combination, one after the other; what they share is computed once. Returns the run ids.

    A run that fails does not stop the others; the sweep then fails at the end, naming how many did.
    """
    run_ids, failed = [], []
    for chosen in combinations(config):
        asked = [*chosen, *(overrides or [])]
        try:
            job = prepare(load_config(config, tuple(asked)))
            run_ids.append(flow_of(job)(config, asked))
        except Exception as error:
            failed.append(f"{', '.join(chosen)}: {error}")
    if failed:
        raise ConfigError(f"{len(failed)} of {len(failed) + len(run_ids)} runs failed: {'; '.join(failed)}"[:500])
    return run_ids


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
