"""Every command, query, program and table of README and docs: it is there, with these options, fields and columns.

tests/flows/test_docs_run.py runs the commands.
"""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
import tomllib

import pytest
import torch
import typer.main

from flows.combinations import combinations
from flows.commands import app
from storage.query import ask
from storage.runs import RunRecord
from tasks.config import check_config, load_config
from tests.flows.documented import PAGES, ROOT, blocks, commands

COMMANDS = typer.main.get_command(app)
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def saap_lines():
    """Every line of a shell block that begins with saap, and every one in the comments of configs/."""
    for page in PAGES:
        for number, line in commands(page):
            if line.startswith("saap "):
                yield pytest.param(line, id=f"{page.name}:{number}")
    for file in CONFIGS:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if found := re.match(r"#.*?(saap (?!_)[a-z].*)", line):
                yield pytest.param(found[1], id=f"{file.name}:{number}")


def benchmarks():
    """The words after `python` of every command that runs a benchmark, in blocks and in the text."""
    found = {}
    for page in PAGES:
        lines = [line.partition("  # ")[0] for _, line in commands(page)]
        lines += re.findall(r"`(python benchmarks/[^`]*)`", page.read_text())
        found |= {line.removeprefix("python "): page.name for line in lines if line.startswith("python ")}
    return [pytest.param(words, id=f"{page}: {words[:60]}") for words, page in found.items()]


def mentions():
    """Every `saap …` inside a text."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for words in sorted(set(re.findall(r"`saap ([a-z][^`]*)`", text))):
            yield pytest.param(words, id=f"{page.name}: {words[:40]}")


def code(*languages):
    """Every block of these languages."""
    for page in PAGES:
        for language, lines in blocks(page):
            if language in languages:
                yield pytest.param("\n".join(line for _, line in lines), id=f"{page.name}:{lines[0][0]}")


def parsed(words):
    """(name, values) of a saap command line; fails for a command, option or argument that does not exist."""
    context, command, names = COMMANDS.make_context("saap", list(words), resilient_parsing=True), COMMANDS, []
    while hasattr(command, "commands"):
        name, *words = words
        names.append(name)
        assert name in command.commands, f"there is no saap {' '.join(names)}"
        context, command = (
            command.commands[name].make_context(name, list(words), parent=context),
            command.commands[name],
        )
    return " ".join(names), context.params


@pytest.mark.parametrize("line", saap_lines())
def test_a_saap_command_is_one_and_its_configuration_is_valid(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine.toml").touch()
    words = shlex.split(line.replace(" …", "").replace(" && ", " # "), comments=True)[1:]
    name, values = parsed(words[: words.index(">")] if ">" in words else words)
    if name in ("run", "plan"):
        load_config(values["config"], tuple(values["set_"] or ()))
    elif name in ("sweep", "compare"):
        assert combinations(str(values["config"]), tuple(values["set_"] or ()))


@pytest.mark.parametrize("words", mentions())
def test_a_command_named_in_a_text_is_one(words):
    names = [word for word in words.split() if re.fullmatch(r"[a-z]+", word)]
    command = COMMANDS.commands.get(names[0])
    assert command is not None, words
    if hasattr(command, "commands") and len(names) > 1:
        command = command.commands[names[1]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z][a-z-]*", words)) <= known, words


def test_each_configuration_has_a_name_of_its_own():
    names = [load_config(file).name for file in CONFIGS]
    assert len(set(names)) == len(names)


class Taken(Exception):
    """The arguments of a benchmark, which goes no further."""


@pytest.mark.parametrize("words", benchmarks())
def test_a_benchmark_takes_the_arguments_of_the_docs(words, monkeypatch, tmp_path):
    file, *arguments = shlex.split(words)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    if "argparse" not in (ROOT / file).read_text():
        assert not arguments
        return
    read = argparse.ArgumentParser.parse_args

    def stop(*of, **how):
        raise Taken(read(*of, **how))

    program = runpy.run_path(str(ROOT / file))
    monkeypatch.setattr("argparse.ArgumentParser.parse_args", stop)
    monkeypatch.setattr("sys.argv", [file, *arguments])
    with pytest.raises(Taken) as taken:
        program["main"]()
    for row in getattr(taken.value.args[0], "criteria", ()):
        program["parse"](row)
    for row in taken.value.args[0].rows if "parse_row" in program else ():
        program["parse_row"](row)


@pytest.mark.parametrize(
    "row",
    [
        *("mixd", "mixed:learnig_rate=1e-3", "mixed:recipe=loras", "mixed:recipe=lora:rounding=feedback"),
        *("mixed:start=mean", "mixed:choose=longest", "untrained:bits=3"),
    ],
)
def test_a_row_of_a_recovery_that_would_run_as_another_is_refused(row, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with pytest.raises(SystemExit, match=f"{row}: .* is none of "):
        runpy.run_path(str(ROOT / "benchmarks" / "recovery_text.py"))["parse_row"](row)


@pytest.mark.parametrize(
    "file", [file for file in (ROOT / "benchmarks").glob("*.py") if "from tests" in file.read_text()]
)
def test_a_benchmark_that_takes_from_the_tests_finds_them(file, tmp_path):
    program = "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2])"
    command = [sys.executable, "-c", program, str(file.parent), str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", [one for one in code("python") if not one.id.startswith("sweeps.md")])
def test_a_program_in_the_text_runs(text, tiny_llama, tmp_path, tiny_folder):
    """The one in docs/sweeps.md is run by tests/flows/test_workers.py."""
    model, tokens = tiny_llama(intermediate_size=128), torch.arange(60).view(3, 20)
    model.save_pretrained(tmp_path / "my-llama")
    exec(text.replace("/models/", f"{tmp_path}/"), {"model": model, "tokens": tokens})
    assert "save(" not in text or (tmp_path / "my-llama-20" / "config.json").exists()


@pytest.mark.parametrize("text", code("toml"))
def test_a_configuration_in_the_text_is_one(text):
    check_config(tomllib.loads(text))


def columns_of(page):
    """Table → columns, as a page's table of the warehouse's tables has them."""
    rows = re.findall(r"^\| (\w+) \| an? (?!row is)[^|]*\| ([^|]*) \|$", page.read_text(), re.MULTILINE)
    return {table: re.findall(r'"?(\w+)"?(?: \([^)]*\))?(?:,|$)|(…)', columns) for table, columns in rows}


def test_the_tables_of_the_warehouse_have_the_columns_that_the_docs_say(tmp_path):
    about = {"name": "run", "model": "m", "data": "mini", "criterion": "saap", "ratio": 0.2, "config": "{}"}
    RunRecord(tmp_path, "20261127T120000-0aa001", **about).finish("completed")
    said = columns_of(ROOT / "docs" / "pipeline.md")
    tables = {"runs", "stage_runs", "groups", "widths", "metrics", "items", "speed", "training", "published_results"}
    assert said.keys() == tables
    for table, columns in said.items():
        there = [row[0] for row in ask(tmp_path, f"describe {table}")[1]]
        named = [name for name, more in columns if not more]
        assert set(named) <= set(there), table
        assert any(more for _, more in columns) or set(there) == set(named), table


def test_the_pages_have_commands_at_all():
    assert len(list(saap_lines())) > 60
    assert len(benchmarks()) > 20
    assert len(list(mentions())) > 10
