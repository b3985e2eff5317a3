"""`saap` in a process of its own that has the libraries already, so that no command takes seconds to import them.

None of our own modules and not Prefect, which read the environment when they are imported: those are a command's own.
Reads lines of JSON (arguments, environment, folder, where its output goes), and answers each with the exit status.
"""

import json
import os
import runpy
import signal
import sys
import traceback

import datasets  # noqa: F401
import duckdb  # noqa: F401
import lm_eval.evaluator  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
import transformers.trainer  # noqa: F401

SECONDS = 600


def run(order):
    """In the child: become the command."""
    signal.alarm(SECONDS)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    for number, file in ((0, os.devnull), (1, order["stdout"]), (2, order["stderr"])):
        os.dup2(os.open(file, os.O_RDWR), number)
    sys.argv = order["program"]
    try:
        if sys.argv[0] == "flows.cli":
            runpy.run_module("flows.cli", run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
