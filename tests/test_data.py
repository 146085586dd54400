# SPDX-License-Identifier: MIT
"""Lists of data sets as others wrote them, with their mistakes, and class names as CLIP reads."""

import copy
import json
import tracemalloc
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
from common import InputError
from tests import photos
from tests.conftest import small_clip


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), 128).save(path)


def refused(name, root, words):
    """The one line by which a data set is refused."""
    with pytest.raises(InputError, match=words) as error:
        common.load_data(name, str(root))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- coco


COCO = dict(
    images=[dict(id=5, file_name="a.jpg"), dict(id=3, file_name="in\\b.jpg")],
    annotations=[dict(id=1, image_id=3, category_id=8), dict(id=2, image_id=5, category_id=2)],
    categories=[dict(id=8, name="owl"), dict(id=2, name="cat")],
)


def write_coco(root, **changes):
    """Both parts; of the training part, what `changes` says."""
    for part in ("train2014", "val2014"):
        spec = COCO | (changes if part == "train2014" else {})
        path = root / "annotations" / f"instances_{part}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(spec))
        picture(root / part / "a.jpg")
        picture(root / part / "in" / "b.jpg")


def test_paths_of_coco_lists_may_be_those_of_windows(tmp_path, capsys):
    write_coco(tmp_path)
    classes, (paths, y), _ = common.load_data("coco", str(tmp_path))
    assert classes == ["cat", "owl"] and y.dtype == np.int8
    assert paths == [str(tmp_path / "train2014" / name) for name in ("a.jpg", "in/b.jpg")]
    assert y.tolist() == [[1, -1], [-1, 1]]
    assert not capsys.readouterr().err


IMAGES = COCO["images"]
ANNOTATIONS = COCO["annotations"]
CATEGORIES = COCO["categories"]
COCO_MISTAKES = {  # change, words of the message
    "image id twice": (
        dict(images=[*IMAGES, dict(id=5, file_name="c.jpg")]),
        r"image id 5 is twice there: a\.jpg, c\.jpg",
    ),
    "category name twice": (
        dict(categories=[*CATEGORIES, dict(id=9, name="cat")]),
        "category cat is twice there: 2, 9",
    ),
    "category id twice": (
        dict(categories=[*CATEGORIES, dict(id=8, name="dog")]),
        "category id 8 is twice there: owl, dog",
    ),
    "annotation of no image": (
        dict(annotations=[*ANNOTATIONS, dict(id=77, image_id=404, category_id=2)]),
        "annotation 77 is of image 404, not listed",
    ),
    "annotation of no category": (
        dict(annotations=[*ANNOTATIONS, dict(id=77, image_id=5, category_id=404)]),
        "KeyError: 404",
    ),
    "image without a name": (dict(images=[dict(id=5)]), "KeyError: 'file_name'"),
    "no image": (dict(images=[], annotations=[]), "list of train2014 names no image"),
}


@pytest.mark.parametrize("case", COCO_MISTAKES)
def test_coco_lists_with_mistakes_are_refused_by_what_is_wrong(case, tmp_path):
    change, words = COCO_MISTAKES[case]
    write_coco(tmp_path, **change)
    file = "" if case == "no image" else "instances_train2014.json cannot be used .*"
    refused("coco", tmp_path, file + words)


def test_a_coco_category_without_annotation_is_a_warning(tmp_path, capsys):
    write_coco(tmp_path, annotations=ANNOTATIONS[:1])
    common.load_data("coco", str(tmp_path))
    assert not capsys.readouterr().err  # a validation image shows the other
    path = tmp_path / "annotations" / "instances_val2014.json"
    path.write_text(json.dumps(COCO | dict(annotations=ANNOTATIONS[:1])))
    common.load_data("coco", str(tmp_path))
    assert capsys.readouterr().err == "warning: no image shows cat\n"


