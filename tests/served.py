# SPDX-License-Identifier: MIT
"""Runs a script in a process of its own, forked from one that has imported everything."""

import functools
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import cbsa  # noqa: F401
import common
import scinet  # noqa: F401
import sst
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
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            print(end.code, file=sys.stderr)
            sys.exit(1)
        except BaseException:
            traceback.print_exc()
            sys.exit(2)


# ------------------------------------------------------------------ changes that a run is given


def flip_hidden_labels(common):
    """Whatever a hide_ function hides is the other way round in the truth."""
    load = common.load_data

    def flipped(name, root, part, **more):
        classes, images, y = load(name, root, part, **more)
        if part == "train":
            hide = common.hide_images if "cbsa" in sys.argv[0] else common.hide_entries
            hidden = hide(y, 0.3, 1 if hide is common.hide_images else 0) == 0
            y = np.where(hidden, -y, y)
            Path("flipped labels").touch()
        return classes, images, y

    common.load_data = flipped


def at_call(common, name, number, act):
    """Call act(result) with the result of call `number` (from 1) of common.name."""
    original = getattr(common, name)
    calls = []

    def counted(*given, **more):
        calls.append(given)
        if len(calls) == number:
            return act(*given, **more)
        return original(*given, **more)

    setattr(common, name, counted)


def diverge_in_the_second_epoch(common):
    original = common.multilabel_metrics
    at_call(common, "multilabel_metrics", 2, lambda x, *more: original(x * np.nan, *more))


def fail_at_the_first_metrics(common):
    def fail(*given):
        raise RuntimeError("out of shared memory")

    at_call(common, "multilabel_metrics", 1, fail)


def note_seeds(common):
    """Write the seed that augments each image into a file of the process."""
    original = common.ImageDataset.__getitem__

    def noted(data, i):
        with open(f"seeds {os.environ['RANK']}", "a") as file:
            print(torch.initial_seed(), file=file)
        return original(data, i)

    common.ImageDataset.__getitem__ = noted


def compile_eagerly(common):
    torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    shutil.which = lambda name: name


def make_coco(root):
    """A COCO of 8 training and 4 test images of noise, with three classes."""
    noise = np.random.default_rng(0)
    for part, number in (("train2014", 8), ("val2014", 4)):
        (root / part).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        for k in range(number):
            pixels = noise.integers(256, size=(40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / part / f"{k}.jpg")
        categories = [dict(id=c, name=name) for c, name in ((1, "cat"), (5, "dog"), (9, "owl"))]
        images = [dict(id=k, file_name=f"{k}.jpg") for k in range(number)]
        shown = [(k, c) for k in range(number) for c in (1, 5, 9) if (k + c) % 3]
        annotations = [dict(image_id=k, category_id=c) for k, c in shown]
        spec = dict(categories=categories, images=images, annotations=annotations)
        (root / f"annotations/instances_{part}.json").write_text(json.dumps(spec))


# --------------------------------------------------------------------- a loss of two processes


def cst_case():
    """A network of features (B, C, D), and 8 images with labels, some known."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 7)
    x = torch.randn(8, 5, 6, generator=rng)
    y = torch.randint(-1, 2, (8, 5), generator=rng).to(torch.int8)
    return net, x, y


def cst_gradient(rank, folder):
    """Save the gradient that process `rank` of two has of L_cst, each with half of the images."""
    sst.WORLD_SIZE = 2
    sst.RANK = rank
    where = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    torch.set_num_threads(1)
    net, x, y = cst_case()
    model = torch.nn.parallel.DistributedDataParallel(net)
    own = slice(4 * rank, 4 * rank + 4)
    sst.cst_loss(sst.gather(model(x[own])), sst.gather(y[own])).backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    torch.save(gradients, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
