# SPDX-License-Identifier: MIT
"""What the three scripts share: hiding labels, data sets, images, metrics and their tables.
Labels are int8 arrays y (images, C): +1 known present, 0 unknown, -1 known absent; C classes."""

import csv
import hashlib
import json
import logging
import os
import unicodedata
from contextlib import suppress
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from sklearn.metrics import precision_recall_curve
from torch.utils.data import Dataset
from torchvision.datasets import VOCDetection
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm


def need(condition, message):
    """End the program with the message, one line that says what to do, unless condition holds."""
    if not condition:
        raise SystemExit(f"error: {' '.join(message.split())}")

# ----------------------------------------------------------------------------------------- labels
def hide_entries(y, known, seed):
    """Hide single labels: (i, c) stays iff RandomState(seed).random_sample(y.shape)[i, c] < known.
    y (images, C) in {1, 0, -1}, known in (0, 1] -> new int8 array, hidden entries 0. With seed 0
    and rows in the official order these are the masks of SST's authors."""
    keep = np.random.RandomState(seed).random_sample(y.shape) < known
    return np.where(keep, y, 0).astype(np.int8)

def hide_images(y, known, seed):
    """Hide all labels of an image or none: those of the first int(known * n) images of
    RandomState(seed).permutation(n) stay. Others use seed 1. y (n, C) -> new int8 array."""
    kept = np.random.RandomState(seed).permutation(len(y))[: int(known * len(y))]
    hidden = np.zeros_like(y, np.int8)
    hidden[kept] = y[kept]
    return hidden

def class_text(name):
    """A class name as words, for word vectors and for CLIP: "tvmonitor" -> "tv monitor"."""
    joined = dict(diningtable="dining table", pottedplant="potted plant", tvmonitor="tv monitor")
    return joined.get(name, name).replace("_", " ").strip().lower()

def check_labels(classes, y, test_y):
    """Warn of classes that cannot be learned from y or measured on test_y (images, C); end the
    program if y holds no label, or no absent one. Prints and returns a hash of all labels."""
    need(y.any(), f"none of {y.size} training labels is known; raise --known, or label some images")
    need(-1 in y, "no training label is known absent; add -labels, or end complete lines with ;-")
    for fine, what in (
        ((y == 1).any(0), "without a known positive in training, which cannot be learned"),
        ((y == -1).any(0), "never known absent in training, whose scores say little"),
        ((test_y == 1).any(0) & (test_y == -1).any(0), "whose test labels are all alike, so no AP"),
    ):
        names = [classes[c] for c in np.flatnonzero(~fine)]
        if names:
            logging.warning(f"classes {what}: {len(names)}, such as {', '.join(names[:5])}")
    digest = hashlib.sha256(np.concatenate((y, test_y)).astype("i1").tobytes()).hexdigest()[:8]
    print(f"labels: {(y != 0).mean():.1%} of {len(y)} x {len(classes)} are known, hash {digest}")
    return digest

# -------------------------------------------------------------------------------------- data sets
def load_data(name, root, part, limit=0, fetch=False):
    """Class names, images and y (images, C) of the "train" or the "test" part of a data set, or of
    its first `limit` images: paths, or uint8 (images, height, width, 3). fetch: download first."""
    if name == "toy":
        from tests.toy import world  # only here: the methods need nothing from it
        classes, images, y = world.load(part)
    else:
        need(name in DATASETS, f"--data {name} is unknown; choose from toy, {', '.join(DATASETS)}")
        load, tree = DATASETS[name]
        if fetch:
            download(name, root)
        try:
            classes, images, y = load(root, part)
            need(images, f"--data {name}: the list of {part} in {root} names no image")
        except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
            hint = ", which --download fetches" if name in DOWNLOADS else ""
            reason = f"{type(error).__name__}: {error}"[:300]
            need(False, f"--data {name} --root {root}: {reason}; it needs {tree}{hint}")
    images = images[: limit or None]
    if name == "folder":  # of the large data sets each image is opened when it is used
        check_images(images)
    return classes, images, y[: limit or None]