def test_a_long_coco_list_takes_little_memory(tmp_path):
    """4 MB above the text were measured, of which 1 is y; a dict an image would take 27."""
    images = [dict(id=i, file_name=f"{i:012}.jpg") for i in range(3000)]
    pairs = [(i, (7 * i + k) % 300) for i in range(3000) for k in range(3)]
    annotations = [dict(id=n, image_id=i, category_id=c) for n, (i, c) in enumerate(pairs)]
    categories = [dict(id=c, name=f"class {c}") for c in range(300)]
    spec = dict(images=images, annotations=annotations, categories=categories)
    path = tmp_path / "annotations" / "instances_train2014.json"
    path.parent.mkdir()
    path.write_text(json.dumps(spec))
    tracemalloc.start()
    try:
        _, paths, y = common.load_coco(tmp_path, "train2014")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(paths) == 3000 and (y == 1).sum() == 9000
    assert peak - path.stat().st_size < 8.4e6


# ------------------------------------------------------------------------------------------ vg200


@pytest.fixture
def vg200(tmp_path):
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        picture(tmp_path / "VG_100K" / name)
    (tmp_path / "train_list_500.txt").write_text("2.jpg\n1.jpg\n")
    (tmp_path / "test_list_500.txt").write_text("3.jpg\n")
    present = {"1.jpg": [0, 199], "2.jpg": [], "3.jpg": [5, 5]}
    (tmp_path / "vg_category_200_labels_index.json").write_text(json.dumps(present))
    return tmp_path


def test_vg200_replica(vg200, capsys):
    classes, (paths, y), (test_paths, test_y) = common.load_data("vg200", str(vg200))
    assert classes == [str(c) for c in range(200)]
    assert [Path(path).relative_to(vg200).as_posix() for path in paths + test_paths] == [
        "VG_100K/2.jpg", "VG_100K/1.jpg", "VG_100K/3.jpg",
    ]  # fmt: skip
    assert y.dtype == test_y.dtype == np.int8 and y.shape == (2, 200) and test_y.shape == (1, 200)
    assert not (y[0] == 1).any() and np.flatnonzero(y[1] == 1).tolist() == [0, 199]
    assert np.flatnonzero(test_y[0] == 1).tolist() == [5]
    assert (np.abs(y) == 1).all() and (np.abs(test_y) == 1).all()
    error = capsys.readouterr().err
    assert error.startswith("warning: no image shows 1, 2, 3, 4, 6, ") and error.count("\n") == 1


def test_vg200_takes_the_names_that_it_is_given(vg200):
    names = [f"thing {c}" for c in range(200)]
    (vg200 / "classes.txt").write_text("\n".join(names) + "\n")
    assert common.load_data("vg200", str(vg200))[0] == names


def test_vg200_lists_that_do_not_fit_are_refused_by_what_is_wrong(vg200):
    (vg200 / "classes.txt").write_text("cat\ndog\n")
    refused("vg200", vg200, "labels_index.json does not fit train_list_500.txt .*199")
    (vg200 / "classes.txt").unlink()
    (vg200 / "train_list_500.txt").write_text("1.jpg\n404.jpg\n")
    refused("vg200", vg200, r"labels_index.json does not fit train_list_500.txt .*404\.jpg")
    (vg200 / "train_list_500.txt").write_text("")
    refused("vg200", vg200, "list of train names no image")
    (vg200 / "vg_category_200_labels_index.json").write_text("{")
    refused("vg200", vg200, "vg_category_200_labels_index.json cannot be used")
    (vg200 / "vg_category_200_labels_index.json").unlink()
    refused("vg200", vg200, "vg200 needs .*vg_category_200_labels_index.json is not there")


# --------------------------------------------------------------------------------- nuswide and cub


FOLDERS = dict(nuswide="Flickr", cub="CUB_200_2011/images")
each = pytest.mark.parametrize("name", FOLDERS)


def write_arrays(root, folder, **changes):
    """Names and labels of both parts; `changes`: in the place of those of training."""
    picture(root / folder / "sky" / "1.jpg")
    picture(root / folder / "sky" / "2.jpg")
    (root / "classes.txt").write_text("sky\nsea\nsun\n")
    arrays = dict(images=np.array(["sky/2.jpg", "sky/1.jpg"]))
    arrays["labels"] = np.array([[1.0, 0, 1], [0, 1, 0]])
    for part in ("train", "val"):
        for kind, array in (arrays | (changes if part == "train" else {})).items():
            np.save(root / f"formatted_{part}_{kind}.npy", array)


