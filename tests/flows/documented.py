"""The commands that README and docs show, and a reader who types them in at small sizes."""

import logging
import re
import shlex
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

from typer.testing import CliRunner

from flows.commands import app
from flows.progress import StageLines
from storage.runs import all_runs, read_run
from tasks.config import load_config
from tasks.data import mini_folder
from tasks.toml import read_toml, toml_value

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
LINKS = re.compile(r"\]\((docs/\w+\.md)\)")
ORDER = [ROOT / link for link in LINKS.findall(README.read_text().partition("More, in the order")[2])]
PAGES = [README, *ORDER, *sorted(set((ROOT / "docs").glob("*.md")) - set(ORDER))]
PROGRAM = re.compile(r"(saap|python|make|prefect|pip|vllm|export|benchmarks/\w+\.sh|--set)( |$)")

# The sizes of everything that is run here. Whole numbers are upper limits; the rest counts where the line says nothing.
SIZES = {
    "calibrate.count": 6, "calibrate.length": 16, "calibrate.own": 2, "prune.align": 8, "prune.protect": [0, -1],
    "recover.examples": 8, "recover.epochs": 1, "recover.batch_size": 4, "recover.micro_batch_size": 4,
    "recover.rank": 4, "recover.max_length": 128,
    "evaluate.benchmarks": ["arc_easy", "wikitext2"], "evaluate.limit": 2,
    "evaluate.windows": [128], "evaluate.max_tokens": 256, "speed.prompt_tokens": 8, "speed.new_tokens": 4,
    "speed.runs": 2, "speed.warmup": 1, "compute.device": "cpu", "compute.threads": 1,
}  # fmt: skip
AXES = {"calibrate.count": [3, 4], "recover.examples": [8, 12]}  # in the place of what a sweep varies


def blocks(page):
    """(language, [(number, line), …]) of each code block: between fences, or indented by four spaces."""
    language, lines, found, indented = None, [], [], False
    for number, line in enumerate([*page.read_text().splitlines(), ""], 1):
        if line.startswith("```"):
            if language is not None:
                found.append((language, lines))
            language, lines = (line[3:].strip() if language is None else None), []
        elif language is not None:
            lines.append((number, line))
        elif line.startswith("    ") and PROGRAM.match(line.strip()):
            found.append(("", [(number, line.strip())]))
            indented = True
        elif indented and line.startswith("     "):  # the line before goes on
            number, first = found[-1][1].pop()
            found[-1][1].append((number, f"{first.removesuffix(chr(92))} {line.strip()}"))
        else:
            indented = False
    return found


def commands(page):
    """(number, command) of every line of the shell blocks, in order."""
    return [line for language, lines in blocks(page) if language in ("", "sh", "bash") for line in lines if line[1]]


class Reader:
    """Somebody with a folder, a store and a few small models, who types in what a page shows."""

    def __init__(self, folder, models):
        """models: what stands for each /models/… of the pages."""
        self.store, self.home, self.places = folder / "saap_store", folder, {"/path/to/data": str(mini_folder())}
        prose = str(mini_folder() / "bookcorpus_like/passages.jsonl")
        self.places |= {"data=hub": "data=mini", "novels.parquet": prose, **models}
        self.configs = folder / "configs"
        self.configs.mkdir()
        for file in (ROOT / "configs").glob("*.toml"):
            (self.configs / file.name).write_text(_shortened(file, models))

    def sits_down(self, page):
        """A folder of the page's own, with the configurations and a mine.toml in it."""
        here = self.home / page.stem
        if not here.exists():
            here.mkdir()
            (here / "configs").symlink_to(self.configs)
        if (mine := self.home / "mine.toml").exists():
            shutil.copy(mine, here)
        return here

    def types(self, line):
        """Run a line in this process and the folder it is in. Returns its words as run, and the result."""
        words = self.words(line)
        target = words[words.index(">") + 1] if ">" in words else None
        asked = words[1 : words.index(">")] if target else words[1:]
        with _own_screen():
            done = CliRunner().invoke(app, asked)
        assert done.exit_code == 0, (line, asked, done.output[-3000:], done.stderr[-3000:], done.exception)
        if target:
            Path(target).write_text(done.stdout)
        return words, done

    def words(self, line):
        """The words of a line, with places that are here and, where it has a configuration, with the sizes."""
        for written, here in self.places.items():
            line = line.replace(written, here)
        line = line.replace("20261122T091500-a1b2c3", "RUN").replace("'…'", "'RUN'")
        for at in reversed(range(len(re.findall(r"\bRUN\b", line)))):  # the last one named is the newest
            line = re.sub(r"\bRUN\b", self.runs()[at], line, count=1)
        line = line.replace("/models/my-pruned-llama", str(self.newest("prune")))
        words = shlex.split(line, comments=True)
        file = next((word for word in words if word.endswith(".toml") and words[1] != "config"), None)
        return [*words, *(self._sizes(file, words) if file else [])]

    def runs(self):
        """Ids of the completed runs, the newest first."""
        return [run for run in reversed(all_runs(self.store)) if read_run(self.store, run)["status"] == "completed"]

    def newest(self, stage):
        """The folder of the newest artifact of a stage."""
        return max(self.store.glob(f"{stage}/[!.]*"), key=lambda folder: folder.stat().st_mtime, default=None)

    def _sizes(self, file, words):
        said = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
        axes, paths = read_toml(file).get("sweep", {}), {one.partition("=")[0] for one in said}
        chosen = [f"{path}={toml_value(values[0])}" for path, values in axes.items()]
        there, sizes = load_config(file, (*chosen, *said)), {}
        for path, size in {**SIZES, "model.path": self.places["/models/Llama-3.2-1B"], "data": "mini"}.items():
            section, _, field = path.rpartition(".")
            now = getattr(getattr(there, section) if section else there, field)
            if isinstance(size, int) and now is not None:
                size = size if now == "auto" else min(size, now)
            elif path in paths:
                continue
            if path not in axes and size != now:
                sizes[path] = size
        return [word for path, size in sizes.items() for word in ("--set", f"{path}={toml_value(size)}")]


def _shortened(file, models):
    """A file of configs/ whose sweep has two values of its first axis and one of any other."""
    text = file.read_text()
    axes = read_toml(file).get("sweep", {})
    small = {**AXES, "model.path": [models["/models/Llama-3.2-1B"]]}
    lines = [
        f'"{path}" = {toml_value(small.get(path, values)[: 1 if number else 2])}\n'
        for number, (path, values) in enumerate(axes.items())
    ]
    return re.sub(r"^\[sweep\]\n.*?(?=^\[|\Z)", lambda _: "".join(["[sweep]\n", *lines, "\n"]), text, flags=re.M | re.S)


@contextmanager
def _own_screen():
    """Takes away the stage lines of the command, which would go on for the commands after it."""
    try:
        yield
    finally:
        for name in (None, *logging.root.manager.loggerDict):
            for handler in logging.getLogger(name).handlers:
                handler.filters = [one for one in handler.filters if not isinstance(one, StageLines)]


def recipe_of(target):
    """The commands of a target of the Makefile, as make would run them."""
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
