# SPDX-License-Identifier: MIT
import functools
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

common.toy_scenes = functools.cache(common.toy_scenes)  # drawn once for all tests
torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs an NVIDIA GPU, skipped without")


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)
