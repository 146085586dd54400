# SPDX-License-Identifier: MIT
"""What all three scripts promise on the command line."""

import json
import signal

import pytest
import torch

from tests.conftest import same

SMALL = "--size 64 --batch-size 16 --epochs 2 --known 0.3".split()
FLAGS = {  # what brings pseudo-labels into the first epochs
    "sst": [],
    "cbsa": ["--warm-up", "1"],
    "scinet": [],
}
each = pytest.mark.parametrize("name", FLAGS)


def load(folder):
    return torch.load(folder / "last.pt", weights_only=True)


@each
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(name, run, tmp_path):
    flags = [*SMALL, *FLAGS[name]]
    status, out, error = run(name, *flags, "--out", "whole")
    assert status == 0 and "mAP" in out, error
    status, *_ = run(name, *flags, "--out", "parts", stop=(2, signal.SIGKILL))
    assert status == -signal.SIGKILL
    status, _, error = run(name, *flags, "--out", "parts", "--resume", "auto")
    assert status == 0, error
    whole = load(tmp_path / "whole")
    parts = load(tmp_path / "parts")
    for part in ("args", "log"):
        whole.pop(part), parts.pop(part)
    assert same(whole, parts)
    lines = (tmp_path / "parts/log.jsonl").read_text().splitlines()
    assert [json.loads(line).get("epoch") for line in lines] == [None, 1, 2]