COCO = "http://images.cocodataset.org"
DOWNLOADS = {  # archives and their md5, or a year and parts for torchvision
    "coco": [
        (f"{COCO}/zips/train2014.zip", "0da8c0bd3d6becc4dcb32757491aca88"),
        (f"{COCO}/zips/val2014.zip", "a3d79f5ed8d289b7a7554ce06a5782b3"),
        (f"{COCO}/annotations/annotations_trainval2014.zip", "0a379cfc70b0e71301e0f377548639bd"),
    ],
    "voc2007": [("2007", "trainval"), ("2007", "test")],
    "voc2012": [("2012", "train"), ("2012", "val")],
}
def download(name, root):
    """Fetch COCO 2014 or VOC into root by torchvision; what is there already is not fetched."""
    need(name in DOWNLOADS, f"--download cannot fetch {name}, only {', '.join(DOWNLOADS)}")
    try:
        for what, which in DOWNLOADS[name]:
            if name == "coco":
                download_and_extract_archive(what, root, md5=which)
            else:
                VOCDetection(root, what, which, download=True)
    except (OSError, RuntimeError) as error:
        need(False, f"--download {name} failed, try again ({error})")

def read(path, parse=str):
    """What `parse` makes of the text of a file. ValueError names the file."""
    content = Path(path).read_bytes()
    try:
        return parse(content.decode("utf-8-sig"))  # Excel begins a csv with a byte order mark
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{path} must be UTF-8 and well-formed: {error}") from None

def unique(keys, what):
    """key -> its position. ValueError names a key that occurs twice."""
    positions = {key: position for position, key in enumerate(keys)}
    if len(positions) < len(keys):
        twice = next(key for position, key in enumerate(keys) if positions[key] != position)
        raise ValueError(f"{what} {twice} is there twice")
    return positions

def load_coco(root, part):
    """COCO 2014. Any annotation counts, also crowds; images without annotation stay."""
    part = dict(train="train2014", test="val2014")[part]
    spec = read(f"{root}/annotations/instances_{part}.json", json.loads)
    categories = sorted(spec["categories"], key=lambda category: category["id"])
    classes = [category["name"] for category in categories]
    ids = [category["id"] for category in categories]
    unique(classes, "category")
    column = unique(ids, "category id")
    names = [image["file_name"].replace("\\", "/") for image in spec["images"]]
    unique(names, "file")
    row = unique([image["id"] for image in spec["images"]], "image id")
    y = np.full((len(names), len(classes)), -1, np.int8)
    for annotation in spec["annotations"]:
        y[row[annotation["image_id"]], column[annotation["category_id"]]] = 1
    return classes, [f"{root}/{part}/{name}" for name in names], y
VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()
def load_voc(root, part, year, train, test):
    """Pascal VOC. Objects marked difficult do not make a class present."""
    base = f"{root}/VOCdevkit/VOC{year}"
    names = read(f"{base}/ImageSets/Main/{train if part == 'train' else test}.txt").split()
    y = np.full((len(names), len(VOC_CLASSES)), -1, np.int8)
    for row, name in enumerate(names):
        tree = read(f"{base}/Annotations/{name}.xml", ElementTree.fromstring)
        for item in tree.iter("object"):
            if item.findtext("difficult", "0").strip() != "1":
                y[row, VOC_CLASSES.index(item.findtext("name", "").strip())] = 1
    return VOC_CLASSES, [f"{base}/JPEGImages/{name}.jpg" for name in names], y

def load_folder(root, part):
    """The user's own lists: lines `path,label;label;-label`, where `-label` is known absent. What a
    line leaves out is unknown; in a test.csv without any `-label` it is absent."""
    text = unicodedata.normalize("NFC", read(f"{root}/classes.txt"))
    classes = [line.strip() for line in text.splitlines() if line.strip()]
    column = unique(classes, "classes.txt: class")
    reader = csv.reader(read(f"{root}/{part}.csv").splitlines())
    paths = []
    y = []
    for cells in reader:
        place = f"{part}.csv line {reader.line_num}"
        if any(map(str.strip, cells)):  # a spreadsheet may have blank rows
            if len(cells) != 2:
                raise ValueError(f"{place} is not path,label;label;-label: {cells}")
            paths.append(find_file(root, cells[0]))
            y.append(parse_labels(cells[1], column, place))
    unique(paths, f"{part}.csv: image")
    y = np.array(y, np.int8).reshape(len(paths), len(classes))
    if part == "test":
        print("test.csv: what a line leaves out is", "unknown" if -1 in y else "absent")
        if -1 not in y:
            y[y == 0] = -1
    return classes, paths, y

