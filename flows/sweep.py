"""Many runs of one configuration: every combination of the values of a [sweep] table."""

from prefect import flow

from flows.combinations import combinations
from flows.job import check_all, prepare
from flows.run import flow_of
from tasks.config import ConfigError, load_config


@flow(name="saap-sweep", validate_parameters=False)
def saap_sweep(config: str, overrides: list[str] | None = None) -> list[str]:
    """Run every combination, one after the other; what they share is computed once. Returns the run ids.

    What can be known before is checked for all runs first. A run that fails does not stop the others; the sweep then
    fails at the end, naming how many did.
    """
    run_ids, failed, overrides = [], [], overrides or []
    runs = combinations(config, overrides)
    check_all(config, runs, overrides)
    for chosen in runs:
        asked = [*chosen, *overrides]
        try:
            job = prepare(load_config(config, tuple(asked)))
            run_ids.append(flow_of(job)(config, asked))
        except Exception as error:
            failed.append(f"{', '.join(chosen)}: {error}")
    if failed:
        raise ConfigError(f"{len(failed)} of {len(failed) + len(run_ids)} runs failed: {'; '.join(failed)}"[:500])
    return run_ids
