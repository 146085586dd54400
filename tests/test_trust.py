# SPDX-License-Identifier: MIT
"""Runs that are killed, interrupted, out of disk, or spread over processes; how many: KILLS=1."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import served
import torch
from conftest import same

import common

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("KILLS", 1))
RUN = "--weights none --known 0.3 --batch-size 16 --epochs 3 --out run --resume auto".split()
FLAGS = {
    "sst": [],
    "cbsa": "--size 64 --warm-up 1".split(),
    "scinet": "--size 64 --ramp 0 --neighbours 5".split(),
}
each = pytest.mark.parametrize("name", FLAGS)


@pytest.fixture(scope="module")
def start():
    """start(name, folder, ...) -> a running process; see served.serve."""
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["served"])

    def run(name, folder, **how):
        Path(folder).mkdir(exist_ok=True)
        arguments = [*RUN, *FLAGS[name]]
        process = context.Process(target=served.serve, args=(name, arguments, folder), kwargs=how)
        process.start()
        return process

    return run


def finish(process):
    process.join(200)
    return process.exitcode


def state(folder):
    saved = torch.load(Path(folder) / "run" / "last.pt", weights_only=True)
    return {name: value for name, value in saved.items() if name != "args"}


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """whole(name) -> the checkpoint of an uninterrupted run and the seconds it took."""
    done = {}

    def run(name):
        if name not in done:
            folder, begin = tmp_path_factory.mktemp(name), time.time()
            assert finish(start(name, folder)) == 0, (folder / "stderr").read_text()
            done[name] = state(folder), time.time() - begin
        return done[name]

    return run


@each
def test_runs_killed_at_random_moments_end_with_the_same_bits(name, start, whole, tmp_path):
    expected, longest = whole(name)
    draw, kills, runs = random.Random(name), 0, 0
    while kills < KILLS:
        folder = tmp_path / str(runs := runs + 1)
        process = start(name, folder)
        process.join(draw.uniform(0, longest))
        process.kill()
        if finish(process) == 0:
            longest *= 0.7  # this one ended before; the first one was slow
        kills += process.exitcode == -signal.SIGKILL
        assert finish(start(name, folder)) == 0, (folder / "stderr").read_text()
        assert same(state(folder), expected)
    print(f"{name}: {kills} runs killed")


@each
@pytest.mark.parametrize(
    "where",
    [
        ("common", "add_losses", 5),  # in a step of the second epoch
        ("torch", "save", 2),  # when a checkpoint is begun
        ("os", "fsync", 2),  # when it is written and not yet in place
        ("os", "replace", 1),  # before the first is in place
        ("common", "multilabel_metrics", 3),  # in an evaluation
    ],
)
def test_runs_killed_in_a_bad_moment_end_with_the_same_bits(name, where, start, whole, tmp_path):
    assert finish(start(name, tmp_path, where=where, sign=signal.SIGKILL)) == -signal.SIGKILL
    assert finish(start(name, tmp_path)) == 0, (tmp_path / "stderr").read_text()
    assert same(state(tmp_path), whole(name)[0])


@each
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_exits(name, sign, start, whole, tmp_path):
    for number in (2, 3):  # steps, of two epochs
        where = ("common", "add_losses", number)
        assert finish(start(name, tmp_path, where=where, sign=sign)) == 128 + sign
        assert (tmp_path / "run/last.pt").exists()
    error = (tmp_path / "stderr").read_text().splitlines()
    assert len(error) == 2 and all(sign.name in line and "--resume auto" in line for line in error)
    assert state(tmp_path)["tally"]["step"] > 0
    assert finish(start(name, tmp_path)) == 0, (tmp_path / "stderr").read_text()
    assert same(state(tmp_path), whole(name)[0])


@each
def test_a_signal_in_an_evaluation_loses_no_step(name, start, whole, tmp_path):
    where = ("common", "multilabel_metrics", {"sst": 1, "cbsa": 3, "scinet": 2}[name])
    finish(start(name, tmp_path, where=where, sign=signal.SIGTERM))
    assert finish(start(name, tmp_path)) == 0
    assert same(state(tmp_path), whole(name)[0])


@each
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint(name, start, whole, tmp_path):
    where = ("common", "add_losses", 5)
    assert finish(start(name, tmp_path, where=where, sign=signal.SIGKILL)) == -signal.SIGKILL
    before = (tmp_path / "run/last.pt").read_bytes()
    assert finish(start(name, tmp_path, limit=20_000)) == 2
    error = (tmp_path / "stderr").read_text()
    assert error.count("\n") == 1 and "last.pt cannot be written" in error
    assert (tmp_path / "run/last.pt").read_bytes() == before
    assert not list(tmp_path.glob("run/*.tmp"))
    assert finish(start(name, tmp_path)) == 0
    assert same(state(tmp_path), whole(name)[0])


# --------------------------------------------------------------------------------------- processes

# batch statistics are frozen: with them, a batch on two processes is what it is on one
RUNNER = """
import sys
import {name}, common, served
served.small_world()
if "{name}" == "sst":
    train = sst.SST.train
    sst.SST.train = lambda self, mode=True: (train(self, mode), self.project.eval())[0]
