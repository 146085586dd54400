# SPDX-License-Identifier: MIT
"""Photographs and label lists as people have them, and predictions that they can use."""

import csv
import gc
import io
import os
import shutil
import struct
import sys
import unicodedata
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import get_model

import common
import sst
from common import InputError
from tests.test_scripts import call  # noqa: F401

# ----------------------------------------------------------------------------------------- lists


def write(root, train, test="t.png,cat\n", classes="cat\ndog\nowl\n"):
    """A folder data set; every image that a list names is there."""
    for name in "abct":
        Image.new("RGB", (8, 8), 128).save(root / f"{name}.png")
    for name, text in dict(train=train, test=test).items():
        (root / f"{name}.csv").write_text(text, encoding="utf-8")
    (root / "classes.txt").write_text(classes, encoding="utf-8")


def task(root, **more):
    """load_task's training labels, test labels, and what hiding left of the former."""
    args = dict(data="folder", root=str(root), limit=None, download=False, complete=False)
    args |= dict(known=1.0, mask_seed=0, eval=False, epochs=1, lr=0.1, batch_size=2)
    args |= dict(size=32, workers=0) | more
    found = common.load_task(Namespace(**args), None, "sst", common.hide_entries)
    return found.truth.tolist(), found.test_y.tolist(), found.y.tolist()


def test_lists_of_positives_only_are_refused_with_both_ways_out(tmp_path, capsys):
    write(tmp_path, "a.png,cat;dog\nb.png,owl\nc.png,\n")
    with pytest.raises(InputError, match="add -label .* or --complete") as error:
        task(tmp_path)
    assert "\n" not in str(error.value)
    train, _, y = task(tmp_path, complete=True)
    assert train == y == [[1, 1, -1], [-1, -1, 1], [0, 0, 0]]  # without any label: unlabelled
    assert not capsys.readouterr().err


def test_test_lists_leave_out_what_is_unknown_if_they_say_what_is_absent(tmp_path):
    train = "a.png,cat;-dog;-owl\nb.png,-cat;dog;owl\n"
    write(tmp_path, train, "c.png,cat\nt.png,\n")
    assert task(tmp_path)[1] == [[1, -1, -1], [-1, -1, -1]]
    write(tmp_path, train, "c.png,cat\nt.png,-owl\n")
    assert task(tmp_path)[1] == task(tmp_path, complete=True)[1] == [[1, 0, 0], [0, 0, -1]]


@pytest.mark.parametrize("again", ["./a.png,dog", "x/../a.png,cat", ".\\a.png,-cat"])
def test_an_image_in_two_lines_is_named_with_both(again, tmp_path):
    write(tmp_path, f"a.png,cat;-dog\n\nb.png,dog\n{again}\n")
    words = r"image .*a\.png is twice there: train.csv line 1, train.csv line 4$"
    with pytest.raises(InputError, match=words):
        task(tmp_path)


