# SPDX-License-Identifier: MIT
"""What all three scripts promise on the command line."""

import json
import pickle
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cbsa
import scinet
import sst
from tests import served
from tests.conftest import processes, same
from tests.toy import world

SMALL = "--batch-size 16 --epochs 2 --known 0.3".split()
FLAGS = {  # what brings pseudo-labels into the second epoch
    "sst": (sst, []),
    "cbsa": (cbsa, "--size 64 --warm-up 1".split()),
    "scinet": (scinet, "--size 64".split()),
}
each = pytest.mark.parametrize("name", FLAGS)


def small(name):
    return [*SMALL, *FLAGS[name][1]]


def load(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def end(folder):
    """What a run ends with: the checkpoint, and the log without its first line and times."""
    saved = load(folder)
    kept = {k: v for k, v in saved.items() if k not in ("args", "log")}
    times = ("seconds", "images_per_second")
    log = [{k: v for k, v in line.items() if k not in times} for line in lines(folder)[1:]]
    return kept | dict(log=log)


def refused(result, *words):
    """Whether a run ended with one line that says the words, a status of 1, and no traceback."""
    status, _, error = result
    last = error.splitlines()[-1]
    return status == 1 and "Traceback" not in error and all(word in last for word in words)


# ---------------------------------------------------------------------------- runs and resumed runs


@each
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(name, run, tmp_path):
    flags = small(name)
    status, out, error = run(name, *flags, "--out", "whole")
    assert status == 0 and error.count("WARNING") == error.count("\n"), error
    assert out.startswith("device: cpu\n") and "| % | last epoch | best on test" in out
    assert (tmp_path / "whole/samples.png").stat().st_size > 1000
    whole = end(tmp_path / "whole")
    for number, epochs in ((1, []), (2, [1])):  # about to put the first or the second in place
        folder = f"killed-{number}"
        killed = run(name, *flags, "--out", folder, stop=(number, signal.SIGKILL))
        assert killed[0] == -signal.SIGKILL
        if epochs:
            assert [line["epoch"] for line in load(tmp_path / folder)["log"][1:]] == epochs
        status, _, error = run(name, *flags, "--out", folder, "--resume", "auto")
        assert status == 0, error
        assert same(end(tmp_path / folder), whole)


@each
def test_the_log_says_what_was_run_and_what_came_out(name, run, tmp_path):
    assert run(name, *small(name), "--out", "run")[0] == 0
    first, *epochs = lines(tmp_path / "run")
    assert first["run"]["args"]["known"] == 0.3
    assert {"command", "torch", "device", "hash", "classes"} <= first["run"].keys()
    for entry in epochs:
        wanted = "epoch lr loss mAP mAP_interp AP classes OF1 CF1 pseudo_per_image seconds"
        assert {*wanted.split(), "images_per_second", "peak_memory_gb"} <= entry.keys()
        assert np.mean([*entry["AP"].values()]) == pytest.approx(entry["mAP"])
    assert epochs[-1]["pseudo_per_image"] > 0 or name == "sst"  # it guesses from epoch 6 on


@each
def test_a_checkpoint_is_evaluated_and_predicts(name, run, tmp_path):
    assert run(name, *small(name), "--out", "run")[0] == 0
    shown = f"| mAP | {lines(tmp_path / 'run')[-1]['mAP']:.2f} |"
    status, out, error = run(name, "--eval", "--resume", "run/last.pt")
    assert status == 0 and shown in out, error
    Image.fromarray(world.scenes(1, 5)[0][0]).save(tmp_path / "scene.png")
    for number in (1, 2):  # none is overwritten
        status, out, error = run(name, "--predict", "scene.png", "--resume", "run/last.pt")
        assert status == 0 and out.count("scene.png: ") == 1, error
        rows = (tmp_path / f"run/predictions-{number}.csv").read_text("utf-8-sig").splitlines()
        assert rows[0].split(",") == ["path", *world.CLASSES] and len(rows) == 2


@each
def test_no_leak_of_hidden_labels(name, run, tmp_path):
    """Every hidden label flipped: log, pseudo-labels and weights stay bit-identical."""
    assert run(name, *small(name), "--out", "as-it-is")[0] == 0
    assert run(name, *small(name), "--out", "flipped", change=served.flip_hidden_labels)[0] == 0
    assert (tmp_path / "flipped labels").exists()
    ends = [end(tmp_path / folder) for folder in ("as-it-is", "flipped")]
    for key in ("pseudo_precision", "pseudo_recall"):  # diagnostics, which see the truth
        found = [[entry.pop(key) for entry in end["log"]] for end in ends]
        assert found[0] != found[1] or name == "sst"  # it guesses nothing so early
    assert same(*ends)


@each
def test_a_resumed_run_may_change_where_it_runs_and_not_what_it_computes(name, run, tmp_path):
    assert run(name, *small(name), "--out", "run")[0] == 0
    again = ("--out", "run", "--resume", "auto")
    assert run(name, *again, "--workers", 1)[0] == 0
    for flag, value in (("epochs", 3), ("lr", 0.5), ("mask-seed", 5)):
        result = run(name, *again, f"--{flag}", value)
        assert refused(result, f"{flag.replace('-', '_')} was", "leave it so")
    assert lines(tmp_path / "run")[0]["run"]["args"]["workers"] == 0


@each
def test_an_interrupted_run_says_how_to_go_on(name, run, tmp_path):
    result = run(name, *small(name), "--out", "run", stop=(2, signal.SIGINT))
    assert refused(result, "stopped; to go on with training: --out run --resume auto")
    assert run(name, "--out", "run", "--resume", "auto")[0] == 0


def test_a_folder_that_is_there_is_not_written_to(run, tmp_path):
    (tmp_path / "run").mkdir()
    result = run("sst", *SMALL, "--out", "run")
    assert refused(result, "run")
    assert not any((tmp_path / "run").iterdir())
    assert run("sst", *SMALL, "--out", "other")[0] == 0
    assert refused(run("sst", "--resume", "other/last.pt", "--out", "run"), "run")
    assert not any((tmp_path / "run").iterdir())


@each
def test_a_loss_that_diverges_is_one_line_and_leaves_the_checkpoint(name, run, tmp_path):
    change = served.diverge_in_the_second_epoch
    result = run(name, *small(name), "--out", "run", change=change)
    assert refused(result, "training diverged; lower --lr")
    assert len(load(tmp_path / "run")["log"]) == 2


@each
def test_a_mistake_in_the_code_keeps_its_traceback(name, run):
    status, _, error = run(name, *small(name), change=served.fail_at_the_first_metrics)
    assert status == 2
    assert "Traceback" in error and "RuntimeError: out of shared memory" in error


@each
def test_low_precision_and_dynamo(name, run, tmp_path):
    """compile by Dynamo alone: its backends need a compiler."""
    for out, flags in dict(low="--precision bf16", dynamo="--compile").items():
        given = [*small(name), *flags.split(), "--epochs", 1, "--out", out]
        status, _, error = run(name, *given, change=served.compile_eagerly)
        assert status == 0, error
        assert lines(tmp_path / out)[1]["mAP"] > 0


# -------------------------------------------------------------------------------------- what is bad

BAD = [
    ("--known 0", "--known is a proportion"),
    ("--known 1.5", "--known is a proportion"),
    ("--epochs 0", "--epochs"),
    ("--lr -1", "negative"),
    ("--workers -1", "negative"),
    ("--precision fp8", "fp32 or bf16"),
    ("--eval", "--resume PATH"),
    ("--predict x.png", "--resume PATH"),
    ("--resume nowhere.pt", "nowhere.pt"),
    ("--root mine", "add --data"),
]


@pytest.mark.parametrize(("flags", "words"), BAD)
@each
def test_a_wrong_setting_is_one_line(name, flags, words):
    with pytest.raises(SystemExit) as error:
        FLAGS[name][0].parse_args(flags.split())
    assert str(error.value).startswith("error: ") and words in str(error.value)


def test_compile_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="needs the compiler"):
        sst.parse_args(["--compile"])


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@each
def test_a_file_that_is_no_checkpoint_of_the_script_is_refused_and_not_run(name, run, tmp_path):
    other = "sst" if name != "sst" else "cbsa"
    assert run(other, *small(other), "--epochs", 1, "--out", "other")[0] == 0
    (tmp_path / "junk.pt").write_bytes(b"x" * 100)
    (tmp_path / "code.pt").write_bytes(pickle.dumps(dict(args={}, model=Malice())))
    torch.save([1, 2], tmp_path / "list.pt")
    for path in ("other/last.pt", "junk.pt", "code.pt", "list.pt"):
        assert refused(run(name, "--resume", path, "--eval"), path, "no last.pt of a run of this")
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------- photographs, COCO


