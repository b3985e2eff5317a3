"""Flow runs whose process was killed: on a server of the user's they would stay "Running" for ever."""

from pathlib import Path
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import StateType
from prefect.states import Crashed

from storage.runs import forget_flow_run, killed_flow_runs

AT_ONCE = 100  # of the server's filter


def tell_of_the_killed(root: Path) -> None:
    """Mark as crashed what the killed runs of a store left running on this server. Those of other servers are left."""
    killed = killed_flow_runs(root)
    if not killed:
        return
    with get_client(sync_client=True) as client:
        for first in range(0, len(killed), AT_ONCE):
            ids = [UUID(flow_run) for flow_run in list(killed)[first : first + AT_ONCE]]
            for flow_run in client.read_flow_runs(flow_run_filter=FlowRunFilter(id={"any_": ids})):
                again = str(flow_run.id) == runtime.flow_run.id  # it was given to another worker: this one
                if flow_run.state_type is StateType.RUNNING and not again:
                    said = f"its process was killed, with run {', '.join(killed[str(flow_run.id)])}"
                    client.set_flow_run_state(flow_run.id, Crashed(message=said), force=True)
                for run_id in killed[str(flow_run.id)]:
                    forget_flow_run(root, run_id)
