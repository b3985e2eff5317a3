"""What people type, and what they get when it is wrong: one line, exit code 2, nothing left behind."""

import contextlib
import csv
import io
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
from safetensors.torch import load_file, save_file

from storage.keys import digest
from storage.runs import RunRecord
from storage.warehouse import Warehouse
from tests.flows.conftest import ask, at_work_in, saap, without_server
from tests.storage.test_warehouse import ABOUT, fill


def refused(done, *words):
    """Exit code 2 and one line on stderr that holds all the words."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("saap: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prune.rato=0.5", ["unknown config key 'prune.rato'", "ratio"]),
        ("colour=1", ["unknown config key 'colour'", "prune"]),
        ("prune.ratio=1.2", ["prune.ratio", "less than 1", "1.2"]),
        ("prune.ratio=0", ["prune.ratio", "greater than 0"]),
        ("evaluate.benchmarks=['mmlu']", ["evaluate.benchmarks", "mmlu"]),
        ("recover.batch_size=6", ["batch_size", "micro_batch_size"]),
        ("model.path=/no/such/model", ["/no/such/model", "does not exist"]),
        ("data=/no/such/data", ["/no/such/data", "mini"]),
        ("data=hub", ["bookcorpus", "mini"]),
        ("model.path=org/model", ["org/model", "HF_HUB_OFFLINE"]),
        ("store=/proc/nowhere", ["/proc/nowhere", "--store"]),
        ("prune", ["section.field=value"]),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(config, store, override, words):
    refused(saap("run", config, "--set", override), *words)
    assert not list(store.glob("*/*/manifest.json"))


def test_a_missing_or_malformed_config_is_refused(tmp_path):
    refused(saap("run", tmp_path / "none.toml"), "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    refused(saap("plan", tmp_path / "bad.toml"), "TOML")


def test_a_family_we_do_not_know_is_refused_by_name(config, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "gpt")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 512}))
    refused(saap("run", config, "--set", f"model.path={folder}"), "gpt2", "llama")


def test_a_family_without_int4_is_refused_before_anything_runs(config, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "bloom")
    (folder / "config.json").write_text(json.dumps({"model_type": "bloom", "vocab_size": 512}))
    refused(saap("run", config, "--set", f"model.path={folder}"), "bloom", "recover.recipe")


def test_a_corrupt_checkpoint_is_refused(config, tiny_folder, tmp_path, store):
    folder = shutil.copytree(tiny_folder, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(saap("run", config, "--set", f"model.path={folder}"), "model.safetensors", "damaged")
    assert not list(store.glob("*/*/manifest.json"))


def test_a_data_folder_without_a_needed_column_is_refused(config, tmp_path, store):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for place in ("bookcorpus_like/passages", "alpaca/train", "arc_easy/test", "wikitext2_raw/test"):
        (tmp_path / "data" / place).parent.mkdir(parents=True)
        answers = {"instruction": ["x"] * 8, "input": [""] * 8, "output": ["y"] * 8}
        columns = answers if "train" in place else {"text": ["x"]}
        pq.write_table(pa.table(columns), tmp_path / "data" / f"{place}.parquet")
    refused(saap("run", config, "--set", f"data={tmp_path / 'data'}"), "arc_easy", "question")
    (tmp_path / "data/arc_easy/test.parquet").write_bytes(b"broken")
    refused(saap("run", config, "--set", f"data={tmp_path / 'data'}"), "arc_easy", "cannot read")
    assert not list(store.glob("*/*/manifest.json"))


@pytest.mark.slow
def test_an_error_inside_a_stage_is_one_line_too_and_the_run_is_recorded_as_failed(
    config, store, tiny_folder, tmp_path, prefect_server
):
    folder = shutil.copytree(tiny_folder, tmp_path / "ruined")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"][7] = math.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    done = saap("run", config, "--set", f"model.path={folder}")
    refused(done, "finite")
    failed, said = done.stderr.splitlines()[-2:]  # and none of Prefect's that say it again
    message = f"lm_head.weight of the model in {folder} is not finite: the model itself is damaged"
    assert failed == f"[ 2/13]  failed  score               {message}"
    assert said == f"saap: {message}"
    assert "ERROR" not in done.stderr
    with Warehouse(store).reading() as connection:
        ((status, error),) = connection.execute("select status, error from runs").fetchall()
    assert status == "failed"
    assert "finite" in error


def test_plan_says_what_would_run_and_why_and_changes_nothing(config, store):
    done = saap("plan", config)
    assert done.returncode == 0, done.stderr
    assert "never made" in done.stdout
    assert "0 of 13 steps" in done.stdout
    assert not store.exists()


def test_the_plan_of_a_sweep_has_each_step_once_and_says_which_runs_it_is_for(config, store):
    config.write_text(config.read_text() + "[sweep]\n'prune.ratio' = [0.2, 0.3, 0.4]\n")
    done = saap("plan", config)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert found[0] == ["stage", "for", "prune.ratio", "why"]
    assert [line[1:6] for line in found if line[:1] == ["score"]] == [["run", "3", "of", "3", "runs"]]
    assert [line[1:3] for line in found if line[:1] == ["prune"]] == [["run", r] for r in ("0.2", "0.3", "0.4")]
    assert "0 of 27 steps" in done.stdout  # 13 a run, of which 4 rank and 2 measure the dense model
    assert not store.exists()
    refused(saap("plan", config, "--set", "prune.ratio=0.2"), "axis")


def test_sql_prints_csv_json_and_a_table(tmp_path):
    fill(tmp_path, "r1").load("r1")
    query = "select benchmark, value, stderr, null as nothing from metrics order by benchmark"
    done = saap("sql", query, "--store", tmp_path, "--csv")
    assert done.stdout == "benchmark,value,stderr,nothing\nboolq,0.5,0.1,\npiqa,0.5,0.1,\n"
    rows = json.loads(saap("sql", query, "--store", tmp_path, "--json").stdout)
    assert rows == [{"benchmark": b, "value": 0.5, "stderr": 0.1, "nothing": None} for b in ("boolq", "piqa")]
    table = saap("sql", query, "--store", tmp_path).stdout
    assert re.search(r"boolq .* 0\.5 .* 0\.1", table)
    refused(saap("sql", query, "--store", tmp_path, "--csv", "--json"), "--csv", "--json", "choose one")
    refused(saap("sql", "select nonsense", "--store", tmp_path), "nonsense")
    refused(saap("sql", "delete from metrics", "--store", tmp_path), "read-only")
    refused(saap("sql", "select 1", "--store", tmp_path / "none"), "saap run")


def test_the_stated_columns_are_there(tmp_path):
    fill(tmp_path, "r1").load("r1")
    stated = {
        "runs": "run_id, started_at, status, model",
        "stage_runs": "run_id, stage, key, cached, seconds",
        "metrics": "run_id, variant, benchmark, metric, value, stderr, n, protocol",
        "speed": "run_id, variant, tokens_per_s",
        "importance": "sample, layer, kind, unit, vector, element",
    }
    for table, columns in stated.items():
        done = saap("sql", f"select {columns} from {table} limit 1", "--store", tmp_path, "--csv")
        assert done.stdout.splitlines()[0] == columns.replace(" ", ""), done.stderr


def test_report_of_a_run_without_a_speed_shows_what_is_there(tmp_path):
    warehouse = fill(tmp_path, "r1")
    RunRecord(tmp_path, "r2", **ABOUT).finish("failed", "x")
    for run_id in ("r1", "r2"):
        warehouse.load(run_id)
    done = saap("report", "--store", tmp_path)
    assert "run r1" in done.stdout
    assert re.search(r"dense .* 50\.0", done.stdout)
    refused(saap("report", "nothing", "--store", tmp_path), "no such run")


def heavy_imports(command):
    """Which of the heavy packages a command has imported when it ends, and what it printed."""
    code = (
        "import sys, flows.cli, os\n"
        "leave, heavy = os._exit, {'torch', 'prefect', 'transformers'}\n"
        "os._exit = lambda code: (print('HEAVY', heavy & set(sys.modules), flush=True), leave(code))\n"
        f"sys.argv = ['saap', *{command!r}]\n"
        "flows.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    output, _, heavy = done.stdout.rpartition("HEAVY ")
    return heavy.strip(), output


@pytest.mark.parametrize("command", [["--help"], ["plan", "--help"], ["sql", "--help"], ["--version"]])
def test_help_imports_neither_torch_nor_prefect(command):
    heavy, output = heavy_imports(command)
    assert heavy == "set()"
    assert "Usage" in output or output == f"saap {version('saap')}\n"


def test_sql_imports_neither_torch_nor_prefect_and_plan_not_prefect(config, tmp_path):
    fill(tmp_path / "s", "r1").load("r1")
    assert "prefect" not in heavy_imports(["plan", str(config)])[0]
    assert heavy_imports(["sql", "select 1 as one", "--csv", "--store", str(tmp_path / "s")]) == ("set()", "one\n1\n")


def test_verify_reads_everything_and_sets_aside_what_is_damaged(tmp_path):
    fill(tmp_path, "r1")
    key = digest(["r1", "piqa"])
    done = saap("verify", "--store", tmp_path)
    assert (done.returncode, "3 of 3 artifacts are whole" in done.stdout) == (0, True)
    file = tmp_path / "evaluate" / key / "metrics.parquet"
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    done = saap("verify", "--store", tmp_path)
    assert done.returncode == 1
    assert f"evaluate/{key}" in done.stdout
    assert "2 of 3 artifacts are whole" in done.stdout
    assert not file.exists()


def test_doctor_finds_this_environment_in_order(tmp_path):
    done = saap("doctor", "--store", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("torch", "duckdb", "SmolLM2-135M", "cores", "free", "hub"):
        assert word in done.stdout


def test_csv_output_is_nothing_but_csv(tmp_path):
    fill(tmp_path, "r1").load("r1")
    done = saap("sql", "select 'a,b' as x, 1.5 as y", "--store", tmp_path, "--csv")
    assert list(csv.reader(io.StringIO(done.stdout))) == [["x", "y"], ["a,b", "1.5"]]
    assert done.stderr == ""


@pytest.mark.slow
def test_a_run_says_what_its_table_leaves_out(config, store, prefect_server):
    """Here: the rest of a sweep, and perplexities in windows that are not the papers'."""
    config.write_text(config.read_text() + "\n[sweep]\n'prune.ratio' = [0.2, 0.3]\n")
    small = ("recover.recipe=none", "evaluate.benchmarks=['wikitext2']", "evaluate.variants=['pruned']", "speed.runs=0")
    done = saap("run", config, *(word for value in small for word in ("--set", value)))
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert f"saap sweep {config} --set=recover.recipe=none" in done.stderr
    assert "windows of 128 tokens were not measured" in said
    assert "from comparison where run_id" in said
    assert "pruned – – – – – – – – – – – – – –" in said  # a row for what was measured all the same
    assert [row["variant"] for row in ask(store, "from leaderboard")] == ["pruned"]


