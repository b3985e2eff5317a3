"""Whole runs of two hosts, each with a store of its own, that share a bucket."""

import json
import shutil

import pytest

from storage.artifacts import MANIFEST, ArtifactStore
from storage.errors import StorageError
from storage.remote import remote_of
from storage.runs import all_runs, read_run, read_stages
from tests.flows.conftest import HURRIED, Command, ask, saap
from tests.flows.test_pipeline import executed, results

pytestmark = pytest.mark.slow


@pytest.fixture
def config(config):
    """One benchmark is enough here."""
    config.write_text(config.read_text().replace('"arc_easy", ', ""))
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Where the store of a run will lie, made by the first test that needs it."""
    return tmp_path_factory.mktemp("finished") / "store"


@pytest.fixture
def local(config, store, finished, prefect_server):
    """A store with a finished run that knew of no bucket."""
    if not finished.exists():
        done = saap("run", config, "--store", finished)
        assert done.returncode == 0, done.stderr
    shutil.copytree(finished, store)


@pytest.fixture
def url(bucket, config):
    """The place, which the configuration names."""
    config.write_text(f'store_remote = "s3://{bucket}/team"\n{config.read_text()}')
    return f"s3://{bucket}/team"


@pytest.fixture
def shared(local, store, url):
    """`local`, in the bucket too."""
    done = saap("push", "--remote", url, "--store", store)
    assert done.returncode == 0, done.stderr


def stages(store):
    return list(read_stages(store, all_runs(store)[-1]))


def made(store):
    return {(s["stage"], s["key"]) for s in stages(store) if s["skipped"] is None}


def test_a_second_host_computes_nothing_and_has_the_same_results(url, config, store, s3, bucket, prefect_server):
    two = store.with_name("two")
    first = saap("run", config)
    assert first.returncode == 0, first.stderr
    planned = saap("plan", config, "--store", two)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.count(" fetch ") == len(stages(store))
    assert not two.exists()
    before = s3.objects(bucket)
    second = saap("run", config, "--store", two)
    assert second.returncode == 0, second.stderr
    assert "fetched from the remote store" in second.stderr
    assert executed(stages(store)) != set()
    assert executed(stages(two)) == set()
    assert results(two) == results(store)
    new = {name for name, size in s3.objects(bucket).items() if before.get(name) != size}
    assert new == {f"team/runs/{all_runs(two)[-1]}.json"}
    # another ratio: what does not depend on it is fetched, the rest made here and shared
    third = store.with_name("three")
    assert saap("run", config, "--store", third, "--set", "prune.ratio=0.3").returncode == 0
    found = {s["stage"] for s in stages(third) if s["cached"]}
    assert found >= {"calibrate", "score", "fuse", "fluctuation"}
    assert saap("run", config, "--store", two, "--set", "prune.ratio=0.3").returncode == 0
    assert executed(stages(two)) == set()


def test_a_store_emptied_by_gc_and_a_pulled_run_are_as_before(shared, url, config, store):
    rows, run_id = results(store), all_runs(store)[0]
    pulled = store.with_name("pulled")
    listed = saap("pull", "--remote", url, "--store", pulled)
    assert run_id in listed.stdout
    assert "completed" in listed.stdout
    assert not pulled.exists()
    got = saap("pull", run_id[-6:], "--remote", url, "--store", pulled)
    assert got.returncode == 0, got.stderr
    assert results(pulled) == rows
    assert ask(pulled, "from leaderboard") == ask(store, "from leaderboard")
    shown = saap("show", run_id[-6:], "--store", pulled)
    assert shown.returncode == 0, shown.stderr
    again = saap("pull", run_id[-6:], "--remote", url, "--store", pulled)
    assert again.returncode == 0, again.stderr
    shutil.rmtree(store / "recover")
    gone = saap("export", "hf", run_id, store.with_name("exported"), "--store", store)
    assert (gone.returncode, "saap pull" in gone.stderr) == (2, True), gone.stderr
    assert saap("pull", run_id, "--remote", url, "--store", store).returncode == 0
    assert saap("export", "hf", run_id, store.with_name("exported"), "--store", store).returncode == 0


def test_a_run_without_a_remote_is_pushed_later(local, config, store, bucket, s3):
    assert s3.objects(bucket) == {}
    url = f"s3://{bucket}/late"
    done = saap("push", "--remote", url, "--store", store)
    assert done.returncode == 0, done.stderr
    two = store.with_name("two")
    assert saap("pull", all_runs(store)[0], "--remote", url, "--store", two).returncode == 0
    assert results(two) == results(store)
    # what was made with and without a remote has the same keys
    assert saap("run", config, "--store", store.with_name("three"), "--set", f"store_remote={url}").returncode == 0
    assert executed(stages(store.with_name("three"))) == set()


def test_a_step_on_a_host_of_its_own_fetches_what_it_takes(shared, url, config, store):
    from flows.dag import build
    from tasks.config import load_config
    from tasks.running import find_or_publish
    from tasks.stage import stage_named

    two = ArtifactStore(store.with_name("two"))
    two.prepare()

    def step(stage, ratio):
        settings = load_config(config, (f"store={two.root}", f"prune.ratio={ratio}"))
        return next(step for step in build(settings, "r") if step.stage == stage)

    pruned = step("prune", 0.4)
    assert not find_or_publish(stage_named("prune"), pruned)["fetched"]
    assert {stage for stage, _ in two.all()} == {"prune", *(stage for _, stage, _ in pruned.inputs)}
    assert remote_of(url).find("prune", pruned.key) is not None
    with pytest.raises(StorageError, match=r"prune/.* is neither in .*: give the same command again"):
        find_or_publish(stage_named("recover"), step("recover", 0.45))


def test_two_hosts_at_once_are_no_conflict(url, config, store, s3, bucket, prefect_server):
    two = store.with_name("two")
    hosts = [Command(("run", config, "--store", root)) for root in (store, two)]
    errors = [host.communicate(timeout=600)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], errors
    assert made(store) == made(two)
    third = store.with_name("three")
    assert saap("run", config, "--store", third).returncode == 0
    assert executed(stages(third)) == set()
    for stage, key in made(third):
        assert ArtifactStore(third).find(stage, key, verify=True) is not None


def test_a_host_killed_while_uploading_goes_on_from_there(url, config, store, s3, bucket, prefect_server):
    host = Command(("run", config))

    def kill(method, path):
        if method == "PUT" and "/prune/" in path and path.endswith(MANIFEST):
            host.kill()
            host.communicate(timeout=60)
            raise ConnectionAbortedError("its sender is dead")

    s3.before = kill
    host.communicate(timeout=600)
    assert host.returncode == -9
    s3.before = lambda method, path: None
    assert any("/prune/" in name for name in s3.objects(bucket))
    assert not any("/prune/" in name and name.endswith(MANIFEST) for name in s3.objects(bucket))
    done = saap("run", config)
    assert done.returncode == 0, done.stderr
    assert ("prune", None, None) not in executed(stages(store))
    two = store.with_name("two")
    assert saap("run", config, "--store", two).returncode == 0
    assert executed(stages(two)) == set()


def test_a_damaged_artifact_in_the_bucket_is_made_again_and_put_right(shared, config, store, s3, bucket):
    name = next(name for name in s3.objects(bucket) if name.endswith("fused.parquet"))
    s3.client().put_object(Bucket=bucket, Key=name, Body=bytes(s3.objects(bucket)[name]))
    two = store.with_name("two")
    done = saap("run", config, "--store", two)
    assert done.returncode == 0, done.stderr
    assert "fused.parquet has other content than its manifest says" in done.stderr
    assert executed(stages(two)) == {("fuse", None, None)}
    third = store.with_name("three")
    assert saap("run", config, "--store", third).returncode == 0
    assert executed(stages(third)) == set()


def test_connections_cut_in_the_middle_of_a_run_are_taken_up_again(shared, config, store, s3):
    s3.cut = 12
    two = store.with_name("two")
    done = saap("run", config, "--store", two)
    assert done.returncode == 0, done.stderr
    assert s3.cut == 0
    assert executed(stages(two)) == set()
    assert results(two) == results(store)


@pytest.mark.parametrize("command", ["run", "sweep", "plan"])
def test_a_remote_that_cannot_be_used_is_a_line_before_anything_runs(config, store, s3, bucket, tmp_path, command):
    if command == "sweep":
        config.write_text(f"{config.read_text()}\n[sweep]\n'prune.ratio' = [0.2, 0.3]\n")
    none = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "")
    none |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
    reader = s3.user(command, "s3:ListBucket", "s3:GetObject")
    cases = [
        ("s3://no-such-bucket/x", {}, "make it first, or correct the URL"),
        (f"s3://{bucket}/x", none, "set credentials"),
        (f"s3://{bucket}/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "give the same command again when it answers"),
        (f"{tmp_path}/nowhere", {}, "make it first, or correct the URL"),
        ("s3:/bucket", {}, "give a URL"),
    ]
    for url, environment, remedy in cases:
        done = saap(command, config, "--set", f"store_remote={url}", environment=environment)
        assert (done.returncode, done.stdout) == (2, ""), (url, done.stderr)
        assert done.stderr.count("\n") == 1, done.stderr
        assert remedy in done.stderr
        assert all_runs(store) == []
    s3.check_permissions(True)
    done = saap(command, config, "--set", f"store_remote=s3://{bucket}/x", environment=reader)
    if command == "plan":
        assert done.returncode == 0, done.stderr
    else:
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "Access Denied" in done.stderr


def test_a_remote_that_goes_away_fails_the_run_in_a_line_and_the_same_command_goes_on(
    url, config, store, s3, bucket, prefect_server
):
    def refuse(method, path):
        if "/fuse/" in path:
            raise ConnectionAbortedError("no answer")

    s3.before = refuse
    done = saap("run", config, program=(HURRIED,))
    assert done.returncode == 2, done.stderr
    assert "give the same command again when it answers" in done.stderr
    assert "Traceback" not in done.stderr
    assert read_run(store, all_runs(store)[-1])["status"] == "failed"
    s3.before = lambda method, path: None
    assert saap("run", config).returncode == 0
    assert {stage for stage, *_ in executed(stages(store))} >= {"fuse", "prune"}
    assert "score" not in {stage for stage, *_ in executed(stages(store))}


def test_the_remote_and_how_the_work_is_done_are_in_no_key_and_tell_no_runs_apart(config, tmp_path):
    from flows.dag import build
    from flows.targets import _settings
    from tasks.config import load_config

    without = load_config(config)
    how = ("execute.runner='processes'", "compute.batch_size=2", "recover.micro_batch_size=2")
    with_ = load_config(config, ("store_remote='s3://bucket/x'", *how))
    assert [step.key for step in build(without)] == [step.key for step in build(with_)]
    assert {step.store_remote for step in build(with_)} == {"s3://bucket/x"}
    other = load_config(config, ("prune.ratio=0.3",))
    told = [_settings(json.loads(settings.model_dump_json())) for settings in (without, with_, other)]
    assert told[0] == told[1] != told[2]