@each
@pytest.mark.parametrize("kind", [float, np.int8, np.uint8, np.int64, bool])
def test_arrays_of_0_and_1_are_absent_and_present(name, kind, tmp_path, capsys):
    labels = np.array([[1, 0, 1], [0, 1, 0]], kind)
    write_arrays(tmp_path, FOLDERS[name], labels=labels)
    classes, (paths, y), (_, test_y) = common.load_data(name, str(tmp_path))
    assert classes == ["sky", "sea", "sun"] and y.dtype == test_y.dtype == np.int8
    assert y.tolist() == test_y.tolist() == [[1, -1, 1], [-1, 1, -1]]
    folder = tmp_path / FOLDERS[name] / "sky"
    assert paths == [str(folder / "2.jpg"), str(folder / "1.jpg")]
    assert capsys.readouterr().err.startswith("warning: 2 images are in both lists")


@each
def test_arrays_of_three_values_keep_what_is_unknown(name, tmp_path):
    labels = np.array([[1, 0, -1], [0, 0, 1]])
    write_arrays(tmp_path, FOLDERS[name], labels=labels)
    assert common.load_data(name, str(tmp_path))[1][1].tolist() == labels.tolist()


SHAPES = r"^--root .* needs .*\(train: {} names, {} labels"
VALUES = "^--root .* needs .*train: .* labels .*1, 0, -1"
ARRAY_MISTAKES = {  # change, words of the message
    "labels are objects": (
        dict(labels=np.array([[1, 0, 1], [0, 1, 0]], object)),
        "^--root .* needs .*not arrays of objects .*Object arrays",
    ),
    "names are objects": (
        dict(images=np.array(["sky/2.jpg", "sky/1.jpg"], object)),
        "^--root .* needs .*not arrays of objects .*Object arrays",
    ),
    "names are numbers": (dict(images=np.arange(2)), SHAPES.format(r"\(2,\)", r"\(2, 3\)")),
    "names are bytes": (
        dict(images=np.array([b"sky/2.jpg", b"sky/1.jpg"])),
        SHAPES.format(r"\(2,\)", r"\(2, 3\)"),
    ),
    "labels are a row": (dict(labels=np.ones(3)), SHAPES.format(r"\(2,\)", r"\(3,\)")),
    "labels are three-dimensional": (
        dict(labels=np.ones((2, 3, 1))),
        SHAPES.format(r"\(2,\)", r"\(2, 3, 1\)"),
    ),
    "another number of images": (
        dict(labels=np.ones((3, 3))),
        SHAPES.format(r"\(2,\)", r"\(3, 3\)"),
    ),
    "another number of classes": (
        dict(labels=np.ones((2, 4))),
        SHAPES.format(r"\(2,\)", r"\(2, 4\)") + ".* 3 classes",
    ),
    "a label of 2": (dict(labels=np.array([[1, 0, 2], [0, 1, 0]])), VALUES),
    "a label of a half": (dict(labels=np.full((2, 3), 0.5)), VALUES),
    "a label of NaN": (dict(labels=np.full((2, 3), np.nan)), VALUES),
    "labels are words": (dict(labels=np.array([["1", "0", "1"]] * 2)), VALUES),
    "one name, no list": (
        dict(images=np.array("sky/1.jpg")),
        r"^--root .* needs .*(unsized|train: \(\) names)",
    ),
    "a table of names": (
        dict(images=np.array([["sky/2.jpg"], ["sky/1.jpg"]])),
        SHAPES.format(r"\(2, 1\)", r"\(2, 3\)"),
    ),
    "a path that leaves": (
        dict(images=np.array(["sky/2.jpg", "../../../x.jpg"])),
        r"formatted_train_images.npy leaves --root: .*x\.jpg",
    ),
    "a path from the root": (
        dict(images=np.array(["/etc/x.jpg", "sky/1.jpg"])),
        r"formatted_train_images.npy leaves --root: .*x\.jpg",
    ),
    "an image that is not there": (
        dict(images=np.array(["sky/2.jpg", "sky/404.jpg"])),
        r"404\.jpg cannot be read",
    ),
}


@each
@pytest.mark.parametrize("case", ARRAY_MISTAKES)
def test_arrays_with_mistakes_are_refused_by_what_is_wrong(case, name, tmp_path):
    change, words = ARRAY_MISTAKES[case]
    write_arrays(tmp_path, FOLDERS[name], **change)
    refused(name, tmp_path, words)