def test_an_image_in_both_lists_is_a_warning_that_names_it(tmp_path, capsys):
    write(tmp_path, "a.png,cat;-dog;-owl\nb.png,dog;-cat;owl\n", "t.png,cat\n./b.png,dog\n")
    task(tmp_path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "1 images are in both lists" in error and "b.png" in error


def test_blank_rows_of_a_spreadsheet_are_skipped(tmp_path):
    write(tmp_path, ",\na.png,cat;-dog;-owl\n , \n\nb.png,\n,\n", ",\nt.png,owl;dog\n,\n")
    train, test, _ = task(tmp_path)
    assert train == [[1, -1, -1], [0, 0, 0]] and test == [[-1, 1, 1]]


def test_a_class_that_no_image_shows_is_a_warning_that_names_it(tmp_path, capsys):
    write(tmp_path, "a.png,cat;-dog\nb.png,-owl\n")
    task(tmp_path)
    assert capsys.readouterr().err == "warning: no image shows dog, owl\n"
    write(tmp_path, "a.png,cat;-dog\nb.png,-owl\n", "t.png,dog;owl\n")
    task(tmp_path, limit=1)  # a limit hides no class
    assert not capsys.readouterr().err


def test_a_resumed_run_has_the_task_of_its_checkpoint(tmp_path):
    write(tmp_path, "a.png,cat;-dog;-owl\nb.png,dog;-cat;owl\n")
    args = dict(data="folder", root=str(tmp_path), limit=None, download=False, complete=False)
    args |= dict(known=1.0, mask_seed=0, eval=False, epochs=1, lr=0.1, batch_size=2)
    args = Namespace(**args, size=32, workers=0)
    found = common.load_task(args, None, "sst", common.hide_entries)
    assert found.classes == ["cat", "dog", "owl"] == found.about["classes"]
    assert found.images == [str(tmp_path / name) for name in ("a.png", "b.png")]
    assert found.test_images == [str(tmp_path / "t.png")]
    (view, y, index), = found.test_loader
    assert view.shape == (1, 3, 32, 32) and view.dtype == torch.uint8
    assert y.tolist() == found.test_y.tolist() and index.tolist() == [0]
    common.load_task(args, dict(found.about), "sst", common.hide_entries)
    others = dict(epochs=9, lr=0.2, batch_size=3, mask="x", data="voc2007", classes=["cat"])
    for name, value in others.items():
        state = found.about | {name: value}
        with pytest.raises(InputError, match=f"--resume: {name} was .* now; .*another --out"):
            common.load_task(args, state, "sst", common.hide_entries)
    args.eval = True  # for which only the classes count
    for name, value in others.items():
        if name != "classes":
            common.load_task(args, found.about | {name: value}, "sst", common.hide_entries)
    with pytest.raises(InputError, match="--resume: classes was"):
        state = found.about | dict(classes=["cat"])
        common.load_task(args, state, "sst", common.hide_entries)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_the_same_in_every_unicode_form(forms, tmp_path):
    name, other = (unicodedata.normalize(form, "Dürer") for form in forms)
    assert name != other
    write(tmp_path, f"a.png,{name};-cat\nb.png,-{name};cat\n", classes=f"{other}\ncat\n")
    assert task(tmp_path)[0] == [[1, -1], [-1, 1]]


def test_windows_paths_are_paths(tmp_path):
    write(tmp_path, "in\\a.png,cat;-dog;-owl\n")
    (tmp_path / "in").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "in" / "a.png")
    images = common.load_data("folder", str(tmp_path))[1][0]
    assert images == [str(tmp_path / "in" / "a.png")]


def test_the_three_highest_are_of_the_labels_that_are_known():
    logits = np.array([[9.0, 8, 7, 2, 1, -1], [1, 2, 3, 4, 5, 6]], np.float32)
    y = np.array([[0, 0, 0, 1, -1, 1], [-1, 1, 1, 0, 0, 0]])
    result = common.multilabel_metrics(logits, y)
    # image 0: of columns 3, 4, 5 two are said, one rightly; image 1: of 0, 1, 2 all, two rightly
    assert result["OP_top3"] == pytest.approx(100 * 3 / 5)
    assert result["OR_top3"] == pytest.approx(100 * 3 / 4)
    others = common.multilabel_metrics(np.where(y == 0, -logits, logits), y)
    assert others == result


# ---------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_files_are_scaled_by_the_bits_that_they_hold(bits, tmp_path):
    values = np.linspace(0, 2**bits - 1, 256).astype(np.uint16)
    Image.fromarray(values.reshape(16, 16)).save(tmp_path / "x.png")
    read = np.asarray(common.open_image(tmp_path / "x.png"))[..., 0].ravel()
    assert (read == values >> (bits - 8)).all() and read[-1] == 255 and read[128] in (127, 128)


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "webp", "tiff"])
def test_a_truncated_file_is_found_by_looking_and_a_whole_one_passes(kind, tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(60, 80, 3), dtype=np.uint8)
    path = tmp_path / f"x.{kind}"
    Image.fromarray(noise).save(path)
    common.open_image(path, decode=False)
    whole = path.read_bytes()
    for kept in (len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:kept])
        with pytest.raises(InputError, match=f"x.{kind} cannot be read"):
            common.open_image(path, decode=False)


