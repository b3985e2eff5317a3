"""The steps of some runs as one graph: each key once, and each as soon as what it takes is there."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

from prefect.states import State

from flows.job import Job
from flows.places import Place
from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.remote import remote_of
from tasks.data import MissingData
from tasks.step import Step

Reference = tuple[str, str]
_MISSING = "give the same command again; hosts with stores of their own need store_remote"


@dataclass(frozen=True)
class Outcome:
    """What became of a step: the manifest of its artifact, why it was skipped, or the error.

    ticket: what Prefect knows it by, if it ran now.
    """

    manifest: dict[str, Any] | None = None
    skipped: str | None = None
    error: BaseException | None = None
    ticket: Any = None


class Graph:
    """The union of the steps of some runs, in an order they can run in. They share a store."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.steps: dict[Reference, Step] = {}
        self.needed: dict[Reference, set[str]] = defaultdict(set)  # by the runs
        for job in jobs:
            for step in job.steps:
                self.steps.setdefault(step.reference, step)
                self.needed[step.reference].add(job.run_id)

    def work_off(
        self, store: ArtifactStore, place: Place, begin: Callable[[str], None]
    ) -> Iterator[list[tuple[Step, Outcome]]]:
        """Steps with what became of them, as soon as that is known.

        An error ends the runs that need the step, and what only they need is left out. What the store holds already is
        not given to Prefect. begin: called with the run that a step is made for, before it starts.
        """
        order = {reference: number for number, reference in enumerate(self.steps)}
        sorter = TopologicalSorter(
            {reference: {(stage, key) for _, stage, key in step.inputs} for reference, step in self.steps.items()}
        )
        sorter.prepare()
        ready: list[Step] = []
        tickets: dict[Reference, Any] = {}
        ended: set[str] = set()  # runs
        working = 0
        while True:
            new = sorted(sorter.get_ready(), key=order.__getitem__)
            settled = []
            for step in (self.steps[reference] for reference in new):
                known = Outcome(skipped=step.missing) if step.missing else Outcome(store.find(step.stage, step.key))
                if known.skipped or known.manifest:
                    sorter.done(step.reference)
                    settled.append((step, known))
                else:
                    ready.append(step)
            ready = sorted(
                (step for step in ready if self.needed[step.reference] - ended), key=lambda step: order[step.reference]
            )
            while (chosen := place.choose(ready)) is not None:
                ready.remove(chosen)
                begin(chosen.run_id)
                place.start(chosen, [tickets[stage, key] for _, stage, key in chosen.inputs if (stage, key) in tickets])
                working += 1
            if settled:
                yield settled
            elif working:
                step, ticket, result = place.wait()
                working -= 1
                outcome = _outcome(store, step, ticket, result)
                if outcome.error is None:
                    tickets[step.reference] = ticket
                    sorter.done(step.reference)
                else:
                    ended |= self.needed[step.reference]
                yield [(step, outcome)]
            else:
                return


def _outcome(store: ArtifactStore, step: Step, ticket: Any, result: State | BaseException) -> Outcome:
    try:
        if isinstance(result, BaseException):
            raise result
        result.result()
        manifest = store.find(step.stage, step.key)
        if manifest is None and step.store_remote is not None:  # made on a host with a store of its own
            manifest = remote_of(step.store_remote).bring(store, step.stage, step.key)
    except MissingData as missing:
        return Outcome(skipped=str(missing), error=None if step.stage == "evaluate" else missing)
    except Exception as error:
        return Outcome(error=error)
    if manifest is None:
        return Outcome(error=StorageError(f"what {step.label} made is not in {store.root}: {_MISSING}"))
    return Outcome(manifest, ticket=ticket)