@pytest.fixture
def photos(tmp_path):
    """Own photographs with lists; what is unusual about some of them is no mistake."""
    folder = tmp_path / "mine"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(256, size=(12, 40, 30, 3), dtype=np.uint8)
    images = [Image.fromarray(x) for x in noise]
    for k, mode in enumerate("CMYK L P 1 LA RGBA".split()):
        images[k] = images[k].convert(mode)
    for k, image in enumerate(images):
        image.save(folder / f"{k}.{'png' if image.mode in ('P', '1', 'LA', 'RGBA') else 'jpg'}")
    names = sorted(path.name for path in folder.iterdir())
    (folder / "classes.txt").write_text("hot dog\nDürer's {hare}\n100%_wool\n", "utf-8")
    labels = "100%_wool;-hot dog", "hot dog;-Dürer's {hare}", "Dürer's {hare};-100%_wool"
    rows = [f"{name},{labels[k % 3]}" for k, name in enumerate(names)]
    (folder / "train.csv").write_text("\n".join(rows[:8]), "utf-8")
    (folder / "test.csv").write_text("\n".join(rows[8:]), "utf-8")
    return folder


def own(name):
    arch = "toy" if name == "sst" else "local-dir:tests/toy/clip"
    flags = f"--data folder --root mine --arch {arch} --size 64 --batch-size 4 --epochs 1"
    return f"{flags} --workers 0 {'--width 8' if name == 'sst' else ''}".split()


