# SPDX-License-Identifier: MIT
"""Runs a script in a process of its own, forked from one that has imported everything."""

import functools
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

import torch

import cbsa  # noqa: F401
import common
import scinet  # noqa: F401
import sst  # noqa: F401
from tests.toy import world

drawn = functools.cache(world.scenes)
drawn(50, 0), drawn(25, 1)


def serve(script, arguments, folder, env=None, stop=None, change=None):
    """Run a script as __main__ in `folder`, with stdout and stderr there.

    env: variables, such as those that torchrun sets. stop (number, signal): the process gets the
    signal when it is about to move its checkpoint of that number into place. change: called with
    the module common before the script starts.
    """
    os.environ.update(env or {})
    multiprocessing.set_start_method("fork", force=True)  # for the loaders' workers, as usual
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the back
    os.chdir(folder)
    path = Path(__file__).resolve().parent.parent / f"{script}.py"
    sys.argv = [str(path), *arguments]
    with open("stdout", "a") as sys.stdout, open("stderr", "a") as sys.stderr:
        torch.set_num_threads(1)
        world.scenes = lambda n, seed: drawn(n // 40, seed)
        if stop:
            replace = os.replace
            number, sent = stop
            saved = []

            def counted(*given):
                saved.append(given)
                if len(saved) == number:
                    os.kill(os.getpid(), sent)
                replace(*given)

            os.replace = counted
        if change:
            change(common)
        runpy.run_path(str(path), run_name="__main__")
