"""`saap` that dies by SIGKILL in the middle of publishing one stage: files are written, the manifest is not.

python kill.py STAGE run CONFIG …
"""

import os
import signal
import sys

from storage import artifacts

stage = sys.argv.pop(1)
flush = artifacts.fsync


def die_in_stage(path):
    if f"/{stage}/.draft-" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)


artifacts.fsync = die_in_stage

if __name__ == "__main__":
    from flows.cli import main

    main()