def find_file(root, name):
    """The path of a name in a list. A Mac may have written the name in another form of Unicode."""
    path = os.path.normpath(os.path.join(root, name.strip().replace("\\", "/")))
    forms = (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path))
    return next(filter(os.path.exists, forms), path)

def parse_labels(text, column, place):
    """`label;-label` -> y (C,) in {1, -1}; what is left out is 0, or -1 if there is a lone `-`."""
    labels = {label.strip() for label in unicodedata.normalize("NFC", text).split(";")}
    y = np.full(len(column), -1 if "-" in labels else 0, np.int8)
    for label in sorted(labels - {"", "-"}):
        name = label.removeprefix("-")
        if name not in column or f"-{label}" in labels:
            raise ValueError(f"{place}: {label} is not in classes.txt, or has both signs")
        y[column[name]] = 1 if name == label else -1
    return y

def load_vg200(root, part):
    """The lists of SST's authors. They publish no names of the classes: numbers, or classes.txt."""
    names = read(f"{root}/{part}_list_500.txt").split()
    present = read(f"{root}/vg_category_200_labels_index.json", json.loads)
    classes = [str(c) for c in range(200)]
    with suppress(FileNotFoundError):
        classes = read(f"{root}/classes.txt").splitlines()
    second = {path.name for path in Path(root, "VG_100K_2").glob("*")}
    paths = [f"{root}/{'VG_100K_2' if name in second else 'VG_100K'}/{name}" for name in names]
    y = np.full((len(names), len(classes)), -1, np.int8)
    for row, name in enumerate(names):
        y[row, present[name]] = 1
    return classes, paths, y

def load_arrays(root, part, folder):
    """Arrays as this field passes them on: names of images, and labels 0/1 or 1/0/-1."""
    part = dict(train="train", test="val")[part]
    classes = read(f"{root}/classes.txt").splitlines()
    names = np.load(f"{root}/formatted_{part}_images.npy")
    y = np.load(f"{root}/formatted_{part}_labels.npy")
    fits = (names.ndim, names.dtype.kind, *y.shape) == (1, "U", len(names), len(classes))
    if not fits or not {*np.unique(y)} <= {-1, 0, 1}:
        sizes = f"{names.shape}, {y.shape} and {len(classes)}"
        raise ValueError(f"names, labels, classes: {sizes}; or a label is not 1, 0 or -1")
    y = y if -1 in y else 2 * y.astype(np.int8) - 1
    return classes, [f"{root}/{folder}/{name}" for name in names], y.astype(np.int8)

ARRAYS = "classes.txt, formatted_{train,val}_{images,labels}.npy and"
CUB = "CUB_200_2011/images"
DATASETS = {  # name: function of root and part -> classes, images, y; what it reads
    "coco": (load_coco, "annotations/, train2014/ and val2014/"),
    "voc2007": (partial(load_voc, year=2007, train="trainval", test="test"), "VOCdevkit/VOC2007/"),
    "voc2012": (partial(load_voc, year=2012, train="train", test="val"), "VOCdevkit/VOC2012/"),
    "vg200": (load_vg200, "VG_100K/ and the lists of SST's authors"),
    "nuswide": (partial(load_arrays, folder="Flickr"), f"{ARRAYS} Flickr/"),
    "cub": (partial(load_arrays, folder=CUB), f"{ARRAYS} {CUB}/"),
    "folder": (load_folder, "train.csv, test.csv and classes.txt"),
}

# ----------------------------------------------------------------------------------------- images
def open_image(item, side):
    """An RGB image of a file or a uint8 array. A JPEG is decoded at a reduced scale, but not under
    `side` pixels a side. OSError names a file that is no image."""
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    try:
        with Image.open(item) as image:
            image.draft(None, (side, side))
            return as_seen(image)
    except Exception as error:  # Pillow raises many kinds
        raise OSError(f"image {item}: remove it or save it as JPEG or PNG ({error})") from None

def as_seen(image):
    """RGB, as a person would see it: upright, 16 bits scaled, transparency laid on white."""
    image.load()
    with suppress(Exception):  # in place: it turns the pixels before it meets a damaged tag
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # 16 bits, of which cameras and scanners may use 12; not floats
        x = np.asarray(image)
        image = Image.fromarray(np.uint8(x >> max(0, int(x.max()).bit_length() - 8)))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")

