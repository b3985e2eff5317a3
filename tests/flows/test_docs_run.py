"""Every `saap` command that README and docs show, typed in page by page: it works, and makes what the page says.

The model is a tiny one and the sizes are small (tests/flows/documented.py). Of a sweep two runs are made: two values of
its first axis, one of any other. One store serves all pages: what an earlier one made is found.
"""

import html
import re
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.flows.documented import PAGES, README, ROOT, Reader, commands, recipe_of
from tests.flows.test_mixtures import publish
from tests.hub.server import Hub

pytestmark = pytest.mark.slow
PICTURE = ROOT / "docs" / "result.svg"

# What is not run here, and why: a pattern of the line → the reason. Each must still be on a page.
NOT_RUN = {
    r"make test\b": "is what runs this",
    r"pip install": "changes the environment; make install has done it",
    r"python benchmarks/": "minutes each; tests/flows/test_docs.py has their arguments read by their own parsers",
    r"benchmarks/gpu\.sh": "needs a GPU; its steps at toy sizes: tests/benchmarks/test_gpu.py",
    r"vllm serve": "needs vLLM and a GPU",
    r"saap .*compute\.launch=": "needs several GPUs; two processes on a CPU: tests/saap/recovery/test_launch.py",
    r"saap .*execute\.address=": "needs a Ray cluster; on one of two nodes: tests/flows/test_ray.py",
    r"(export PREFECT_|prefect )": "servers and workers that stay: tests/flows/test_deployments.py, test_workers.py",
}
FIRST = {"report.md": ["saap sweep configs/criteria.toml"]}  # what a page takes for granted


@pytest.fixture(scope="module")
def reader(tiny_folder, tmp_path_factory, prefect_server):
    """One store for all pages, with the run that README's first commands make."""
    folder = tmp_path_factory.mktemp("reader")
    experts = publish("qwen3_moe, layer 1 without experts", tiny_folder, folder)
    models = {"/models/Llama-3.2-1B": str(tiny_folder), "/models/Qwen3-30B-A3B": str(experts)}
    return Reader(folder, models)


@pytest.fixture
def place(reader, monkeypatch, request):
    """Opens a page: its own folder, with a bucket and a hub where it speaks of them."""

    def opened(page):
        monkeypatch.setenv("SAAP_STORE", str(reader.store))
        text = page.read_text()
        if "s3://bucket/prefix" in text:
            reader.places["s3://bucket/prefix"] = f"s3://{request.getfixturevalue('bucket')}/prefix"
        if re.search(r"--push(?!.*--dry-run)", text):
            request.getfixturevalue("pushed")
        here = reader.sits_down(page)
        monkeypatch.chdir(here)
        if not reader.runs():
            reader.types("saap config > mine.toml")
            reader.types("saap run mine.toml")
            (reader.home / "mine.toml").write_text(Path("mine.toml").read_text())
        for line in FIRST.get(page.name, ()):
            reader.types(line)
        return here

    return opened


@pytest.fixture
def pushed(monkeypatch):
    """A hub on loopback that takes what is pushed to it."""
    hub = Hub()
    server = hub.serve()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    yield hub
    server.shutdown()
    server.server_close()


def reason(line):
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, line)), None)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_work_in_their_order(page, place, reader, request):
    here, before = place(page), ""
    for _, line in commands(page):
        if reason(line) is not None:
            continue
        if line.startswith("make demo"):
            assert any(command.endswith("bin/saap sweep configs/demo.toml") for command in recipe_of("demo"))
            line = "saap sweep configs/demo.toml"
        if line.startswith("--set "):  # goes on from the command before it
            line = f"{before} {line}"
        before = line
        words, done = reader.types(line)
        check_what_it_printed(words, done.stdout)
        missing = [name for name in made_by(words) if not (here / name).exists()]
        assert not missing, line
        if "--push" in words and "--dry-run" not in words:
            there = request.getfixturevalue("pushed").repositories["models/org/name"]
            assert there.private == ("--private" in words)
            assert {"README.md", "config.json", "model.safetensors"} <= there.commits[there.branches["main"]].keys()


def made_by(words):
    """The files and folders that a command says it writes."""
    named = [words[at + 1] for at, word in enumerate(words) if word in ("--figure", "--html", ">")]
    if words[1] == "export" and words[2] in ("gguf", "uniform", "hf") and "--push" not in words:
        named.append(words[4])
    return named


def check_what_it_printed(words, text):
    if words[1] == "sql":
        of_the_paper = "versus_published" in words[2]  # whose models are not here
        assert of_the_paper or len(text.splitlines()) > 1, "no row"
    if words[1] == "run":
        assert re.search(r"^run \d{8}T\d{6}-\w{6}", text)
        assert "page: " in text
    if words[1] in ("sweep", "compare"):
        assert re.search(r"^(.* )?dense ", text, re.MULTILINE)
        assert "are not complete" not in text
    for file in re.findall(r"^(?:page|drawn): (.*)$", text, re.MULTILINE):
        assert Path(file).is_file()
    if words[1] not in ("config", "export", "plan") and "--json" not in words and "--csv" not in words:
        wide = [line for line in text.splitlines() if len(line.rstrip()) > 100 and not re.search(r"/", line)]
        assert not wide, wide


def test_the_picture_of_the_demo_has_the_columns_that_the_demo_prints(place, reader):
    place(README)
    texts = [html.unescape(text).split() for text in re.findall(r"([^<>]+)</text>", PICTURE.read_text())]
    drawn = texts[texts.index(["criterion"]) : texts.index(["dense"])]
    printed = reader.types("saap sweep configs/demo.toml")[1].stdout.splitlines()
    columns = next(line.split() for line in printed if line.startswith("criterion "))
    run_here = [["ARC-e"] if column == ["avg"] else column for column in drawn if column != ["PTB↓"]]
    assert columns == [word for column in run_here for word in column]
    assert any(line.startswith("pruned at 0.2: saap") for line in printed)
    assert ["pruned", "at", "0.2:", "saap_plus", "is", "best"] in [text[:6] for text in texts]


def test_what_is_not_run_is_still_on_a_page():
    lines = [line for page in PAGES for _, line in commands(page)]
    assert len(lines) > 70
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, line) for line in lines)] == []
    assert all(re.match(r"(saap|make demo|--set) ", line) for line in lines if not reason(line))