@pytest.mark.slow
def test_a_ctrl_c_in_a_terminal_ends_a_run_in_a_line_and_its_server_with_it(config, store):
    """A terminal sends it to all processes that it has in the foreground."""
    command = [sys.executable, "-m", "flows.cli", "run", str(config), "--set", "recover.epochs=1000"]
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests are a job in the background
        os.execve(sys.executable, command, without_server())
    at_work_in(store, "recover")
    os.write(terminal, b"\x03")
    screen = b""
    with contextlib.suppress(OSError):  # at its end
        while part := os.read(terminal, 65536):
            screen += part
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    text = screen.decode()
    assert text.splitlines()[-1] == "saap: interrupted; the same command goes on from here"
    assert "ERROR" not in text
    assert ask(store, "select status, error from runs") == [{"status": "failed", "error": "interrupted"}]


def test_a_ctrl_c_while_libraries_are_imported_is_a_line_too():
    code = (
        "import sys, flows.cli\n"
        "class Pressed:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'duckdb':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Pressed())\n"
        "sys.argv = ['saap', 'sql', 'select 1']\n"
        "flows.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "saap: interrupted; the same command goes on from here\n"


@pytest.mark.slow
def test_a_plan_that_removes_nothing_ends_the_run_with_a_line(config, store, prefect_server):
    sets = ("prune.search=global", "prune.ratio=0.0001", "prune.kinds=mlp", "recover.recipe=none", "speed.runs=0")
    done = saap("run", config, *(word for value in sets for word in ("--set", value)))
    refused(done, "prune.ratio = 0.0001 removes nothing")
    assert not list(store.glob("prune/*/manifest.json"))
