"""Every command in README and docs: it exists, its configuration is valid, its query has an answer."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from flows.cli import app
from flows.combinations import combinations
from storage.remote import Remote
from tasks.config import load_config
from tests.flows.pages.made import Maker

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = "20261127T120000-0aa001"
COMMANDS = typer.main.get_command(app)
PLACES = {" …": "", "/path/to/data": "mini", "data=hub": "data=mini", " RUN": f" {RUN}", "20261122T091500-a1b2c3": RUN}


def shell_lines():
    """(page:line, command) of every shell line inside a code block."""
    for page in PAGES:
        inside, language = False, ""
        for number, line in enumerate(page.read_text().splitlines(), 1):
            if line.startswith("```"):
                inside, language = not inside, line[3:].strip()
            elif inside and language in ("", "sh", "bash") and re.match(r"(saap|python|make|prefect|pip) ", line):
                yield pytest.param(line, id=f"{page.name}:{number}")


def mentions():
    """Every `saap …` inside a text."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for words in sorted(set(re.findall(r"`saap ([a-z][^`]*)`", text))):
            yield pytest.param(words, id=f"{page.name}: {words[:40]}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a store of one run, a remote one that has it too, and mine.toml."""
    maker = Maker(tmp_path_factory.mktemp("docs") / "saap_store")
    maker.run(RUN)
    maker.warehouse.rebuild()
    folder = maker.store.root.parent
    (folder / "shared").mkdir()
    Remote(str(folder / "shared")).push(maker.store, RUN)
    (folder / "mine.toml").write_text(f"store = '{maker.store.root}'\n")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


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


@pytest.mark.parametrize("line", shell_lines())
def test_a_command_of_a_block_is_one(line, place, monkeypatch, tiny_folder):
    monkeypatch.chdir(place)
    monkeypatch.setenv("SAAP_STORE", str(place / "saap_store"))
    for written, here in {**PLACES, "s3://bucket/prefix": str(place / "shared")}.items():
        line = line.replace(written, here)
    program, *words = shlex.split(re.sub(r"/models/[^ ]+", str(tiny_folder), line), comments=True)
    if program == "saap":
        check_saap(words)
    elif program == "python":
        file = ROOT / words[0]
        code = file.read_text() + (ROOT / "benchmarks" / "common.py").read_text()
        options = [word for word in words[1:] if word.startswith("--")]
        named = 'f"--{name}"' in code  # options made in a loop over names
        assert all(f'"{word}"' in code or (named and f'"{word[2:]}"' in code) for word in options), line
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert program in ("prefect", "pip")


def check_saap(words):
    words = words[: words.index(">")] if ">" in words else words
    name, values = parsed(words)
    if name in ("run", "plan"):
        load_config(values["config"], tuple(values["set_"] or ()))
    elif name in ("sweep", "compare"):
        assert combinations(str(values["config"]), tuple(values["set_"] or ()))
    elif not name.startswith("export"):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (words, done.output, done.exception)


@pytest.mark.parametrize("words", mentions())
def test_a_command_named_in_a_text_is_one(words):
    names = [word for word in words.split() if re.fullmatch(r"[a-z]+", word)]
    command = COMMANDS.commands.get(names[0])
    assert command is not None, words
    if hasattr(command, "commands") and len(names) > 1:
        command = command.commands[names[1]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z][a-z-]*", words)) <= known, words


def test_the_pages_have_commands_at_all():
    assert len(list(shell_lines())) > 30
    assert len(list(mentions())) > 10
