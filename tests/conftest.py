# SPDX-License-Identifier: MIT
import functools
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests import toy  # noqa: E402

toy.scenes = functools.cache(toy.scenes)  # drawn once for all tests
tokenizer = functools.cache(open_clip.factory.SimpleTokenizer)  # it reads a large vocabulary
open_clip.factory.SimpleTokenizer = tokenizer
torch.set_num_threads(1)  # what tests compute is small: a second thread costs more than it does


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs an NVIDIA GPU, skipped without")
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR")  # beta since 2021


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


def small_clip(weights="none", size=64):
    """The toy CLIP, and its tokenizer."""
    import common

    torch.manual_seed(0)
    return common.load_clip("local-dir:tests/toy_clip", weights, size)


def same(a, b):
    """Bit for bit, whatever the nesting."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