common.run_script({name}.main)
"""


def launch(name, folder, count, *more):
    folder.mkdir(exist_ok=True)
    (folder / "runner.py").write_text(RUNNER.format(name=name))
    several = f"-m torch.distributed.run --standalone --nproc_per_node {count}".split()
    arguments = [*(several if count > 1 else []), "runner.py", *RUN, *FLAGS[name], *more]
    env = os.environ | dict(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1")
    out = dict(stdout=open(folder / "stdout", "a"), stderr=open(folder / "stderr", "a"))
    return subprocess.Popen([sys.executable, *arguments], cwd=folder, env=env, **out)


@each
def test_two_processes_give_the_losses_and_scores_of_one(name, tmp_path):
    short = "--epochs", "2"
    runs = [launch(name, tmp_path / str(n), n, *short) for n in (1, 2)]
    for k, run in enumerate(runs, 1):
        assert run.wait(200) == 0, (tmp_path / str(k) / "stderr").read_text()
    one, two = ([e for e in log(tmp_path / str(n)) if e.get("epoch")] for n in (1, 2))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        keys = [key for key in a if key.startswith(("loss", "mAP"))]
        assert len(keys) > 3 and all(a[k] == pytest.approx(b[k], rel=1e-3) for k in keys), (a, b)
    weights = [state(tmp_path / str(n))["model"] for n in (1, 2)]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-2, atol=1e-3)
    table = [(tmp_path / str(n) / "stdout").read_text().count("last epoch") for n in (1, 2)]
    assert table == [1, 1]  # one process writes


def log(folder):
    return [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]


def test_a_process_that_dies_ends_the_run_within_a_minute(tmp_path):
    run = launch("sst", tmp_path, 2, "--epochs", "500")
    while not (tmp_path / "run/last.pt").exists():
        assert run.poll() is None, (tmp_path / "stderr").read_text()
        time.sleep(0.1)
    children = f"/proc/{run.pid}/task/{run.pid}/children"
    os.kill(int(Path(children).read_text().split()[1]), signal.SIGKILL)
    begin = time.time()
    assert run.wait(60) != 0 and time.time() - begin < 60
    error = (tmp_path / "stderr").read_text()
    assert "exitcode:-9" in error.replace(" ", "")


def test_batches_that_processes_cannot_share_are_refused(tmp_path):
    run = launch("sst", tmp_path, 2, "--batch-size", "15")
    assert run.wait(200) != 0
    assert "cannot share 15 images" in (tmp_path / "stderr").read_text()


def test_pieces_of_a_loss_that_broke_are_named():
    tally, inf = {}, torch.tensor(float("inf"))
    for step in range(4):
        good = torch.tensor(float(step))
        common.add_losses(tally, dict(loss_a=good, loss_b=inf if step > 1 else good))
    with pytest.raises(common.InputError, match="epoch 7, step 3: loss_b is not finite"):
        common.mean_losses(tally, 7)
