#!/usr/bin/env bash
# A nightly interval in a time zone with summer time runs twice a night, for two nights, when the clocks go back.
# Prefect counts from the day on which it is asked. Asked in summer it goes on an hour too late in winter, asked in winter it
# is right; its scheduler asks all the time and keeps what it has planned already. A cron schedule does not do that, but
# what it has in the hour that is left out in spring comes an hour early, not late, and an hourly one leaves out the second
# of the two equal hours in autumn. In UTC all is well.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
export PREFECT_HOME="$folder/home" DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false
python3 -m venv env
env/bin/pip install -q prefect==3.8.8 'fastapi<0.151' 'sqlalchemy<2.1' 2> log || { cat log; exit 1; }
env/bin/python - 2> log <<'PY' || { cat log; exit 1; }
import asyncio
import collections
import datetime
from importlib.metadata import version
from zoneinfo import ZoneInfo

from prefect.server import models, schemas
from prefect.server.database import provide_database_interface
from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule

HOUR = datetime.timedelta(hours=1)


def daily(zone):
    start = datetime.datetime(2027, 1, 3, 3, 30, tzinfo=ZoneInfo(zone))
    return IntervalSchedule(interval=24 * HOUR, anchor_date=start, timezone=zone)


async def planned(zone):
    """Night → the hours at which the server has planned a run; it plans every hour, as its scheduler does every minute."""
    database = provide_database_interface()
    async with database.session_context(begin_transaction=True) as session:
        flow = await models.flows.create_flow(session, schemas.core.Flow(name=zone.replace("/", " ")))
        deployment = await models.deployments.create_deployment(session, schemas.core.Deployment(
            name="nightly", flow_id=flow.id,
            schedules=[schemas.core.DeploymentSchedule(schedule=daily(zone), active=True)],
        ))
        first = datetime.datetime(2027, 10, 29, 12, tzinfo=datetime.timezone.utc)
        for hours in range(12 * 24):
            await models.deployments.schedule_runs(session, deployment.id, start_time=first + hours * HOUR)
    async with database.session_context() as session:
        runs = await models.flow_runs.read_flow_runs(session, limit=200)
    nights = collections.defaultdict(list)
    for run in runs:
        if run.deployment_id == deployment.id:
            at = run.expected_start_time.astimezone(ZoneInfo(zone))
            nights[f"{at:%d %b}"].append(f"{at:%H:%M}")
    return {night: sorted(hours) for night, hours in nights.items() if len(hours) > 1}


async def main():
    await provide_database_interface().create_db()
    zone = ZoneInfo("Europe/Berlin")
    twice = {name: await planned(name) for name in ("Europe/Berlin", "America/New_York", "UTC")}
    night = CronSchedule(cron="30 2 * * *", timezone="Europe/Berlin")
    spring = await night.get_dates(n=1, start=datetime.datetime(2027, 3, 27, 12, tzinfo=zone))
    hourly = CronSchedule(cron="30 * * * *", timezone="Europe/Berlin")
    autumn = await hourly.get_dates(n=6, start=datetime.datetime(2027, 10, 31, 0, tzinfo=zone))
    gaps = sorted({(b.timestamp() - a.timestamp()) / 3600 for a, b in zip(autumn, autumn[1:])})
    print("versions: prefect", version("prefect"))
    print("expected: one run a night, at 03:30; 03:30 for the 02:30 that does not exist; an hour between hourly runs")
    for name, nights in twice.items():
        print(f"seen: every 24 hours from 03:30 in {name}: nights with two runs: {nights or 'none'}")
    print(f"seen: cron at 02:30 when the clocks go from 02:00 to 03:00: {spring[0].astimezone(zone):%H:%M %z}")
    print(f"seen: hours between the runs of an hourly cron when the clocks go back: {gaps}")
    assert {name: len(nights) > 0 for name, nights in twice.items()} == {
        "Europe/Berlin": True, "America/New_York": True, "UTC": False
    }
    assert spring[0].astimezone(zone).hour == 1 and gaps == [1, 2]


asyncio.run(main())
PY
