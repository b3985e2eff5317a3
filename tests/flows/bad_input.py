"""Running a command in this process and looking at how it refuses: shared by the tables of bad input."""

from typer.testing import CliRunner

from flows.commands import app

RUNNER = CliRunner()


def refused(*arguments):
    """The one line that `saap ARGUMENTS` is refused with: exit code 2, and nothing that Python would trace."""
    done = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert done.exception is not None, f"taken without a word: {done.output[-300:]}"
    assert getattr(done.exception, "exit_code", None) == 2, repr(done.exception)
    (line,) = str(done.exception).splitlines()
    assert len(line) < 600
    return line


def assert_refused(words, *arguments):
    line = refused(*arguments)
    missing = [word for word in words if word not in line]
    assert not missing, (missing, line)


def settings(overrides):
    return [part for override in overrides for part in ("--set", override)]