def check_images(paths):
    """Open every image, so that a broken one ends the program before it trains or predicts."""
    for path in tqdm(paths, "looking at images", leave=False, disable=None):
        open_image(path, side=64)

def find_images(paths):
    """The files of --predict: paths, and all files in and below folders, but for hidden files."""
    found = []
    for path in map(Path, paths):
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [str(file) for file in inside if not file.is_dir() and file.name[0] != "."]
    need(found, f"--predict: there is no file in {', '.join(paths)}")
    check_images(found)
    return found

def make_view(size, smallest_crop=0, operations=0, erase=0.0, part=0.1):
    """PIL image -> uint8 (3, size, size), bicubic, the aspect not kept. With smallest_crop, first a
    resize to 512, a random crop of 512, 448, ... or smallest_crop, and a flip (SST, "Implementation
    Details"; all times size / 448). At the end so many operations of RandAugment, and, with a
    chance of `erase`, a random part of the image up to `part` is erased."""
    fine = size > 0 and smallest_crop <= 512 and max(erase, part) <= 1
    need(fine, "--size must be above 0, --smallest-crop at most 512, --erase at most 1")
    bicubic = v2.InterpolationMode.BICUBIC
    steps = []
    if smallest_crop:
        sides = [round(side * size / 448) for side in range(512, smallest_crop - 1, -64)]
        crop = v2.RandomChoice([v2.RandomCrop(side) for side in sides])
        steps += [v2.Resize((sides[0], sides[0]), bicubic), crop, v2.RandomHorizontalFlip()]
    steps += [v2.Resize((size, size), bicubic), v2.RandAugment(operations)]
    steps += [v2.ToImage(), v2.RandomErasing(erase, (min(0.02, part), part))]
    return v2.Compose(steps)

class ImageDataset(Dataset):
    """Items (*views, i): i and views (3, size, size) of image i by `make_view`, one for each of
    `strengths`, its last three arguments."""

    def __init__(self, images, size, smallest_crop=0, strengths=((0, 0.0, 0.1),)):
        self.images = images
        self.side = round(512 * size / 448)  # what crops are taken from
        self.views = [make_view(size, smallest_crop, *strength) for strength in strengths]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = open_image(self.images[i], self.side)
        return *(view(image) for view in self.views), i

def normalise(images, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """uint8 (B, 3, H, W) -> float32. A tensor of means would be copied to the device each step."""
    return torch.stack([(images[:, k] / 255 - mean[k]) / std[k] for k in range(3)], dim=1)

# ---------------------------------------------------------------------- metrics, tables, pictures
def average_precision(logits, y, interpolated=False):
    """AP in percent of each class (C,); NaN where the known entries of y are all of one sign.
    Entries of y that are 0 do not count. interpolated: at all points, as VOC 2010; otherwise as
    sklearn's average_precision_score."""
    ap = np.full(y.shape[1], np.nan)
    for c in np.flatnonzero((y == 1).any(0) & (y == -1).any(0)):
        known = y[:, c] != 0
        precision, recall, _ = precision_recall_curve(y[known, c] == 1, logits[known, c])
        if interpolated:  # the best precision at this recall or a higher one
            precision[:-1] = np.maximum.accumulate(precision[:-1])
        ap[c] = -100 * np.sum(np.diff(recall) * precision[:-1])
    return ap

def multilabel_metrics(logits, y, classes):
    """Percentages from logits (images, C), float32, and y in {1, 0, -1}; 0 counts nowhere.
    mAP: the mean of AP {class: value}, non-interpolated, over the `classes` that have one, or None;
    mAP_interp: interpolated. OP OR OF1: over all entries, CP CR CF1: means over classes with a
    positive, at p >= 0.5; _top3: among the 3 highest of an image."""
    logits = np.asarray(logits)
    need(np.isfinite(logits).all(), "a score is not finite: training diverged; lower --lr")
    result = {}
    for name, interpolated in (("mAP_interp", True), ("mAP", False)):
        ap = average_precision(logits, y, interpolated)
        counted = {c: a for c, a in zip(classes, ap.tolist(), strict=True) if not np.isnan(a)}
        result[name] = float(np.mean([*counted.values()])) if counted else None
    result |= dict(AP=counted, classes=f"{len(counted)} of {len(classes)}")
    said = (logits >= 0) & (y != 0)
    rank = np.where(y, -logits, np.inf).argsort(axis=1, kind="stable").argsort(axis=1)
    for suffix, guess in (("", said), ("_top3", said & (rank < 3))):
        counts = np.stack((guess & (y == 1), guess, y == 1)).sum(1)  # (3, C)
        shown = max(1, (counts[2] > 0).sum())
        for letter, (right, guessed, there), n in (("O", counts.sum(1), 1), ("C", counts, shown)):
            p = (right / np.maximum(1, guessed)).sum() / n
            r = (right / np.maximum(1, there)).sum() / n
            for name, rate in dict(P=p, R=r, F1=2 * p * r / max(p + r, 1e-12)).items():
                result[letter + name + suffix] = 100 * float(rate)
    return result

def pseudo_metrics(pseudo, y, truth):
    """Log entries of arrays (images, C) in {1, 0, -1}: how many unknown labels of an image are
    guessed as present, their precision and recall or None. A diagnostic: it sees the truth."""
    guess = (pseudo == 1) & (y == 0)
    right = (guess & (truth == 1)).sum()
    judged = (guess & (truth != 0)).sum()
    hidden = ((truth == 1) & (y == 0)).sum()
    return dict(
        pseudo_per_image=float(guess.sum() / len(y)),
        pseudo_precision=float(right / judged) if judged else None,
        pseudo_recall=float(right / hidden) if hidden else None,
    )

SHOWN = "epoch loss mAP classes OF1 CF1 pseudo_per_image pseudo_precision seconds".split()
def describe(entry, names=SHOWN):
    """A line: those of the names that an entry of the log holds, with their values."""
    shown = [(name, entry[name]) for name in names if entry.get(name) is not None]
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown)

