"""Commands of ours in what we print: they name the store, so that a copy of the line does what it says."""

import shlex
from pathlib import Path


def in_store(root: Path) -> str:
    """The option that names a store."""
    return f"--store {shlex.quote(str(root))}"


def how_to_list(root: Path) -> str:
    """The command that lists the runs of a store."""
    return f"saap sql {in_store(root)} 'select run_id, name, status from runs'"
