# SPDX-License-Identifier: MIT
"""What all three scripts promise on the command line."""

import functools
import gc
import io
import json
import math
import os
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import sys
import zlib
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cbsa
import common
import scinet
import sst
from tests import toy
from tests.conftest import same, small_clip

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--weights none --limit 48 --known 0.3 --batch-size 16 --epochs 2".split()
SCRIPTS = {  # name: module, flags that bring its pseudo-labels into the first epochs
    "sst": (sst, []),
    "cbsa": (cbsa, "--warm-up 1 --size 64".split()),
    "scinet": (scinet, "--ramp 0 --size 64".split()),
}
each = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """call(name, *arguments) runs main() in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            common.run_script(SCRIPTS[name][0].main)
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def small(name):
    return [*SMALL, *SCRIPTS[name][1]]


def load(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def weights(state):
    return {k: v for k, v in state.items() if k not in ("args", "log")}


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


@each
def test_dry_runs_of_the_files_write_nothing(name, monkeypatch, tmp_path, capfd):
    """sst.py from the shell; the others here, since all that they import takes long."""
    monkeypatch.chdir(tmp_path)
    command = [str(ROOT / f"{name}.py"), *"--dry-run --weights none".split()]
    if name == "sst":
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], env=env, check=True, timeout=200)
    else:
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(command[0], run_name="__main__")
    out, error = capfd.readouterr()
    assert "mAP" in out and not error, error
    assert not list(tmp_path.iterdir())


TIMES = {"seconds", "images_per_second", "peak_memory_gb"}


def without_times(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(folder)[1:]]


@each
def test_same_command_same_bits_and_what_a_checkpoint_is_good_for(name, call, tmp_path):
    flags = small(name)
    assert call(name, *flags, "--out", "whole")[0] == 0
    common.EPOCH.fill_(7)  # where what ran before in this process, as in a notebook, left it
    assert call(name, *flags, "--out", "again")[0] == 0
    whole, again = load("whole"), load("again")
    assert same(weights(whole), weights(again))
    assert without_times("whole") == without_times("again")
    assert "run" in lines("whole")[0] and Path("whole/samples.png").stat().st_size > 1000
    mean = f"{lines('whole')[-1]['mAP']:.2f}"

    status, out, _ = call(name, *flags, "--out", "again", "--resume", "auto")  # nothing is left
    assert status == 0 and mean in out
    assert same(weights(load("again")), weights(whole))
    assert without_times("again") == without_times("whole")

    evaluated = call(name, "--eval", "--resume", "whole/last.pt")  # its arguments are there
    assert evaluated[0] == 0 and f"mAP: {mean}" in evaluated[1], evaluated
    assert np.load("whole/predictions.npz")["logits"].shape == (48, 16)
    Image.fromarray(toy.scenes(1, 5)[0][0]).save("scene.png")
    predicted = call(name, "--predict", "scene.png", "./scene.png", "--resume", "whole/last.pt")
    assert predicted[0] == 0 and predicted[1].count("scene.png: ") == 2, predicted

    Path("not-an-image").write_bytes(b"x" * 100)
    Path("junk.pt").write_bytes(b"x" * 100)
    other = next(n for n in SCRIPTS if n != name)
    for word, arguments in {
        "mask": [*flags, "--out", "again", "--resume", "auto", "--mask-seed", 3],
        "again is there; add --resume auto": [*flags, "--out", "again"],
        "classes": ["--data", "folder", "--root", ".", "--eval", "--resume", "whole/last.pt"],
        "/dev/null/x": [*flags, "--out", "/dev/null/x"],
        "not-an-image": ["--predict", "not-an-image", "--resume", "whole/last.pt"],
        "junk.pt": ["--eval", "--resume", "junk.pt"],
    }.items():
        if word == "classes":
            Path("classes.txt").write_text("cat\n")
            Path("train.csv").write_text("scene.png,cat\n")
            Path("test.csv").write_text("whole/samples.png,cat\n")
        status, _, error = call(name, *arguments)
        assert status == 2 and error.count("\n") == 1 and word in error, (word, error)
    status, _, error = call(other, *small(other), "--resume", "whole/last.pt")
    assert status == 2 and f"{name}.py" in error
    if name == "sst":
        status, _, error = call(name, *flags, "--out", "again", "--resume", "auto", "--width", 32)
        assert status == 2 and error.count("\n") == 1 and "does not fit" in error, error


@each
def test_a_schedule_is_not_changed_on_the_way(name, call):
    assert call(name, *small(name), "--out", "run")[0] == 0
    for flag, value in (("epochs", 3), ("lr", 0.5), ("batch-size", 8)):
        status, _, error = call(name, "--out", "run", "--resume", "auto", f"--{flag}", value)
        word = f"{flag.replace('-', '_')} was"
        assert status == 2 and error.count("\n") == 1 and word in error, error
    first = lines("run")[0]["run"]["args"]  # a resumed run keeps its first line
    assert first["weights"] == "none" and first["resume"] is None


@each
def test_no_leak_of_hidden_labels(name, call, monkeypatch, tmp_path):
    """Every hidden label flipped: log, losses, pseudo-labels and weights stay bit-identical."""
    module, hide = SCRIPTS[name][0], common.hide_images if name == "cbsa" else common.hide_entries
    loaded = common.load_data

    def flipped(*arguments):
        classes, (images, y), test = loaded(*arguments)
        hidden = hide(y, 0.3, 5) == 0
        assert hidden.any()
        return classes, (images, np.where(hidden, -y, y)), test

    flags = [*small(name), "--mask-seed", 5]
    # lower thresholds, so that there are pseudo-labels in two epochs of a random network
    if name == "sst":
        monkeypatch.setattr(module, "threshold", lambda epoch, lowest: 0.3)
    if name == "scinet":
        monkeypatch.setattr(module, "class_thresholds", lambda count, tau: 0.2 + 0.0 * count)
    assert call(name, *flags, "--out", "as-it-is")[0] == 0
    monkeypatch.setattr(common, "load_data", flipped)
    assert call(name, *flags, "--out", "flipped")[0] == 0
    a, b = load("as-it-is"), load("flipped")
    assert same(weights(a), weights(b))
    entry, other = lines("as-it-is")[-1], lines("flipped")[-1]
    diagnostic = ("precision", "recall", "seconds", "per_second", "memory_gb")
    kept = [k for k in entry if not any(word in k for word in diagnostic)]
    assert "loss" in kept and [entry[k] for k in kept] == [other[k] for k in kept]
    assert entry["pseudo_per_image"] > 0
    assert entry["pseudo_precision"] != other["pseudo_precision"]  # the flip was seen there


@each
def test_a_run_that_is_resumed_reads_its_own_towers(name, call, monkeypatch):
    """With weights of the recipe, which a resumed run does not load again, it ends with the same
    bits: what is made of the training images before the first epoch is made by the same network."""
    flags = [flag for flag in small(name) if flag not in ("--weights", "none")]
    assert call(name, *flags, "--out", "whole")[0] == 0

    def stop(run, epoch, *loaders, **more):
        if epoch == 2:
            raise KeyboardInterrupt
        begin(run, epoch, *loaders, **more)

    begin = common.Run.begin
    monkeypatch.setattr(common.Run, "begin", stop)
    assert call(name, *flags, "--out", "cut")[0] == 130
    monkeypatch.setattr(common.Run, "begin", begin)
    assert call(name, *flags, "--out", "cut", "--resume", "auto")[0] == 0
    assert same(weights(load("whole")), weights(load("cut")))
    assert without_times("whole") == without_times("cut")


@each
def test_compiled_runs(name, call, monkeypatch):
    """By Dynamo alone: its backends need a compiler."""
    eager = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    status, out, error = call(name, *small(name), "--epochs", 1, "--compile", "--out", "run")
    assert status == 0 and "last epoch" in out and not error, error


@each
def test_bf16_runs(name, call):
    status, out, error = call(name, *small(name), "--precision", "bf16", "--dry-run")
    assert status == 0 and "last epoch" in out, error


BAD = [
    ("--known 0", "--known"),
    ("--known 1.5", "--known"),
    ("--known nan", "--known"),
    ("--known half", "--known"),
    ("--nosuch", "nosuch"),
    ("--data nosuch", "nosuch"),
    ("--data coco", "--root"),
    ("--data coco --download", "--root"),
    ("--data coco --root nowhere", "nowhere"),
    ("--data voc2007 --root nowhere", "nowhere"),
    ("--arch nosuch", "nosuch"),
    ("--weights nowhere.pth", "nowhere.pth"),
    ("--epochs 0", "--epochs"),
    ("--batch-size -1", "--batch-size"),
    ("--lr 0", "--lr"),
    ("--size 0", "--size"),
    ("--workers -1", "--workers"),
    ("--seed -1", "--seed"),
    ("--mask-seed -1", "--mask-seed"),
    ("--limit 0", "--limit"),
    ("--device nosuch", "nosuch"),
    ("--precision fp8", "fp8"),
    ("--eval", "--resume"),
    ("--predict x.png", "--resume"),
    ("--resume nowhere.pt", "nowhere.pt"),
    ("--resume auto", "--out"),
]
OWN_BAD = {
    "sst": [
        ("--pairs nosuch", "nosuch"),
        ("--pool 0", "--pool"),
        ("--arch vit_b_16 --weights none", "spatial"),
        ("--glove nowhere.txt --weights none", "nowhere.txt"),
        ("--arch swin_t --weights none", "spatial"),
    ],
    "cbsa": [
        ("--arch ViT-B-16-SigLIP --weights none", "no prompts"),
        ("--arch local-dir:nowhere", "nowhere"),
        ("--arch RN50", "quickgelu"),
        ("--size 100 --weights none", "32"),
        ("--known 0.0001", "leaves none of"),
        ("--contexts 17 --weights none", "--contexts 17"),
        ("--contexts 1 --weights none", "--contexts 1"),
        ("--ema 1.5", "--ema"),
        ("--warm-up 0", "--warm-up"),
    ],
    "scinet": [
        ("--arch ViT-B-16-SigLIP --weights none", "no prompts"),
        ("--arch local-dir:nowhere", "nowhere"),
        ("--arch RN101", "quickgelu"),
        ("--size 100 --weights none", "32"),
        ("--lambda-n -1", "--lambda-n"),
        ("--lambda-q -0.1", "--lambda-q"),
        ("--neighbours 48 --limit 48 --weights none", "48 neighbours must be below 48"),
        ("--sigma 0", "--sigma"),
    ],
}


@pytest.mark.parametrize(
    ("name", "arguments", "word"),
    [(name, *case) for name in SCRIPTS for case in BAD + OWN_BAD[name]],
)
def test_bad_arguments_give_one_line(name, arguments, word, call, tmp_path):
    status, _, error = call(name, *arguments.split())
    assert status == 2 and error.count("\n") == 1 and word in error, error
    assert not list(tmp_path.iterdir())


@pytest.fixture
def photos(tmp_path):
    """A folder data set of 24 photographs; what is unusual about some is no mistake."""
    rng = np.random.default_rng(0)
    noise = rng.integers(256, size=(24, 40, 30, 3), dtype=np.uint8)
    images = [Image.fromarray(x) for x in noise]
    names = [f"{k}.jpg" for k in range(24)]
    changes = "CMYK L P 1 LA RGBA".split()
    images[:6] = [x.convert(mode) for x, mode in zip(images, changes, strict=False)]
    odd = "cmyk.jpg grey.png palette.png bits.png la.png rgba.webp sixteen.png one.png"
    names[:8] = odd.split()
    images[6] = Image.fromarray(rng.integers(2**16, size=(40, 30), dtype=np.uint16))
    images[7] = Image.new("RGB", (1, 1))
    for name, image in zip(names, images, strict=True):
        image.save(tmp_path / name)
    images[8].save(tmp_path / "moving.gif", save_all=True, append_images=images[9:12])
    images[8].save(tmp_path / "8.jpg", format="PNG")  # the wrong extension
    names[9] = "moving.gif"
    (tmp_path / "classes.txt").write_text("hot dog\nDürer's {hare}\n100%_wool\n", "utf-8")
    labels = "100%_wool;-hot dog", "hot dog;-100%_wool;-Dürer's {hare}", "Dürer's {hare}"
    rows = [f"{name},{labels[k % 3]}" for k, name in enumerate(names)]
    (tmp_path / "train.csv").write_text("\n".join(rows), "utf-8")
    for name in names[:9]:
        shutil.copy(tmp_path / name, tmp_path / f"test-{name}")
    (tmp_path / "test.csv").write_text("\n".join(f"test-{row}" for row in rows[:9]), "utf-8")
    return tmp_path


def png_header(side):
    size = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + size
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(size)) + chunk
    return head + struct.pack(">II", zlib.crc32(chunk), 9) + b"IDAT"


BAD_FILES = [  # file of the folder, what becomes of its bytes, word of the message
    ("20.jpg", lambda old: old[: len(old) // 2], "20.jpg"),
    ("20.jpg", lambda old: b"", "20.jpg"),
    ("20.jpg", lambda old: b"GIF89a", "20.jpg"),
    ("20.jpg", lambda old: b"<html>404</html>", "20.jpg"),
    ("20.jpg", lambda old: old[:100] + bytes(400), "20.jpg"),
    ("20.jpg", lambda old: png_header(60_000), "decompression bomb"),
    ("20.jpg", lambda old: png_header(40), "20.jpg"),
    ("20.jpg", None, "20.jpg"),
    ("20.jpg", lambda old: old[:300] + bytes(400) + old[-2:], "20.jpg"),  # seen when it is decoded
    ("test-8.jpg", lambda old: old[:300] + bytes(400) + old[-8:], "test-8.jpg"),
    ("train.csv", lambda old: old + b"\nnew.jpg,unicorn", "unicorn"),
    ("train.csv", lambda old: old + b"\nnew.jpg,hot dog;-hot dog", "hot dog"),
    ("train.csv", lambda old: old + b"\n21.jpg,hot dog", "line 25"),
    ("train.csv", lambda old: old + b"\nnew.jpg,hot dog,100%_wool", "label;label"),
    ("train.csv", lambda old: b"path,labels\n" + old, "line 1"),
    ("train.csv", lambda old: re.sub(b",.*", b",", old), "none"),
    ("train.csv", lambda old: old + b"\nnowhere.jpg,hot dog", "nowhere.jpg"),
    ("train.csv", lambda old: b"\xff\xfe\x00" + old, "train.csv"),
    ("train.csv", lambda old: b"", "names no image"),
    ("test.csv", None, "test.csv"),
    ("classes.txt", lambda old: b"", "100%_wool"),
    ("classes.txt", lambda old: old + b"hot dog\n", "twice"),
    ("classes.txt", lambda old: b"\xff\xfe\x00", "classes.txt"),
]


def folder_flags(name):
    own = {"sst": "--arch toy --width 8"}
    clip = "--arch local-dir:tests/toy_clip "
    clip += "--neighbours 3" if name == "scinet" else "--contexts 2"
    size = "--size 64 --weights none --known 1 --batch-size 4 --epochs 1 --workers 0"
    return f"--data folder --root . {own.get(name, clip)} {size}".split()


@each
def test_unusual_images_and_class_names_are_handled(name, call, photos):
    with open("classes.txt", "a", encoding="utf-8") as file:
        file.write("鷹\n")
    status, out, error = call(name, *folder_flags(name), "--out", "run")
    assert status == 0 and "last epoch" in out, error
    assert error == "warning: no image shows 鷹\n"


# all for one script; they share the loading, so some for the others
FILES = [("sst", case) for case in range(len(BAD_FILES))]
FILES += [(name, case) for name in ("cbsa", "scinet") for case in range(0, len(BAD_FILES), 5)]


@pytest.mark.parametrize(("name", "case"), FILES)
def test_bad_files_give_one_line(name, case, call, photos):
    file, change, word = BAD_FILES[case]
    path = photos / file
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    status, _, error = call(name, *folder_flags(name), "--out", "run")
    assert status == 2 and error.count("\n") == 1 and word in error, error
    assert not Path("run").exists()


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@each
@pytest.mark.parametrize("kind", ["empty", "junk", "truncated", "pickled code", "a list", "alien"])
def test_bad_checkpoints_give_one_line_and_run_nothing(name, kind, call, tmp_path):
    path, whole = Path("last.pt"), Path("whole.pt")
    if kind == "pickled code":
        path.write_bytes(pickle.dumps(dict(method=name, args={}, model=Malice())))
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "alien":
        torch.save(dict(method="other"), path)
    else:
        torch.save(dict(method=name, x=torch.zeros(999)), whole)
        cut = {"empty": b"", "junk": bytes(999), "truncated": whole.read_bytes()[:-999]}
        path.write_bytes(cut[kind])
    for use in (["--eval"], [], ["--predict", "x.png"]):
        status, _, error = call(name, *small(name), "--resume", "last.pt", *use)
        assert status == 2 and error.count("\n") == 1 and "last.pt" in error, error
    assert not Path("executed").exists()


@each
def test_a_loss_that_breaks_ends_the_run_and_leaves_the_checkpoint(name, call, monkeypatch):
    module, calls, kept = SCRIPTS[name][0], [], []
    loss = dict(sst="partial_bce", cbsa="asymmetric_loss", scinet="weighted_bce")[name]
    original, begin = getattr(module, loss), common.Run.begin

    def breaks(*values):
        return original(*values) * (math.nan if len(calls) > 1 else 1)

    def record(self, *more, **steps):
        calls.append(more)
        kept.append(Path("run/last.pt").read_bytes() if len(calls) > 1 else None)
        return begin(self, *more, **steps)

    monkeypatch.setattr(module, loss, breaks)
    monkeypatch.setattr(common.Run, "begin", record)
    status, _, error = call(name, *small(name), "--out", "run")
    assert status == 2 and error.count("\n") == 1 and "lower --lr" in error, error
    assert Path("run/last.pt").read_bytes() == kept[1]


def test_class_names_that_are_blank_are_refused_by_name():
    _, tokenize = small_clip()
    with pytest.raises(common.InputError, match="a class has no name"):
        common.prompt_tokens(tokenize, "a photo of a {}", ["cat", " ", "dog"])


WORDS = [  # --glove, a word of its error
    (lambda: np.save("words.npy", np.ones((3, 7))), "[3, 7], not (16, width)"),
    (lambda: np.save("words.npy", np.ones(16)), "[16], not (16, width)"),
    (lambda: Path("words.npy").write_bytes(b"junk"), "words.npy"),
    (lambda: Path("words.txt").write_text("person 1 2\ncar 3 4\n"), "no vector for: barn, boat"),
    (lambda: Path("words.txt").write_text("person is no number\n"), "words.txt"),
    (lambda: Path("words.txt").write_bytes(b"\xff\xfe\x00"), "words.txt"),
    (lambda: Path("words.txt").mkdir(), "words.txt"),
]


@pytest.mark.parametrize("case", range(len(WORDS)))
def test_bad_word_vectors_give_one_line(case, call):
    make, word = WORDS[case]
    make()
    (path,) = Path().iterdir()
    status, _, error = call("sst", *small("sst"), "--glove", path)
    assert status == 2 and error.count("\n") == 1 and word in error, error
    assert f"--glove {path} cannot be used" in error and [*Path().iterdir()] == [path]


@pytest.mark.parametrize("kind", ["npy", "50", "300"])
def test_word_vectors_of_any_width_are_taken(kind, call):
    width = 7 if kind == "npy" else int(kind)
    vectors = np.random.default_rng(0).normal(size=(16, width)).round(3).astype("f")
    words = dict(zip([name.split()[0] for name in toy.CLASSES], vectors, strict=True))
    words["light"] = words["traffic"]
    path = f"words.{'npy' if kind == 'npy' else 'txt'}"
    np.save("words.npy", vectors)
    rows = [f"{word} {' '.join(map(str, row))}\n" for word, row in words.items()]
    Path("words.txt").write_text("".join(rows))
    status, _, error = call("sst", *small("sst"), "--glove", path, "--out", "run")
    assert status == 0 and not error
    saved = load("run")["model"]["sarl.words"]
    np.testing.assert_allclose(saved.numpy(), vectors, rtol=1e-6)
    for file in ("words.npy", "words.txt"):  # a checkpoint has them
        Path(file).unlink()
    assert call("sst", "--resume", "run/last.pt", "--eval")[0] == 0


@each
def test_batches_of_one_image_are_a_run_too(name, call):
    flags = [*small(name), "--batch-size", 1, "--limit", 12, "--epochs", 1, "--known", 0.5]
    status, out, error = call(name, *flags, "--out", "run")
    assert status == 0 and "last epoch" in out, error


@pytest.mark.parametrize("out", [io.StringIO(), None])
def test_a_notebook_and_a_closed_output_are_no_obstacle(out, monkeypatch, tmp_path):
    assert not hasattr(out, "reconfigure")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sst.py", *small("sst"), "--dry-run"])
    monkeypatch.setattr(sys, "stdout", out)
    common.run_script(sst.main)
    assert out is None or "last epoch" in out.getvalue()


def begin(**given):
    args = Namespace(out=None, resume=None, dry_run=False)
    vars(args).update(given)
    about = dict(method="sst", data="toy", mask="0")
    return common.Run(args, about, None, model=torch.nn.Linear(1, 1))


def test_runs_that_begin_at_once_take_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        runs = [*pool.map(lambda _: begin(), range(8))]
    assert len({run.out for run in runs}) == 8 and all(run.out.is_dir() for run in runs)
    runs[0].add(dict(epoch=1))
    kept = [runs[0].out]
    runs.clear()  # what nothing was written to, goes
    gc.collect()
    assert [*Path("runs").iterdir()] == kept


def test_of_runs_with_one_folder_that_begin_at_once_one_gets_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def attempt(_):
        try:
            return begin(out="same")
        except common.InputError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        ends = [*pool.map(attempt, range(8))]
    refused = [end for end in ends if isinstance(end, str)]
    assert refused == ["--out same is there; add --resume auto, or choose another"] * 7


@each
@pytest.mark.parametrize("out", [[], ["--out", "run"]])
def test_a_run_that_fails_before_its_first_epoch_leaves_no_folder(name, out, call, monkeypatch):
    def breaks(*_, **more):
        raise common.InputError("a broken test image")

    monkeypatch.setattr(SCRIPTS[name][0], "evaluate", breaks)
    status, _, error = call(name, *small(name), *out)
    assert status == 2 and error == "error: a broken test image\n"
    assert [path for path in Path().iterdir() if path.name != "runs"] == []
    assert not any(Path("runs").glob("*"))


@each
def test_a_file_name_that_is_no_utf8_is_predicted_and_so_is_the_next(name, call):
    assert call(name, *small(name), "--out", "run")[0] == 0
    odd = os.fsdecode(b"\xff.png")
    for file, image in zip((odd, "next.png"), toy.scenes(2, 5)[0], strict=True):
        Image.fromarray(image).save(file)
    status, out, error = call(name, "--predict", odd, "next.png", "--resume", "run/last.pt")
    assert status == 0 and not error
    assert "\\udcff.png: " in out and "next.png: " in out
    rows = Path("run/predictions.csv").read_bytes().splitlines()
    assert [row.split(b",")[0] for row in rows[1:]] == [b"\xff.png", b"next.png"]
    assert all(len(row.split(b",")) == 17 for row in rows)


FULL = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
FULL += "dataloader's workers are out of shared memory. Please try to raise your limit."


def test_full_shared_memory_is_one_line_that_names_the_ways_out(call, monkeypatch):
    def breaks(*_):
        raise RuntimeError(FULL)

    monkeypatch.setattr(sst, "train_one_epoch", breaks)
    status, _, error = call("sst", *small("sst"))
    assert status == 2 and error.count("\n") == 1
    assert "--workers 0" in error and "--shm-size" in error
    monkeypatch.setattr(sst, "train_one_epoch", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):  # any other keeps its traceback
        call("sst", *small("sst"))


@each
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_training_on_cuda_in_bf16(name, call):
    flags = "--device cuda --precision bf16 --out run".split()
    status, _, error = call(name, *small(name), *flags)
    assert status == 0, error


def test_readme_names_functions_that_exist():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`(sst|cbsa|scinet|common)\.(\w+)`", text)
    named = [(module, name) for module, name in named if name != "py"]
    assert len(named) > 25
    for module, name in named:
        assert hasattr(sys.modules[module], name), f"{module}.{name}"


@each
def test_everything_known_is_a_run_too(name, call):
    status, out, error = call(name, *small(name), "--known", 1, "--out", "run")
    assert status == 0 and "last epoch" in out, error
    assert all(json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines())


@each
def test_a_run_killed_before_its_first_checkpoint_starts_its_log_anew(name, call):
    Path("run").mkdir()
    Path("run/log.jsonl").write_text('{"run": {}}\n{"epoch": 0, "mAP": 1}\n{"epoch": 1, "lo')
    status, _, error = call(name, *small(name), "--out", "run", "--resume", "auto")
    assert status == 0, error
    epochs = [entry["epoch"] for entry in lines("run")[1:]]
    assert epochs == sorted(set(epochs)) and epochs[-1] == 2 and lines("run")[0]["run"]["method"]


@each
def test_help_shows_the_defaults_of_the_data_set(name, call):
    status, out, _ = call(name, "--data", "coco", "--help")
    assert status == 0
    for flag in ("--epochs", "--batch-size", "--lr", "--arch", "--size"):
        shown = re.search(rf"\n  {flag} .*?\n  --", out, re.S).group()
        assert "default: " in shown and "default: None" not in shown, shown