def metrics_table(entries):
    """Markdown of the metrics of the last and of the best of some entries, and what they mean."""
    last = entries[-1]
    best = max(entries, key=lambda entry: entry["mAP"] or 0)
    lines = ["| % | last epoch | best on test (what most papers report) |", "| --- | --- | --- |"]
    for name in last:
        if name[0] in "OCm" and last[name] is not None:
            lines.append(f"| {name} | {last[name]:.2f} | {best[name]:.2f} |")
    lines.append(f"mAP: the mean AP of {last['classes']} classes. P precision, R recall, F1 both,")
    return "\n".join([*lines, "at p >= 0.5; O: over all labels, C: the mean over the classes."])

def save_pictures(folder, images, y, logits, classes):
    """samples.png: the first images with their five likeliest classes by logits (images, C),
    coloured by y (images, C): green is present, red absent, gray unknown."""
    drawn = []
    p = torch.sigmoid(torch.as_tensor(logits))
    for image, labels, probabilities in zip(images[:18], y, p, strict=False):
        picture = open_image(image, side=176).resize((176, 176))
        for row, c in enumerate(probabilities.topk(min(5, len(classes))).indices):
            style = dict(stroke_width=2, stroke_fill=("gray", "green", "red")[labels[c]])
            text = f"{classes[c]} {probabilities[c]:.2f}"
            ImageDraw.Draw(picture).text((3, 13 * row), text, "white", **style)
        drawn.append(v2.functional.pil_to_tensor(picture) / 255)
    save_image(drawn, f"{folder}/samples.png", nrow=6)

def save_predictions(folder, images, logits, classes):
    """Print the labels of each image with p >= 0.5, and write all probabilities, of logits (images,
    C), to predictions-1.csv or the next free number in a folder, with Excel's byte order mark."""
    p = torch.sigmoid(torch.as_tensor(logits))
    number = 1
    while os.path.exists(path := f"{folder}/predictions-{number}.csv"):
        number += 1
    with open(path, "x", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", *classes])
        for image, row in zip(images, p.tolist(), strict=True):
            table.writerow([image, *(f"{value:.4f}" for value in row)])
            likely = [f"{classes[c]} {row[c]:.2f}" for c in np.argsort(row)[::-1] if row[c] >= 0.5]
            text = ", ".join(likely) or "nothing is likely"
            print(f"{image}: {text}".encode(errors="replace").decode())
    print(f"all probabilities are in {path}; a label is likely from 0.5 on")
