# SPDX-License-Identifier: MIT
import os

os.environ["OMP_NUM_THREADS"] = "1"  # what tests compute is small: a second thread costs more

import multiprocessing  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.nn.functional import normalize  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
processes = multiprocessing.get_context("forkserver")  # each is a fork of one with all imports
processes.set_forkserver_preload(["tests.served"])


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs an NVIDIA GPU, skipped without")


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def double(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def unit(rng, *shape):
    return normalize(double(rng, *shape), dim=-1)


def random_labels(rng, rows=6, classes=5):
    return torch.randint(-1, 2, (rows, classes), generator=rng).to(torch.int8)


def random_images(rng, size=128, n=3):
    return torch.randint(256, (n, 3, size, size), generator=rng, dtype=torch.uint8)


class Batches(list):
    """Batches, as of a loader of four images."""

    dataset = range(4)


def same(a, b):
    """Bit for bit, whatever the nesting."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def start(tmp_path):
    """start(script, *arguments, **more): a process that runs a script in tmp_path, on the toy world
    with 50 training and 25 test scenes, as from a command line; more: those of `served.serve`."""
    from tests import served

    def begin(script, *arguments, **more):
        given = (script, list(map(str, arguments)), str(tmp_path))
        process = processes.Process(target=served.serve, args=given, kwargs=more)
        process.start()
        return process

    return begin


@pytest.fixture
def run(start, tmp_path):
    """run(script, *arguments, **more) -> exit status, standard output and standard error."""

    def command(*given, **more):
        process = start(*given, **more)
        process.join(200)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{given} does not end")
        texts = [(tmp_path / name).read_text() for name in ("stdout", "stderr")]
        for name in ("stdout", "stderr"):
            (tmp_path / name).unlink()
        return process.exitcode, *texts

    return command
