"""Commands that take a configuration: run, sweep, compare, plan, config."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.printing import console, print_comparison, print_run, print_table
from flows.progress import Loudness, show_progress
from tasks.config import ConfigError, RunConfig
from tasks.step import Step
from tasks.toml import read_toml, toml_value

ConfigArgument = Annotated[Path, typer.Argument(help="TOML file; see configs/ for examples.", show_default=False)]
WantedConfig = Annotated[Path | None, typer.Argument(help="TOML file; see configs/ for examples.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field: --set prune.ratio=0.5. May be repeated.", show_default=False),
]
RunStoreOption = Annotated[
    Path | None,
    typer.Option("--store", envvar="SAAP_STORE", help="Store to use instead of the config's.", show_default=False),
]


VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show all that Prefect logs.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and the results only.")]


def _overrides(values: list[str] | None, store: Path | None) -> tuple[str, ...]:
    """Those of --set come last: SAAP_STORE may stand behind `store`."""
    return (*([f"store={toml_value(str(store))}"] if store else []), *(values or ()))


def _loudness(verbose: bool, quiet: bool) -> Loudness:
    if verbose and quiet:
        raise ConfigError("--verbose and --quiet ask for opposites: choose one")
    return "verbose" if verbose else "quiet" if quiet else "normal"


def run(
    config: WantedConfig = None,
    set_: SetOption = None,
    store: RunStoreOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the whole job: calibrate, score, fuse, fluctuation, prune, recover, evaluate, speed.

    Stages whose artifacts are in the store are not run again: an interrupted run goes on where it was when the same
    command is given again. Uses the Prefect server at PREFECT_API_URL, or one of its own for as long as it runs.
    """
    from tasks.config import load_config

    if config is None:
        raise ConfigError(
            "which configuration? saap run configs/demo.toml runs the demo; "
            "saap config > mine.toml writes one of your own"
        )
    loudness, overrides = _loudness(verbose, quiet), _overrides(set_, store)
    settings = load_config(config, overrides)
    if "sweep" in read_toml(config):
        again = shlex.join(["saap", "sweep", str(config), *(f"--set={override}" for override in overrides)])
        typer.echo(f"this runs what stands outside [sweep] only; all of it: {again}", err=True)
    _start(settings.store)
    from flows.job import prepare  # only now: what it imports reads the environment

    job = prepare(settings)  # what is wrong with model or data shows before a server is started
    with _prefect(Path(settings.store), job.steps):
        from flows.pages.write import report_file
        from flows.run import flow_of

        show_progress(loudness, len(job.steps))
        flow_of(job)(str(config.resolve()), list(overrides))
    page = report_file(Path(settings.store), job.run_id)
    print_run(Path(settings.store), job.run_id, settings.data, page if page.is_file() else None)


def sweep(
    config: ConfigArgument,
    set_: SetOption = None,
    store: RunStoreOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run every combination of the lists in the config's \\[sweep] table; what they share is computed once."""
    from flows.combinations import combinations
    from flows.job import prepare_all
    from tasks.config import ConfigError, load_config

    loudness, overrides = _loudness(verbose, quiet), _overrides(set_, store)
    runs = combinations(str(config), overrides)
    settings = load_config(config, (*runs[0], *overrides))
    _start(settings.store)
    jobs = prepare_all(str(config), runs, overrides)  # before a server is started
    console.print(f"{len(runs)} runs, the last of them {', '.join(runs[-1])}", highlight=False)
    with _prefect(Path(settings.store), [step for job in jobs for step in job.steps]):
        from flows.sweep import sweep_of
        from flows.targets import sweep_page

        steps = {step.reference for job in jobs for step in job.steps}
        show_progress(loudness, len(steps))
        failed: ConfigError | None = None
        try:
            sweep_of(jobs)(str(config.resolve()), list(overrides))
        except ConfigError as error:  # some runs failed: what the others found is shown all the same
            failed = error
    print_comparison(config, overrides, page=sweep_page(settings.store, config), jobs=jobs)
    if failed is not None:
        raise failed


def compare(
    config: ConfigArgument,
    set_: SetOption = None,
    store: RunStoreOption = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw it into this PNG, PDF or SVG too.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the page with charts and tables here.", show_default=False)
    ] = None,
) -> None:
    """Print what a sweep found: mean and spread over its calibration seeds, the paper's numbers beside them.

    Computes nothing: it shows what the store holds of the sweep, also while it runs.
    """
    print_comparison(config, _overrides(set_, store), figure, html)


def plan(config: ConfigArgument, set_: SetOption = None, store: RunStoreOption = None) -> None:
    """Show what is cached, what would run, and why; of a file with a \\[sweep] table, what `saap sweep` would do.

    Changes nothing.
    """
    from flows.combinations import base_of, combinations
    from flows.job import prepare, prepare_all, whose
    from flows.preview import preview_rows
    from tasks.config import load_config

    overrides = _overrides(set_, store)
    place = Path(base_of(config, overrides).store)
    if place.exists() and not place.is_dir():
        raise ConfigError(f"{place} is no folder: name another store (--store)")
    if sweeps := "sweep" in read_toml(config):
        jobs = prepare_all(str(config), combinations(str(config), overrides), overrides, look_only=True)
    else:
        jobs = [prepare(load_config(config, overrides), look_only=True)]
    steps = {step.reference: step for job in jobs for step in job.steps}
    rows = preview_rows(list(steps.values()))
    if sweeps:
        axes = ", ".join(one.partition("=")[0] for one in jobs[0].chosen)
        table = [
            (label, what, runs, "" if what == "cached" else why)
            for (label, what, why, _), runs in zip(rows, whose(jobs).values(), strict=True)
        ]
        print_table(["stage", "", f"for {axes}", "why"], table)
    else:
        print_table(["stage", "", "why", "key"], rows)
    cached = sum(row[1] == "cached" for row in rows)
    place = Path(jobs[0].settings.store).resolve()
    console.print(f"{cached} of {len(rows)} steps are cached in {place}", highlight=False)
    for job in jobs:
        if job.settings.prune.target is not None:
            chosen = f"{', '.join(job.chosen)}: " if job.chosen else ""
            found = f"a ratio of {job.settings.prune.ratio:g}"
            console.print(f"{chosen}prune.target = '{job.settings.prune.target}': {found}", highlight=False)


def config(
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of such a file: editors complete and check by it.")
    ] = False,
) -> None:
    """Print a whole configuration: every field, its default and what it means. A start for a file of your own."""
    from tasks.toml import default_toml, json_schema

    print(json.dumps(json_schema(RunConfig), indent=1) + "\n" if schema else default_toml(RunConfig), end="")


def _start(store: str) -> None:
    """Before the first import of Prefect."""
    from flows.server import quiet_settings
    from storage.artifacts import ArtifactStore

    ArtifactStore(store).prepare()
    quiet_settings(Path(store).resolve())


def _prefect(store: Path, steps: Sequence[Step]) -> Any:
    from flows.job import work_left
    from flows.server import prefect_api
    from flows.tracebacks import hide_user_tracebacks

    hide_user_tracebacks()
    return prefect_api(store.resolve(), ("flows.run", "saap") if work_left(steps) else ("flows.run",))
