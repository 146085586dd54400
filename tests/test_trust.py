# SPDX-License-Identifier: MIT
"""Runs that are killed, fail, or are spread over processes; how many are killed: KILLS=1."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import common
import sst
from tests import served
from tests.conftest import same

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
    """start(name, folder, *arguments, ...) -> a running process; see served.serve."""
    os.environ["PYTHONPATH"] = str(ROOT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.served"])

    def run(name, folder, *more, **how):
        Path(folder).mkdir(exist_ok=True)
        arguments = [*RUN, *FLAGS[name], *more]
        process = context.Process(target=served.serve, args=(name, arguments, folder), kwargs=how)
        process.start()
        return process

    return run


def finish(process, seconds=200):
    process.join(seconds)
    return process.exitcode


def log(folder):
    return [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]


TIMES = {"seconds", "images_per_second", "peak_memory_gb"}


def end(folder):
    """What a run ends with: the checkpoint and the log without its first line and its times."""
    saved = torch.load(Path(folder) / "run" / "last.pt", weights_only=True)
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in log(folder)[1:]]
    return {k: v for k, v in saved.items() if k not in ("args", "log")} | dict(lines=lines)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """whole(name) -> the end of an uninterrupted run and the seconds it took."""
    done = {}

    def run(name):
        if name not in done:
            folder, begin = tmp_path_factory.mktemp(name), time.time()
            assert finish(start(name, folder)) == 0, (folder / "stderr").read_text()
            done[name] = end(folder), time.time() - begin
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
        assert same(end(folder), expected)
    print(f"{name}: {kills} runs killed")


MOMENTS = [(name, ("torch.autograd", "backward", 5)) for name in FLAGS]  # in the second epoch
MOMENTS += [(name, ("common", "multilabel_metrics", 3)) for name in FLAGS]  # in an evaluation
MOMENTS += [  # common.Run is one for all scripts
    ("sst", ("torch", "save", 2)),  # when a checkpoint is begun
    ("sst", ("os", "fsync", 3)),  # when it is written and not yet in place
    ("sst", ("os", "replace", 1)),  # before the first is in place
]


@pytest.mark.parametrize(("name", "where"), MOMENTS)
def test_runs_killed_in_a_bad_moment_end_with_the_same_bits(name, where, start, whole, tmp_path):
    assert finish(start(name, tmp_path, where=where, act=signal.SIGKILL)) == -signal.SIGKILL
    assert finish(start(name, tmp_path)) == 0, (tmp_path / "stderr").read_text()
    assert same(end(tmp_path), whole(name)[0])


ERRORS = {  # where, what happens there, exit status, word of the last line
    "step": (("common", "add_up", 2), served.out_of_memory, 1, "OutOfMemoryError"),
    "evaluation": (("common", "average_precision", 3), served.out_of_memory, 1, "OutOfMemoryError"),
    "image": (("common", "open_image", 3), served.unreadable, 2, "error: image x.jpg"),
    "Ctrl-C": (("common", "add_up", 2), signal.SIGINT, 130, "--resume auto"),
}
# in a loader's worker, its third image
CASES = [("step", 0), ("step", 2), ("evaluation", 4), ("image", 0), ("image", 2), ("image", 4)]
CASES += [("Ctrl-C", 0), ("Ctrl-C", 2)]
CASES = [(name, *case) for name in ("sst", "cbsa") for case in CASES]
CASES += [("scinet", "step", 0), ("scinet", "image", 2)]  # it loads as sst does


@pytest.mark.parametrize(("name", "kind", "workers"), CASES)
def test_an_error_ends_the_program(name, kind, workers, start, tmp_path):
    where, act, status, word = ERRORS[kind]
    process = start(name, tmp_path, "--workers", str(workers), where=where, act=act)
    assert finish(process, 60) == status, (tmp_path / "stderr").read_text()
    error = (tmp_path / "stderr").read_text()
    assert word in error.splitlines()[-1], error
    assert status == 1 or error.count("\n") == 1, error


def test_the_program_ends_from_the_shell_too(tmp_path):
    """As above, for an interpreter that finishes as usual, and a signal to all its processes."""
    acts = {"image": "served.unreadable", "Ctrl-C": "lambda: os.killpg(0, 2)"}
    more = dict(env=os.environ | dict(PYTHONPATH=str(ROOT)), start_new_session=True)
    runs = {}
    for kind, act in acts.items():  # at once: they import long
        where, function, number = ERRORS[kind][0]
        lines = "import os, signal; from tests import served; import sst, common"
        lines += "; served.small_world(); signal.signal(signal.SIGINT, signal.default_int_handler)"
        lines += f"; served.at_call({where}, {function!r}, {number}, {act})"
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "runner.py").write_text(f"{lines}; common.run_script(sst.main)\n")
        command = [sys.executable, "runner.py", *RUN, "--workers", "2"]
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        runs[kind] = subprocess.Popen(command, cwd=tmp_path / kind, **pipes, **more)
    for kind, run in runs.items():
        error = run.communicate(timeout=90)[1]
        assert run.returncode == ERRORS[kind][2] and ERRORS[kind][3] in error, error
        assert error.count("\n") == 1, error


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint(start, whole, tmp_path):
    name = "sst"  # common.Run is one for all scripts
    where = ("os", "replace", 2)  # in the second epoch
    assert finish(start(name, tmp_path, where=where, act=signal.SIGKILL)) == -signal.SIGKILL
    before = (tmp_path / "run/last.pt").read_bytes()
    assert finish(start(name, tmp_path, limit=20_000)) == 2
    error = (tmp_path / "stderr").read_text()
    assert error.count("\n") == 1 and "last.pt cannot be written" in error
    assert (tmp_path / "run/last.pt").read_bytes() == before
    assert finish(start(name, tmp_path)) == 0
    assert same(end(tmp_path), whole(name)[0])


# --------------------------------------------------------------------------------------- processes

RUNNER = """
import os
import {name}, common
from tests import served
served.small_world()
if common.RANK == {fails}:
    served.at_call(common, "add_up", 3, served.out_of_memory)