@each
def test_own_photographs_train_and_are_predicted(name, run, photos, tmp_path):
    status, out, error = run(name, *own(name), "--out", "run")
    assert status == 0 and "test.csv: what a line leaves out is unknown" in out, error
    (photos / "train.csv").unlink()  # evaluating needs the test part alone
    status, out, error = run(name, "--eval", "--resume", "run/last.pt")
    assert status == 0 and "classes" in out, error
    status, out, error = run(name, "--predict", "mine", "--resume", "run/last.pt")
    assert refused((status, out, error), "classes.txt"), error  # it is no image
    (photos / "classes.txt").unlink()
    (photos / "test.csv").unlink()
    status, out, error = run(name, "--predict", "mine", "--resume", "run/last.pt")
    assert status == 0 and out.count("mine/") == 12, error


@each
def test_a_broken_photograph_is_named_before_anything_is_written(name, run, photos, tmp_path):
    (photos / "10.jpg").write_bytes(b"<html>404</html>")
    assert refused(run(name, *own(name), "--out", "run"), "10.jpg")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_of_coco_that_is_broken_ends_the_run_with_its_name(workers, run, tmp_path):
    served.make_coco(tmp_path / "data")
    (tmp_path / "data/train2014/3.jpg").write_bytes(b"no image")
    result = run("sst", *COCO, "--workers", workers, "--out", "run")
    assert refused(result, "3.jpg", "to go on with training: --out run --resume auto")


COCO = "--data coco --known 0.5 --arch resnet18 --weights none --size 64 --width 8".split()
COCO += "--batch-size 4 --epochs 1 --glove none".split()


def test_coco_is_found_in_data_and_its_absence_explained(run, tmp_path):
    result = run("sst", "--data", "coco", "--known", 0.5)
    assert refused(result, "--root data", "--download", "instances_val2014.json")
    served.make_coco(tmp_path / "data")
    status, out, error = run("sst", *COCO, "--workers", 0)
    assert status == 0 and "mAP" in out, error
    assert len([*(tmp_path / "runs").glob("sst-*/last.pt")]) == 1


@each
def test_classes_of_a_checkpoint_must_be_those_of_the_data(name, run, photos):
    assert run(name, *own(name), "--out", "run")[0] == 0
    (photos / "classes.txt").write_text("hot dog\n100%_wool\nDürer's {hare}\n", "utf-8")
    assert refused(run(name, "--eval", "--resume", "run/last.pt"), "other classes")
    again = run(name, *own(name), "--out", "run", "--resume", "auto")
    assert refused(again, "other classes")


# --------------------------------------------------------------------------------- two processes


def run_two(start, name, *flags):
    """As torchrun does, but forked: an interpreter that imports everything takes long to start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = [shared | dict(RANK=str(r), LOCAL_RANK=str(r)) for r in (0, 1)]
    both = [start(name, *flags, env=env, change=served.note_seeds) for env in ranks]
    for process in both:
        process.join(200)
    return [process.exitcode for process in both]


@each
def test_two_processes_train_evaluate_each_image_once_and_one_writes(name, run, start, tmp_path):
    assert run_two(start, name, *small(name), "--out", "run") == [0, 0]
    text = (tmp_path / "stdout").read_text()
    assert text.count("device: cpu") == text.count("| last epoch |") == 1
    log = lines(tmp_path / "run")
    assert [line.get("epoch") for line in log] == [None, 1, 2]
    seeds = [{*(tmp_path / f"seeds {rank}").read_text().split()} - {"0"} for rank in (0, 1)]
    assert len(seeds[0]) == 2 and not seeds[0] & seeds[1]  # one an epoch; 0 is before the first
    status, out, _ = run(name, "--eval", "--resume", "run/last.pt")  # one process, same scores
    assert status == 0
    shown = next(line for line in out.splitlines() if line.startswith("| mAP |")).split()[3]
    assert float(shown) == pytest.approx(log[-1]["mAP"], abs=0.05)  # other batches, other bits


def test_cross_image_loss_of_two_processes_has_the_gradient_of_one(tmp_path):
    """L_cst compares images of both: DistributedDataParallel's mean is what one process has."""
    given = [(r, str(tmp_path)) for r in (0, 1)]
    ranks = [processes.Process(target=served.cst_gradient, args=both) for both in given]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    net, x, y = served.cst_case()
    sst.cst_loss(net(x), y).backward()
    assert net.weight.grad.abs().max() > 0.01
    for rank in (0, 1):
        ours = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(ours["weight"], net.weight.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours["bias"], net.bias.grad, rtol=1e-5, atol=1e-5)


def test_evaluating_in_two_processes_is_refused(monkeypatch, run):
    assert run("sst", *SMALL, "--epochs", 1, "--out", "run")[0] == 0
    env = dict(WORLD_SIZE="2", RANK="0")
    assert refused(run("sst", "--eval", "--resume", "run/last.pt", env=env), "one process")