@each
def test_arrays_that_are_broken_or_not_there_are_named(name, tmp_path):
    write_arrays(tmp_path, FOLDERS[name])
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    refused(name, tmp_path, SHAPES.format(r"\(2,\)", r"\(2, 3\)") + ".* 2 classes")
    (tmp_path / "classes.txt").unlink()
    refused(name, tmp_path, f"{name} needs .*classes.txt is not there")
    write_arrays(tmp_path, FOLDERS[name])
    path = tmp_path / "formatted_val_labels.npy"
    for content in (path.read_bytes()[:-9], b"", b"x"):
        path.write_bytes(content)
        refused(name, tmp_path, f"--root {tmp_path} needs formatted_.*npy .*{FOLDERS[name]}/")
    path.unlink()
    refused(name, tmp_path, "needs .*No such file .*formatted_val_labels.npy")


# ---------------------------------------------------------------------------------- class names


def test_class_names_that_clip_cannot_tell_apart_are_refused(capsys):
    tokenize = small_clip()[1]
    prompt = "a photo of a {}"
    for pair in (["cat", "Cat"], ["hot_dog", "hot dog"], ["a  b", "a b"]):
        with pytest.raises(InputError, match=f"twice there: {pair[0]}, {pair[1]}$") as error:
            common.prompt_tokens(tokenize, prompt, ["owl", *pair])
        assert "\n" not in str(error.value)
    assert len(common.prompt_tokens(tokenize, prompt, ["cat", "cats"])) == 2
    assert not capsys.readouterr().err


def test_class_names_that_differ_after_what_clip_reads_are_refused(capsys):
    tokenize = small_clip()[1]
    length = tokenize("cat").shape[1]
    fits = " ".join(["cat"] * (length - 6))  # beside a, photo, of, a, start and end
    tokens = common.prompt_tokens(tokenize, "a photo of a {}", ["owl", fits])
    assert tokens.shape == (2, length) and (tokens[1] != 0).all()
    assert torch.equal(tokens, tokenize(["a photo of a owl", f"a photo of a {fits}"]))
    assert not capsys.readouterr().err
    with pytest.raises(InputError, match="twice there"):  # what tells them apart is cut off
        common.prompt_tokens(tokenize, "a photo of a {}", [f"{fits} owl", f"{fits} dog"])


# ------------------------------------------------------------------------- views of photographs


def test_cached_views_of_a_photograph_are_random_ones(tmp_path):
    noise = np.random.RandomState(0).randint(0, 256, (3, 64, 64, 3), "uint8")
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, pixels in zip(paths, noise, strict=True):
        Image.fromarray(pixels).save(path)

    class Views(photos.Views):
        cache, number, trunk = tmp_path, 3, lambda images: images.float()
        frozen = nn.Linear(2, 2)

    random, plain = common.make_transform(32, (448,)), common.make_transform(32)
    views = Views.load(paths, random)
    assert views.shape == (3, 3, 3, 32, 32)
    for i in range(3):
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert (views[i, a] != views[i, b]).mean() > 0.5
    assert Views.load(paths, plain).shape == (3, 1, 3, 32, 32)
    make, Views.trunk = Views.trunk, None  # both are looked up now
    assert np.array_equal(views, Views.load(paths, random))
    Views.trunk = lambda images: 2 * make(images)
    Views.frozen.weight.data += 1  # another trunk
    assert np.array_equal(2 * views, Views.load(paths, random))


def test_last_stage_on_photographs_is_that_of_the_network_or_of_its_teacher():
    trunk = nn.Module()
    trunk.blocks = nn.ModuleList([nn.Identity(), nn.Conv2d(2, 3, 1)])
    trunk.conv_head, trunk.bn2 = nn.Conv2d(3, 4, 1), nn.Identity()
    trunk.forward_features = MethodType(photos.last_stage, trunk)
    teacher, x = copy.deepcopy(trunk), torch.rand(1, 2, 3, 3)
    assert torch.equal(teacher.forward_features(x), trunk.forward_features(x))
    teacher.blocks[-1].weight.data.zero_()
    assert not torch.equal(teacher.forward_features(x), trunk.forward_features(x))
    before = trunk.forward_features(x)
    teacher.conv_head.weight.data.zero_()
    assert torch.equal(trunk.forward_features(x), before)