common.run_script({name}.main)
"""


def launch(name, folder, count, *more, fails=None):
    folder.mkdir(exist_ok=True)
    (folder / "runner.py").write_text(RUNNER.format(name=name, fails=fails))
    several = f"-m torch.distributed.run --standalone --nproc_per_node {count}".split()
    arguments = [*(several if count > 1 else []), "runner.py", *RUN, *FLAGS[name], *more]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    out = dict(stdout=open(folder / "stdout", "a"), stderr=open(folder / "stderr", "a"))
    return subprocess.Popen([sys.executable, *arguments], cwd=folder, env=env, **out)


def run_two(name, start, folder, *more):
    """As torchrun does, but forked: an interpreter that imports everything takes longer to start
    than the run takes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    both = [start(name, folder, *more, several=shared | dict(RANK=str(r))) for r in (0, 1)]
    return max(abs(finish(process)) for process in both)


@each
def test_two_processes_train_evaluate_every_image_once_and_one_writes(name, start, tmp_path):
    if name == "sst":
        status = launch(name, tmp_path, 2, "--epochs", "2").wait(200)
    else:
        status = run_two(name, start, tmp_path, "--epochs", "2")
    assert status == 0, (tmp_path / "stderr").read_text()
    epochs = [entry for entry in log(tmp_path) if entry.get("epoch")]
    assert len(epochs) == 2 and (tmp_path / "stdout").read_text().count("| last epoch |") == 1
    # one process alone gives the checkpoint the same scores
    assert finish(start(name, tmp_path, "--eval", "--resume", "run/last.pt")) == 0
    shown = (tmp_path / "stdout").read_text().split("\nmAP: ")[1].split()[0]
    assert float(shown) == pytest.approx(epochs[-1]["mAP"], abs=0.05)  # other batches, other bits


def test_cross_image_loss_of_two_processes_has_the_gradient_of_one(start, tmp_path):
    """L_cst compares images of both: DistributedDataParallel's mean is what one process has."""
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=served.cst_gradient, args=(r, str(tmp_path))) for r in (0, 1)]
    for process in ranks:
        process.start()
    assert [finish(process, 60) for process in ranks] == [0, 0]
    net, x, y = served.cst_case()
    sst.cst_loss(net(x), y).backward()
    for rank in (0, 1):
        ours = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(ours["weight"], net.weight.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours["bias"], net.bias.grad, rtol=1e-5, atol=1e-5)
    assert net.weight.grad.abs().max() > 0.01
    net.zero_grad()  # what it would be without the other's images
    sum(sst.cst_loss(net(x[part]), y[part]) / 2 for part in (slice(4), slice(4, 8))).backward()
    assert (ours["weight"] - net.weight.grad).abs().max() > 0.01


def test_an_error_or_death_of_one_process_ends_the_run(tmp_path):
    failing = launch("sst", tmp_path / "error", 2, fails=1)  # both at once: they import long
    run, folder = launch("sst", tmp_path / "death", 2, "--epochs", "500"), tmp_path / "death"
    assert failing.wait(120) != 0
    assert "OutOfMemoryError" in (tmp_path / "error/stderr").read_text()
    while not (folder / "run/last.pt").exists():
        assert run.poll() is None, (folder / "stderr").read_text()
        time.sleep(0.1)
    children = f"/proc/{run.pid}/task/{run.pid}/children"
    os.kill(int(Path(children).read_text().split()[1]), signal.SIGKILL)
    assert run.wait(60) != 0
    assert "exitcode:-9" in (folder / "stderr").read_text().replace(" ", "")


def test_batches_that_processes_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr(common, "PROCESSES", 2)
    args = Namespace(batch_size=15, workers=0)
    with pytest.raises(common.InputError, match="2 processes cannot share 15 images"):
        common.make_loader(range(40), args, train=True)
