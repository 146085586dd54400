# SPDX-License-Identifier: MIT
"""Runs a script in a process of its own, forked from one that has imported everything."""

import functools
import multiprocessing
import os
import resource
import signal
import sys

import torch

import cbsa
import common
import scinet
import sst
from tests import toy

SCRIPTS = {"sst": sst, "cbsa": cbsa, "scinet": scinet}
drawn = functools.cache(toy.scenes)
drawn(50, 0), drawn(25, 1)


def small_world() -> None:
    """50 training scenes and 25 test scenes, and no pictures: other tests look at them."""
    toy.scenes = lambda n, seed: drawn(n // 40, seed)
    common.save_image = lambda *cells, **more: None


def at_call(module, name: str, number: int, act) -> None:
    """Call `act` before call `number` (from 1) of module.name."""
    original, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            act()
        return original(*args, **kwargs)

    setattr(module, name, counted)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def unreadable() -> None:
    raise common.InputError("image x.jpg cannot be read; replace or remove it")


def serve(
    name: str, arguments: list[str], folder: str, where=None, act=None, limit=None, several=None
) -> None:
    """Run a script in `folder`, its output appended to stdout and stderr there.

    where (module, function, number): before that call the process gets the signal `act`, or `act`
    is called; `limit` is the size in bytes that files can grow to; `several` what torchrun would
    tell the process.
    """
    if several:
        os.environ.update(several)
        common.RANK = int(several["RANK"])
        common.PROCESSES = int(several["WORLD_SIZE"])
    multiprocessing.set_start_method("fork", force=True)  # for the loaders' workers, as usual
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the back
    os.chdir(folder)
    sys.argv = [f"{name}.py", *arguments]
    sys.stdout, sys.stderr = open("stdout", "a"), open("stderr", "a")
    torch.set_num_threads(1)
    common.EPOCH = torch.zeros_like(common.EPOCH).share_memory_()  # of this process and its workers
    small_world()
    if where:
        module, function, number = where
        send = act if callable(act) else lambda: os.kill(os.getpid(), act)
        at_call(sys.modules[module], function, number, send)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        common.run_script(SCRIPTS[name].main)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def cst_case():
    """A network of features (B, C, D), and 8 images with labels, some known."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 7)
    x = torch.randn(8, 5, 6, generator=rng)
    y = torch.randint(-1, 2, (8, 5), generator=rng).to(torch.int8)
    return net, x, y


def cst_gradient(rank: int, folder: str) -> None:
    """The gradient that process `rank` of two has of L_cst, each with half of the images."""
    common.PROCESSES, common.RANK = 2, rank
    where = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    torch.set_num_threads(1)
    net, x, y = cst_case()
    model = common.parallel(net, compiled=False)
    own = slice(4 * rank, 4 * rank + 4)
    sst.cst_loss(common.gather(model(x[own])), common.gather(y[own])).backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    torch.save(gradients, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