def test_what_follows_a_whole_photograph_does_no_harm(tmp_path):
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "x.jpg")
    with open(tmp_path / "x.jpg", "ab") as file:
        file.write(b"a film that the phone put here")
    common.open_image(tmp_path / "x.jpg", decode=False)
    assert np.asarray(common.open_image(tmp_path / "x.jpg"))[0, 0, 0] > 190


SHORT, RATIONAL, FLOAT = 3, 5, 11  # types of an entry


def exif(*entries, end=b"\0\0\0\0"):
    """An EXIF block of entries (tag, type, number, four bytes)."""
    head = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    return head + b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries) + end


TURNED = (0x112, SHORT, 1, b"\6\0\0\0")  # orientation 6
BLOCKS = {  # block, can the orientation be read?
    "whole": (exif(TURNED), True),
    "resolution is a text": (exif(TURNED, (0x11A, 2, 4, b"abc\0")), True),
    "no end": (exif(TURNED, (0x11A, 2, 4, b"abc\0"), end=b""), True),
    "cut": (exif(TURNED, (0x11A, 2, 4, b"abc\0"))[:36], True),
    "points outside": (exif(TURNED, (0x11A, RATIONAL, 1, b"\xff\xff\xff\x7f")), True),
    "no such type": (exif(TURNED, (0x11A, 99, 1, b"abcd")), True),
    "more entries than there": (exif(TURNED).replace(b"\x01\0\x12", b"\xff\0\x12"), True),
    "two orientations": (exif((0x112, SHORT, 2, b"\6\0\6\0")), True),
    "rational": (exif((0x112, RATIONAL, 1, b"\x1a\0\0\0"), end=struct.pack("<III", 0, 6, 1)), None),
    "float": (exif((0x112, FLOAT, 1, struct.pack("<f", 6))), None),
    "float, not whole": (exif((0x112, FLOAT, 1, struct.pack("<f", 6.5))), False),
    "no orientation": (exif((0x112, SHORT, 1, b"\x09\0\0\0")), False),
    "a text": (exif((0x112, 2, 4, b"six\0")), False),
    "noise": (b"Exif\0\0" + bytes(range(100, 140)), False),
    "nothing": (b"Exif\0\0", False),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what Pillow finds
@pytest.mark.parametrize("kind", ["jpg", "jpg, a film behind", "png", "webp"])
@pytest.mark.parametrize("case", BLOCKS)
def test_a_photograph_whose_exif_is_damaged_loads(case, kind, tmp_path):
    block, readable = BLOCKS[case]
    stored = Image.new("RGB", (6, 4), (200, 0, 0))
    stored.paste((0, 0, 200), (3, 0, 6, 4))  # blue at the right, below where the head is up
    path = tmp_path / f"x.{kind[:4].rstrip(',')}"
    stored.save(path, exif=block, quality=95)
    if "film" in kind:  # looking then decodes
        path.write_bytes(path.read_bytes() + b"a film that the phone put here")
    common.open_image(path, decode=False)
    image = common.open_image(path)
    assert image.mode == "RGB" and image.size in ((4, 6), (6, 4))
    if readable is not None:  # such an orientation is none, or 6
        assert image.size == ((4, 6) if readable else (6, 4))
    if image.size == (4, 6):
        assert image.getpixel((1, 5))[2] > 120 > image.getpixel((1, 5))[0]
        assert image.getpixel((1, 0))[0] > 120 > image.getpixel((1, 0))[2]


@pytest.mark.parametrize("name", ["x.heic", "x.HEIF", "x.jpg"])
def test_photographs_of_other_phones_are_refused_with_what_to_do(name, tmp_path):
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    hint = "replace or remove it" if name == "x.jpg" else "convert it to JPEG or PNG"
    for decode in (False, True):
        with pytest.raises(InputError, match=f"{name} cannot be read; {hint} "):
            common.open_image(tmp_path / name, decode=decode)


# -------------------------------------------------------------------------------- what comes out


FLAGS = "--data folder --root . --arch toy --width 8 --size 64 --weights none --workers 0".split()
FLAGS += "--batch-size 3 --epochs 1".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of sst.py on a few photographs of three classes."""
    root = tmp_path_factory.mktemp("world")
    noise = np.random.default_rng(0).integers(256, size=(8, 40, 30, 3), dtype=np.uint8)
    for k, x in enumerate(noise):
        Image.fromarray(x).save(root / f"{k}.png")
    (root / "classes.txt").write_text("hot dog\nкошка\n100%_wool\n", "utf-8")
    labels = "hot dog;-100%_wool;-кошка", "100%_wool;-hot dog;кошка"
    rows = [f"{k}.png,{labels[k % 2]}\n" for k in range(8)]
    (root / "train.csv").write_text("".join(rows[:6]), "utf-8")
    (root / "test.csv").write_text("".join(rows[6:]), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["sst.py", *FLAGS, "--out", "run"])
        common.run_script(sst.main)
    return root


@pytest.fixture
def trained(world, tmp_path, call):  # noqa: F811
    """`call` in a copy of that world."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    return lambda *arguments: call("sst", *arguments)


def test_a_test_image_that_breaks_inside_ends_the_run_before_it_trains(trained):
    content = bytearray(Path("7.png").read_bytes())
    content[-20] ^= 255  # a checksum is wrong, the end is right
    Path("7.png").write_bytes(content)
    common.open_image("7.png", decode=False)
    status, out, error = trained(*FLAGS, "--out", "new")
    assert status == 2 and "7.png cannot be read" in error.splitlines()[-1], error
    gc.collect()
    assert "epoch" not in out and not Path("new").exists()


def table(folder="run"):
    path = Path(folder, "predictions.csv")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")  # the BOM that Excel looks for
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


def test_predictions_of_files_and_folders_are_one_table(trained):
    mine = Path("mine/deeper")
    mine.mkdir(parents=True)
    Image.open("6.png").save(mine / "a, b é.png")
    Image.open("7.png").save("mine/c.png")
    (mine / ".hidden").write_text("x")
    Path("mine/.thumbnails").mkdir()
    shutil.copy("6.png", "mine/.thumbnails/t.png")
    (mine / "broken.jpg").write_text("x")
    asked = ["6.png", "nowhere.png", "mine"]
    status, out, error = trained("--predict", *asked, "--resume", "run/last.pt")
    assert status == 2 and error.count("\n") == 1, error
    assert "nowhere.png" in error and "broken.jpg" in error and ".hidden" not in error
    head, *rows = table()
    assert head == ["path", "hot dog", "кошка", "100%_wool"]
    assert [row[0] for row in rows] == ["6.png", "mine/c.png", "mine/deeper/a, b é.png"]
    assert out.count("кошка 0.") == 3 and "mine/c.png: " in out
    assert "a second time: .hidden in mine/deeper\n" in out
    assert "a second time: .thumbnails in mine\n" in out
    # the same numbers as --eval has for the same image
    Path("test.csv").write_text("6.png,hot dog\n")
    assert trained("--eval", "--resume", "run/last.pt")[0] == 0
    saved = np.load("run/predictions.npz")
    assert saved["classes"].tolist() == head[1:] and saved["labels"].tolist() == [[1, -1, -1]]
    expected = 1 / (1 + np.exp(-saved["logits"][0]))
    np.testing.assert_allclose([float(x) for x in rows[0][1:]], expected, atol=1e-5)
    status, out, error = trained("--predict", "mine/c.png", "--resume", "run/last.pt")
    assert status == 0 and not error and len(table()) == 2


def test_links_are_followed_and_no_folder_is_predicted_twice(trained):
    Path("mine/a").mkdir(parents=True)
    Path("far").mkdir()
    shutil.copy("6.png", "mine/a/x.png")
    shutil.copy("7.png", "far/y.png")
    Path("mine/b").symlink_to(Path("far").absolute())
    Path("mine/a/up").symlink_to(Path("mine").absolute())  # a circle
    Path("far/again").symlink_to(Path("mine/a").absolute())
    asked = ["mine", "far", "mine/a/x.png"]
    status, out, error = trained("--predict", *asked, "--resume", "run/last.pt")
    assert status == 0 and not error, error
    names = [row[0] for row in table()[1:]]
    assert names == ["mine/a/x.png", "mine/b/y.png", "mine/a/x.png"]  # asked for by itself: again
    said = [line for line in out.splitlines() if line.startswith("not predicted")]
    assert [line.split(" in ")[1] for line in said] == ["mine/a/up", "mine/b/again", "far"]
    assert "x.png" in said[1] and "y.png" in said[2]


def test_names_that_are_not_utf_8_keep_their_bytes(trained):
    name = os.fsdecode(b"D\xfcrer.png")
    try:
        shutil.copy("6.png", name)
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    status, _, error = trained("--predict", name, "--resume", "run/last.pt")
    assert status == 0 and not error, error
    assert os.fsencode(table()[1][0]) == b"D\xfcrer.png"


def test_a_new_folder_is_made_for_what_is_predicted_or_evaluated(trained):
    status, _, error = trained("--predict", "6.png", "--resume", "run/last.pt", "--out", "a/b")
    assert status == 0 and not error and len(table("a/b")) == 2
    assert not Path("run/predictions.csv").exists()
    status, _, error = trained("--eval", "--resume", "run/last.pt", "--out", "c/d")
    assert status == 0 and not error and Path("c/d/predictions.npz").exists()
    assert not Path("run/predictions.npz").exists()


def test_names_that_the_terminal_has_no_letters_for_do_not_end_the_program(trained, monkeypatch):
    shutil.copy("6.png", "猫.png")
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", "sst.py --predict 猫.png --resume run/last.pt".split())
    common.run_script(sst.main)
    terminal.flush()
    out = terminal.buffer.getvalue()
    assert rb"\u732b.png: " in out and rb"\u043a\u043e\u0448\u043a\u0430 0." in out
    assert table()[1][0] == "猫.png"


def test_pictures_number_the_classes_that_their_font_cannot_write(tmp_path, monkeypatch, capsys):
    drawn, draw = [], common.ImageDraw.ImageDraw.text

    def record(self, at, text, *more, **style):
        drawn.append((text, style["stroke_fill"]))
        return draw(self, at, text, *more, **style)

    monkeypatch.setattr(common.ImageDraw.ImageDraw, "text", record)
    args = Namespace(out=str(tmp_path / "run"), resume=None, dry_run=False)
    about = dict(method="sst", data="x", mask="", classes=["hot dog", "кошка", "Dürer"])
    run = common.Run(args, about, None, model=nn.Linear(1, 1))
    run.log.append(dict(epoch=1, mAP=1.0))
    found = SimpleNamespace(test_images=np.zeros((1, 9, 9, 3), np.uint8), classes=about["classes"])
    found.test_y = np.array([[0, 1, -1]])
    run.finish(found, torch.tensor([[0.1, 0.9, 0.5]]).logit())
    assert drawn == [("#2 0.90", "green"), ("#3 0.50", "red"), ("hot dog 0.10", "gray")]
    assert "by number if not ASCII" in capsys.readouterr().out


def test_unknown_test_labels_are_gray_and_unknown_wherever_they_come(trained):
    Path("test.csv").write_text("6.png,hot dog;-кошка\n7.png,-hot dog\n", "utf-8")
    status, out, error = trained("--eval", "--resume", "run/last.pt")
    assert status == 0, error
    saved = np.load("run/predictions.npz")
    assert saved["labels"].tolist() == [[1, -1, 0], [-1, 0, 0]]
    order = saved["logits"][:, 0]
    assert f"hot dog: {100 if order[0] > order[1] else 50:.2f}" in out
    assert "\nкошка: none\n100%_wool: none\n" in out


def test_an_evaluation_on_no_positive_is_none(trained):
    Path("test.csv").write_text("6.png,-hot dog;-кошка\n7.png,-hot dog\n", "utf-8")
    status, out, error = trained("--eval", "--resume", "run/last.pt")
    assert status == 0 and not error
    said = out.splitlines()
    assert {"mAP: none", "mAP_interp: none", "empty_classes: 3.00"} <= {*said}
    assert "nan" not in out


def test_more_epochs_of_a_run_say_what_to_do(trained):
    more = ["--out", "run", "--resume", "auto", "--epochs", 9]
    status, _, error = trained(*more)
    assert status == 2 and "epochs was 1 and is 9 now" in error and "another --out" in error


# --------------------------------------------------------------------------------------- weights


def backbone():
    return nn.Sequential(OrderedDict(body=nn.Conv2d(3, 4, 1), fc=nn.Linear(4, 10)))


@pytest.mark.parametrize("change", ["as it is", "parallel", "headless", "other head"])
def test_weights_of_a_backbone_load_whatever_its_head(change, tmp_path):
    state, net = backbone().state_dict(), backbone()
    body = state["body.weight"]
    if change == "parallel":
        state = {f"module.{name}": x for name, x in state.items()}
    if change == "headless":
        state = {name: x for name, x in state.items() if not name.startswith("fc.")}
    if change == "other head":
        state |= {"fc.weight": torch.zeros(20, 4), "fc.bias": torch.zeros(20)}
    torch.save(state, tmp_path / "x.pth")
    assert not torch.equal(net.body.weight, body)
    common.load_weights(net, str(tmp_path / "x.pth"))
    assert torch.equal(net.body.weight, body)


def test_a_headless_state_dict_of_a_resnet_is_one_of_sst(tmp_path):
    state = get_model("resnet18", weights=None).state_dict()
    state = {f"module.{name}": x for name, x in state.items() if not name.startswith("fc.")}
    torch.save(state, tmp_path / "x.pth")
    frozen, trained = sst.split_trunk(sst.load_trunk("resnet18", str(tmp_path / "x.pth")))
    assert trained.eval()(frozen.eval()(torch.zeros(1, 3, 64, 64))).shape == (1, 512, 2, 2)
    assert torch.equal(frozen[0].weight, state["module.conv1.weight"])
    assert torch.equal(trained[0][1].conv2.weight, state["module.layer4.1.conv2.weight"])


@pytest.mark.parametrize("name", ["body.bias", "body.more"])
def test_other_weights_that_are_not_there_or_too_many_are_named(name, tmp_path):
    state = backbone().state_dict()
    state.pop(name) if name in state else state.setdefault(name, torch.zeros(1))
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError, match=rf"x\.pth does not fit.*{name}"):
        common.load_weights(backbone(), str(tmp_path / "x.pth"))


def test_an_empty_folder_leaves_earlier_predictions_alone(trained):
    Path("nothing").mkdir()
    assert trained("--predict", "6.png", "--resume", "run/last.pt")[0] == 0
    before = Path("run/predictions.csv").read_bytes()
    status, _, error = trained("--predict", "nothing", "--resume", "run/last.pt")
    assert status == 2 and error.count("\n") == 1 and "nothing" in error, error
    assert Path("run/predictions.csv").read_bytes() == before
