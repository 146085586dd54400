# SPDX-License-Identifier: MIT
"""Data sets as they lie on disk, lists of one's own, downloads, and what is refused."""

import hashlib
import http.server
import json
import shutil
import threading
import unicodedata
from functools import partial
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
from PIL import Image

import common

NFC = unicodedata.normalize("NFC", "Dürer")
NFD = unicodedata.normalize("NFD", "Dürer")


def write(path, content):
    """A text, or what json makes of something else, in a file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def load(name, root, part="train", **more):
    """Classes, paths below root, and y as lists."""
    classes, paths, y = common.load_data(name, str(root), part, **more)
    assert y.dtype == np.int8
    return classes, [path.removeprefix(f"{root}/") for path in paths], y.tolist()


def refused(name, root, words, **more):
    """Check that a data set is refused with one line that holds these words; the line."""
    with pytest.raises(SystemExit, match=words) as error:
        load(name, root, **more)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


COCO = dict(  # a crowd, an image without annotation, ids out of order
    images=[dict(id=n, file_name=name) for n, name in ((9, "b.jpg"), (8, "in\\c.jpg"), (7, "a"))],
    annotations=[dict(image_id=9, category_id=90, iscrowd=1)]
    + [dict(image_id=n, category_id=1, iscrowd=0) for n in (9, 7, 7)],
    categories=[dict(id=90, name="bear"), dict(id=1, name="person")],
)


def write_coco(root, **changes):
    write(root / "annotations/instances_train2014.json", COCO | changes)
    write(root / "annotations/instances_val2014.json", COCO | dict(annotations=[]))


def write_voc(root, year=2007, train="trainval", test="test"):
    """In training a chair that is also there as difficult, and a dog that is only difficult."""
    base = root / f"VOCdevkit/VOC{year}"
    write(base / f"ImageSets/Main/{train}.txt", "000005\n")
    write(base / f"ImageSets/Main/{test}.txt", "000001\n")
    shown = "<object><name>{}</name><difficult>{}</difficult></object>"
    text = shown.format("chair", 0) + shown.format("chair", 1) + shown.format("dog", 1)
    write(base / "Annotations/000005.xml", f"<annotation>{text}</annotation>")
    write(base / "Annotations/000001.xml", "<annotation></annotation>")


def write_vg200(root):
    write(root / "train_list_500.txt", "2.jpg\n1.jpg\n")
    write(root / "test_list_500.txt", "3.jpg\n")
    present = {"1.jpg": [0, 199], "2.jpg": [], "3.jpg": [5, 5]}
    write(root / "vg_category_200_labels_index.json", present)
    picture(root / "VG_100K_2/1.jpg")


def write_arrays(root, labels=((1, 0, 1), (0, 1, 0)), images=("sky/2.jpg", "sky/1.jpg")):
    write(root / "classes.txt", "sky\nsea\nsun\n")
    for part in ("train", "val"):
        np.save(root / f"formatted_{part}_images.npy", np.array(images))
        np.save(root / f"formatted_{part}_labels.npy", np.array(labels))


def write_folder(root, train="a.png,cat;-dog\n", test="b.png,cat\n", classes="cat\ndog\n\n owl\n"):
    picture(root / "a.png")
    picture(root / "b.png")
    write(root / "train.csv", train)
    write(root / "test.csv", test)
    write(root / "classes.txt", classes)


def test_coco_counts_crowds_and_keeps_images_without_annotation(tmp_path):
    write_coco(tmp_path)
    classes, paths, y = load("coco", tmp_path)
    assert classes == ["person", "bear"]  # by id
    assert paths == ["train2014/b.jpg", "train2014/in/c.jpg", "train2014/a"]
    assert y == [[1, 1], [-1, -1], [1, -1]]
    assert load("coco", tmp_path, "test")[1][0] == "val2014/b.jpg"


@pytest.mark.parametrize(
    ("key", "more", "words"),
    [
        ("images", dict(id=8, file_name="d.jpg"), "image id 8 is there twice"),
        ("images", dict(id=1, file_name="in/c.jpg"), "file in/c.jpg is there twice"),
        ("categories", dict(id=90, name="cat"), "category id 90 is there twice"),
        ("categories", dict(id=2, name="person"), "category person is there twice"),
        ("annotations", dict(image_id=404, category_id=1), "KeyError: 404"),
    ],
)
def test_a_coco_list_that_contradicts_itself_is_refused_by_name(key, more, words, tmp_path):
    write_coco(tmp_path, **{key: [*COCO[key], more]})
    refused("coco", tmp_path, words)


@pytest.mark.parametrize("lists", [(2007, "trainval", "test"), (2012, "train", "val")])
def test_difficult_objects_of_voc_do_not_count(lists, tmp_path):
    write_voc(tmp_path, *lists)
    year = lists[0]
    classes, paths, y = load(f"voc{year}", tmp_path)
    assert len(classes) == 20 and classes == sorted(classes)
    assert paths == [f"VOCdevkit/VOC{year}/JPEGImages/000005.jpg"]
    assert y == [[1 if name == "chair" else -1 for name in classes]]
    _, paths, y = load(f"voc{year}", tmp_path, "test")
    assert paths == [f"VOCdevkit/VOC{year}/JPEGImages/000001.jpg"]
    assert y == [[-1] * 20]


def test_an_object_of_voc_that_is_of_no_class_is_refused(tmp_path):
    write_voc(tmp_path)
    path = tmp_path / "VOCdevkit/VOC2007/Annotations/000005.xml"
    path.write_text(path.read_text().replace("chair", "unicorn"))
    refused("voc2007", tmp_path, "unicorn")


def test_images_of_vg200_lie_in_one_of_two_folders(tmp_path):
    write_vg200(tmp_path)
    classes, paths, y = load("vg200", tmp_path)
    assert classes == [str(c) for c in range(200)]
    assert paths == ["VG_100K/2.jpg", "VG_100K_2/1.jpg"]
    assert y == [[-1] * 200, [1] + [-1] * 198 + [1]]
    assert load("vg200", tmp_path, "test")[1] == ["VG_100K/3.jpg"]


def test_classes_of_vg200_have_the_names_that_they_are_given(tmp_path):
    write_vg200(tmp_path)
    names = [f"thing {c}" for c in range(200)]
    write(tmp_path / "classes.txt", "\n".join(names) + "\n")
    assert load("vg200", tmp_path)[0] == names


@pytest.mark.parametrize(("name", "kind"), [("nuswide", float), ("cub", np.uint8)])
def test_arrays_of_0_and_1_are_absent_and_present(name, kind, tmp_path):
    write_arrays(tmp_path, np.array([[1, 0, 1], [0, 1, 0]], kind))
    classes, paths, y = load(name, tmp_path)
    assert classes == ["sky", "sea", "sun"]
    folder = dict(nuswide="Flickr", cub="CUB_200_2011/images")[name]
    assert paths == [f"{folder}/sky/2.jpg", f"{folder}/sky/1.jpg"]
    assert y == [[1, -1, 1], [-1, 1, -1]]
    assert load(name, tmp_path, "test") == (classes, paths, y)


def test_arrays_with_a_minus_1_keep_what_is_unknown(tmp_path):
    write_arrays(tmp_path, [[1, 0, -1], [0, 0, 1]])
    assert load("nuswide", tmp_path)[2] == [[1, 0, -1], [0, 0, 1]]


@pytest.mark.parametrize(
    "change",
    [
        dict(labels=np.ones((3, 3))),
        dict(labels=np.full((2, 3), 0.5)),
        dict(labels=np.array([["1", "0", "1"]] * 2)),
        dict(labels=np.array([[1, 0, None]] * 2)),
        dict(images=np.arange(2)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, tmp_path):
    write_arrays(tmp_path, **change)
    refused("nuswide", tmp_path, "^error: --data nuswide --root .*; it needs ")


def test_what_a_train_line_leaves_out_is_unknown(tmp_path):
    write_folder(tmp_path, "a.png, owl ;-dog\nb.png,\n")
    y = [[0, -1, 1], [0, 0, 0]]
    assert load("folder", tmp_path) == (["cat", "dog", "owl"], ["a.png", "b.png"], y)


def test_a_single_minus_makes_the_rest_of_a_line_absent(tmp_path):
    write_folder(tmp_path, "a.png,-;cat\nb.png,-\n")
    assert load("folder", tmp_path)[2] == [[1, -1, -1], [-1, -1, -1]]


@pytest.mark.parametrize(
    ("test", "reading", "y"),
    [
        ("a.png,cat;owl\nb.png,\n", "absent", [[1, -1, 1], [-1, -1, -1]]),
        ("a.png,cat;owl\nb.png,-dog\n", "unknown", [[1, 0, 1], [0, -1, 0]]),
        ("a.png,cat;owl\nb.png,-\n", "unknown", [[1, 0, 1], [-1, -1, -1]]),
    ],
)
def test_what_a_test_line_leaves_out_is_read_and_said(test, reading, y, tmp_path, capsys):
    write_folder(tmp_path, test=test)
    assert load("folder", tmp_path, "test")[2] == y
    assert capsys.readouterr().out == f"test.csv: what a line leaves out is {reading}\n"


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("train.csv", "a.png,cat\nb.png,unicorn\n", "train.csv line 2: unicorn is not in"),
        ("train.csv", "a.png,cat;-cat\n", "train.csv line 1: cat .* both signs"),
        ("train.csv", "\n,\na.png,cat,dog\n", "train.csv line 3 is not path,label"),
        ("train.csv", "a.png,cat\n./x/../a.png,dog\n", "train.csv: image .*a.png is there twice"),
        ("train.csv", ",\n", "the list of train in .* names no image"),
        ("classes.txt", "cat\ndog\ncat\n", "classes.txt: class cat is there twice"),
    ],
)
def test_a_list_with_a_mistake_is_refused_with_its_place(file, text, words, tmp_path):
    write_folder(tmp_path)
    write(tmp_path / file, text)
    refused("folder", tmp_path, words)


@pytest.mark.parametrize(
    ("path", "listed"),
    [
        ("a.png", " a.png "),
        ("in/deeper/a.png", "in\\deeper\\a.png"),
        ("a, b.png", '"a, b.png"'),
        (f"{NFD}.png", f"{NFC}.png"),
        (f"{NFC}.png", f"{NFD}.png"),
    ],
)
def test_paths_in_lists_are_found_as_people_write_them(path, listed, tmp_path):
    write_folder(tmp_path, f"{listed},cat\n")
    picture(tmp_path / path)
    assert load("folder", tmp_path)[1] == [path]


def test_paths_in_lists_may_be_absolute(tmp_path):
    picture(tmp_path / "elsewhere/a.png")
    write_folder(tmp_path / "root", f"{tmp_path}/elsewhere/a.png,cat\n")
    assert load("folder", tmp_path / "root")[1] == [f"{tmp_path}/elsewhere/a.png"]


@pytest.mark.parametrize(("listed", "name"), [(NFC, NFD), (NFD, NFC)])
def test_classes_are_the_same_in_every_form_of_unicode(listed, name, tmp_path):
    write_folder(tmp_path, f"a.png,-{listed}\n", classes=f"cat\n{name}\n")
    assert load("folder", tmp_path)[2] == [[0, -1]]


def test_lists_may_come_from_excel(tmp_path):
    write_folder(tmp_path, "\ufeff,\na.png,cat\n , \n\nb.png,\n,\n", classes="\ufeffcat\n")
    assert load("folder", tmp_path) == (["cat"], ["a.png", "b.png"], [[1], [0]])


def test_an_image_of_ones_own_that_is_not_there_is_named_at_once(tmp_path):
    write_folder(tmp_path, "a.png,cat\naway.png,dog\n")
    with pytest.raises(OSError, match=r"^image .*away\.png: "):
        load("folder", tmp_path)


def test_a_limit_takes_the_first_images(tmp_path):
    write_folder(tmp_path, "a.png,cat\naway.png,dog\n")
    assert load("folder", tmp_path, limit=1)[1:] == (["a.png"], [[1, 0, 0]])


def test_the_toy_world_is_images_without_files():
    classes, images, y = common.load_data("toy", "nowhere", "test", limit=7)
    assert images.shape == (7, 64, 64, 3) and images.dtype == np.uint8
    assert y.shape == (7, len(classes)) and y.dtype == np.int8


def test_a_data_set_that_there_is_not_is_refused_with_those_that_there_are(tmp_path):
    refused("coc", tmp_path, "--data coc is unknown; choose from toy, coco, voc2007, ")


WRITERS = dict(coco=write_coco, voc2007=write_voc, vg200=write_vg200, folder=write_folder)
WRITERS |= dict(nuswide=write_arrays)
each_list = pytest.mark.parametrize(
    ("name", "file"),
    [
        ("coco", "annotations/instances_train2014.json"),
        ("voc2007", "VOCdevkit/VOC2007/Annotations/000005.xml"),
        ("voc2007", "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt"),
        ("vg200", "train_list_500.txt"),
        ("folder", "classes.txt"),
        ("folder", "train.csv"),
        ("nuswide", "classes.txt"),
        ("nuswide", "formatted_train_labels.npy"),
        ("vg200", "vg_category_200_labels_index.json"),
    ],
)


@each_list
def test_a_list_that_is_not_there_is_named_with_what_to_do(name, file, tmp_path):
    WRITERS[name](tmp_path)
    (tmp_path / file).unlink()
    message = refused(name, tmp_path, f"^error: --data {name} --root {tmp_path}: .*; it needs ")
    assert file in message
    assert ("--download" in message) == (name in ("coco", "voc2007"))


@each_list
@pytest.mark.parametrize("content", [b"{", bytes(range(256))])
def test_a_list_of_any_content_ends_in_one_line(name, file, content, tmp_path):
    WRITERS[name](tmp_path)
    (tmp_path / file).write_bytes(content)
    refused(name, tmp_path, f"^error: --data {name} .*; it needs ")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The folder that COCO's host serves, which is this machine."""
    write_coco(tmp_path / "coco")
    picture(tmp_path / "coco/train2014/b.jpg")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=host.serve_forever, args=[0.01], daemon=True).start()
    urls = []
    for part in ("train2014", "annotations"):
        path = shutil.make_archive(tmp_path / "served" / part, "zip", tmp_path / "coco", part)
        md5 = hashlib.md5(Path(path).read_bytes()).hexdigest()
        urls.append((f"http://127.0.0.1:{host.server_port}/{part}.zip", md5))
    monkeypatch.setitem(common.DOWNLOADS, "coco", urls)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield tmp_path / "served"
    host.shutdown()
    host.server_close()


