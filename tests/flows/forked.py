"""`saap` in a process of its own that has the libraries already, so that no command takes seconds to import them.

None of our own modules, which read the environment when they are imported: those are a command's own. Prefect reads it
then too, and again for a command where `saap` would import it.
Reads lines of JSON (arguments, environment, folder, files for its output and its exit status), and answers each with
the process.
"""

import gc
import json
import os
import runpy
import signal
import sys
import traceback
from functools import cache

import datasets  # noqa: F401
import duckdb  # noqa: F401
import lm_eval.evaluator  # noqa: F401
import peft  # noqa: F401
import prefect.context
import prefect.flow_engine
import prefect.task_engine
import torch  # noqa: F401
import transformers.trainer  # noqa: F401
import vl_convert
from torch.utils import collect_env

SECONDS = 600


def run(order):
    """In the child: become the command."""
    signal.alarm(SECONDS)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    for number, file in ((0, os.devnull), (1, order["output"]), (2, order["errors"])):
        os.dup2(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT), number)
    sys.argv = order["program"]
    try:
        settings_are_read_again()
        if sys.argv[0] == "flows.cli":
            runpy.run_module("flows.cli", run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def settings_are_read_again():
    """Prefect's, once `saap` has put its own into the environment."""
    import flows.server

    prefect.context.refresh_global_settings_context()
    quiet_settings = flows.server.quiet_settings

    def then_read(store):
        quiet_settings(store)
        prefect.context.refresh_global_settings_context()

    flows.server.quiet_settings = then_read


def keep_what_is_the_same_for_all():
    """What lm-eval says of the machine, by ten programs that it starts, and the library of the pages: three seconds."""
    collect_env.get_pretty_env_info = cache(collect_env.get_pretty_env_info)
    collect_env.get_pretty_env_info()
    vl_convert.javascript_bundle = cache(vl_convert.javascript_bundle)
    vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")  # as flows/pages/render.py asks for it


def keep(order):
    """Start the command, say which process it is, and write its exit status once it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (command := os.fork()) == 0:
        run(order)
    print(command, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    with open(order["status"] + ".new", "w") as file:
        file.write(str(code))
    os.rename(file.name, order["status"])
    os._exit(0)


if __name__ == "__main__":
    keep_what_is_the_same_for_all()
    gc.freeze()  # no command looks through the libraries' objects
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    for line in sys.stdin:
        if os.fork() == 0:
            keep(json.loads(line))