def test_coco_is_downloaded_once(served, tmp_path):
    classes, paths, y = load("coco", tmp_path / "new", fetch=True)
    assert classes == ["person", "bear"]
    assert (tmp_path / "new" / paths[0]).exists()
    shutil.rmtree(served)
    assert load("coco", tmp_path / "new", fetch=True) == (classes, paths, y)


def test_a_download_that_is_wrong_is_refused_and_fetched_again(served, tmp_path):
    whole = (served / "annotations.zip").read_bytes()
    (served / "annotations.zip").write_bytes(whole[:-9])
    refused("coco", tmp_path / "new", "--download coco failed, try again", fetch=True)
    (served / "annotations.zip").write_bytes(whole)
    (served / "train2014.zip").unlink()  # which was whole
    assert len(load("coco", tmp_path / "new", fetch=True)[1]) == 3


def test_a_host_that_has_nothing_is_one_line(served, tmp_path):
    (served / "train2014.zip").unlink()
    refused("coco", tmp_path / "new", "--download coco failed, try again .*404", fetch=True)


def test_voc_comes_through_torchvision(tmp_path, monkeypatch):
    write_voc(tmp_path)
    monkeypatch.setattr(common, "VOCDetection", Mock())
    load("voc2007", tmp_path, fetch=True)
    parts = [call(str(tmp_path), "2007", part, download=True) for part in ("trainval", "test")]
    assert common.VOCDetection.call_args_list == parts


def test_what_has_no_address_cannot_be_downloaded(tmp_path):
    refused("vg200", tmp_path, "--download cannot fetch vg200, only coco, voc2007", fetch=True)
