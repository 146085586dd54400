# SPDX-License-Identifier: MIT
"""What the three scripts share: labels and their hiding, data sets, loading, metrics, and reports.

Labels, everywhere: an int8 array y (images, C); +1 known present, 0 unknown, -1 known absent.
Letters, everywhere: B images of a batch, C classes, D feature width, N positions of the feature
map. Bad input raises `InputError`, whose text is one line that says what is wrong and what to do;
`run_script` prints it and exits with status 2.
"""

from __future__ import annotations

import csv
import hashlib
import http.client
import inspect
import json
import logging
import math
import os
import pickle
import platform
import resource
import shutil
import signal
import sys
import textwrap
import time
import traceback
import urllib.error
import urllib.request
import warnings
import xml.etree.ElementTree as ElementTree
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import precision_recall_curve
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import VOCDetection
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm


class InputError(ValueError):
    """Something the user gave is wrong; the text is one line that names it and says what to do."""


def refuse(message: str) -> None:
    """argparse's `error` method: one line, no usage."""
    raise InputError(f"{message}; --help lists the arguments")


class Interrupted(Exception):
    """SIGINT or SIGTERM came, and the step it came in is finished; the text says what was saved."""


signals: list[int] = []  # those that came


def ask_to_stop(number: int, frame) -> None:
    signals.append(number)
    signal.signal(number, signal.SIG_DFL)  # a second one ends the script at once


def run_script(main: Callable[[], None]) -> None:
    """Call `main`; what stops it becomes one line on stderr and an exit status.

    InputError 2, SIGINT 130, SIGTERM 143, a process of the run that died 1.
    """
    logging.disable(logging.ERROR)  # open_clip warns of each tower without weights
    warnings.filterwarnings("ignore", module=r"torch\.")  # of what it does inside
    warnings.filterwarnings("ignore", "Sparse CSR")  # beta since 2021
    if "LOCAL_RANK" not in os.environ:  # several processes would not all stop at the same step
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask_to_stop)
    try:
        main()
        status, message = 0, ""
    except InputError as error:
        # from a loader's worker the text comes wrapped in a traceback; its last line is the message
        message = str(error).strip().splitlines()[-1].split("InputError: ")[-1]
        status, message = 2, f"error: {message}"
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a full disk, a folder that cannot be written
        what = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
        status, message = 2, f"error: {what}; correct that and run again"
    except Interrupted as stop:
        status, name = 128 + signals[0], signal.Signals(signals[0]).name
        message = f"interrupted by {name}: {stop}"
    except RuntimeError as error:
        if processes() == 1 and "DataLoader worker (pid" not in str(error):
            raise
        traceback.print_exc()
        why = str(error).splitlines()[0]
        status, message = 1, f"error: a process of this run died ({why}); --resume auto continues"
    if status:
        print(message, file=sys.stderr, flush=True)
        sys.exit(status)


def progress(items: Iterable, name: str) -> Iterator:
    """The items, with a bar on a terminal; Interrupted after the item in which a signal came."""
    for item in tqdm(items, name, leave=False, disable=not sys.stdout.isatty()):
        yield item
        if signals:
            raise Interrupted("nothing to save")


# --------------------------------------------------------------------------------------- processes


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def pick_device(name: str) -> torch.device:
    """The device of --device; under torchrun, joins the other processes. Only the first prints."""
    local = os.environ.get("LOCAL_RANK")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local:
        name = f"cuda:{local}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used ({why}); try cpu") from None
    if local:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(hours=2))  # for downloads
        if rank():
            sys.stdout = open(os.devnull, "w")
    return device


@contextmanager
def first_process_first() -> Iterator[None]:
    """What is done here once and kept in a file, the other processes find there."""
    if rank():
        distributed.barrier()
    yield
    if processes() > 1 and not rank():
        distributed.barrier()


def gather(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors (B / processes, ...) of every process -> (B, ...), in the order of the whole batch.

    Losses of the whole batch follow on every process, whatever images they compare. The gradient
    flows to the own part: `sum_gradients` adds up the others'.
    """
    if processes() == 1:
        return [*tensors]
    whole = []
    for x in tensors:
        if x is not None:
            parts = [torch.empty_like(x) for _ in range(processes())]
            distributed.all_gather(parts, x.detach().contiguous())
            parts[rank()] = x
            x = torch.cat(parts)
        whole.append(x)
    return whole


def sum_gradients(net: nn.Module) -> None:
    """After backward: the gradient of the whole batch in every process; see `gather`."""
    if processes() > 1:
        for p in net.parameters():
            if p.grad is not None:
                distributed.all_reduce(p.grad)


def same_buffers(net: nn.Module) -> None:
    """Give every process the batch statistics of the first."""
    if processes() > 1:
        for buffer in net.buffers():
            distributed.broadcast(buffer, 0)


def all_rows(found: list[tuple[Tensor, ...]], rows: int) -> list[Tensor]:
    """Tensors (rows, ...) from (indices, values ...) of batches of all processes, on the CPU."""
    found = [tuple(v.cpu() for v in batch) for batch in found]
    if processes() > 1:
        everyone = [None] * processes()
        distributed.all_gather_object(everyone, found)
        found = [batch for part in everyone for batch in part]
    index, *values = (torch.cat(v) for v in zip(*found, strict=True))
    assert index.sort().values.tolist() == [*range(rows)], "every image must come exactly once"
    return [v.new_zeros(rows, *v.shape[1:]).index_copy(0, index, v) for v in values]


# ------------------------------------------------------------------------------------------ labels


def check_labels(y: np.ndarray, num_classes: int, source: str) -> np.ndarray:
    """Return y as int8 (images, C) or raise an InputError with `source` and the first bad row."""
    y = np.asarray(y)
    if y.ndim != 2 or y.shape[1] != num_classes:
        raise InputError(f"{source}: labels have shape {y.shape}, not (images, {num_classes})")
    bad = np.argwhere(~np.isin(y, (-1, 0, 1)))  # NaN is bad too
    if len(bad):
        raise InputError(f"{source}: row {bad[0][0]} has label {y[tuple(bad[0])]}, not 1, 0 or -1")
    return y.astype(np.int8)


def check_known(known: float) -> None:
    if not 0 < known <= 1:
        raise InputError(f"--known {known} must be in (0, 1], the proportion that stays known")


def hide_entries(y: np.ndarray, known: float, seed: int) -> np.ndarray:
    """Hide single labels: (i, c) stays iff RandomState(seed).random_sample(y.shape)[i, c] < known.

    y (images, C) in {1, 0, -1}, known in (0, 1] -> new int8 array, hidden entries 0. With seed 0
    and rows in the official order this is the mask the SST authors published (Chen et al., AAAI
    2022); masks of one seed are nested: what 10 % leave known, 50 % leave known.
    """
    check_known(known)
    keep = np.random.RandomState(seed).random_sample(y.shape) < known
    return np.where(keep, y, 0).astype(np.int8)


def hide_images(y: np.ndarray, known: float, seed: int) -> np.ndarray:
    """Hide all labels of the images not in RandomState(seed).permutation(n)[: int(known * n)].

    Arguments and result as `hide_entries`. The semi-supervised protocol; the field's seed is 1.
    """
    check_known(known)
    kept = np.random.RandomState(seed).permutation(len(y))[: int(known * len(y))]
    hidden = np.zeros(y.shape, dtype=np.int8)
    hidden[kept] = y[kept]
    return hidden


def mask_hash(y: np.ndarray) -> str:
    """First 8 hex digits of the sha256 of which entries of y are known."""
    return hashlib.sha256(np.packbits(y != 0).tobytes()).hexdigest()[:8]


# --------------------------------------------------------------------------------------- data sets


@dataclass
class Split:
    """`images`: paths, or a uint8 array (images, height, width, 3); y (images, C) int8; ids."""

    images: Sequence[str] | np.ndarray
    y: np.ndarray
    ids: list[str]


@dataclass
class Data:
    classes: list[str]
    train: Split
    test: Split


def load_data(name: str, root: str | None, limit: int | None = None, fetch: bool = False) -> Data:
    """Load a data set; `limit` keeps the first images of each split, `fetch` downloads it first.

    InputError on bad files; a warning on stderr when the counts are not the official ones.
    """
    if name not in DATASETS:
        raise InputError(f"--data {name} is unknown; choose from {', '.join(DATASETS)}")
    tree, load, counts, source = DATASETS[name]
    if fetch and tree:
        with first_process_first():
            download(name, root, source)
    if tree and (root is None or not Path(root).is_dir()):
        what = "--root DIR is missing" if root is None else f"--root {root} is no folder"
        raise InputError(f"{what}; --data {name} needs {tree} there")
    data = load(root and Path(root))
    found = len(data.train.y), len(data.test.y)
    if counts and found != counts:
        print(f"warning: {name} has {found} train and test images, not {counts}", file=sys.stderr)
    for part, split in (("train", data.train), ("test", data.test)):
        split.images, split.ids = split.images[:limit], split.ids[:limit]
        split.y = check_labels(split.y, len(data.classes), f"{name} {part}")[:limit]
        if not len(split.y):
            raise InputError(f"{name} {part} in {root} has no image")
        if tree:
            check_images(split.images)
    return data


COCO = "http://images.cocodataset.org"
COCO_ARCHIVES = {  # md5
    "zips/train2014.zip": "0da8c0bd3d6becc4dcb32757491aca88",
    "zips/val2014.zip": "a3d79f5ed8d289b7a7554ce06a5782b3",
    "annotations/annotations_trainval2014.zip": "0a379cfc70b0e71301e0f377548639bd",
}


def download(name: str, root: str | None, source: str) -> None:
    """Fetch VOC (through torchvision) or COCO 2014 into root; of others an InputError says how."""
    if root is None:
        raise InputError("--download needs --root, the folder that the data goes to")
    Path(root).mkdir(parents=True, exist_ok=True)
    if name.startswith("voc"):
        check_space(root, 6 * 2**30)
        parts = (("train", "val") if name == "voc2012" else ("trainval", "test"))
        try:
            for part in parts:
                VOCDetection(root, name[3:], part, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(f"--download {name}: {error}; try again") from None
    elif name == "coco":
        for archive, md5 in COCO_ARCHIVES.items():
            done = Path(root) / f"{Path(archive).name}.done"
            if not done.exists():
                fetch_archive(f"{COCO}/{archive}", Path(root), md5)
                done.touch()
    else:
        raise InputError(f"--download cannot fetch {name}; {source}; it needs {DATASETS[name][0]}")


def check_space(root: str | Path, size: int) -> None:
    if (free := shutil.disk_usage(root).free) < size:
        gb = 2**30
        raise InputError(f"{root} has {free / gb:.1f} GB free and needs {size / gb:.1f}; make room")


def fetch_archive(url: str, root: Path, md5: str, tries: int = 5) -> None:
    """Download a zip archive, continue where a broken connection ended, check it, extract it.

    InputError after `tries` failures, or when the disk is too small.
    """
    path, why = root / Path(url).name, ""
    for _ in range(tries):
        begin = path.stat().st_size if path.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                if answer.status != 206:  # the host sends all of it
                    begin = 0
                size = begin + int(answer.headers["Content-Length"])
                check_space(root, 2 * size - begin)  # it and what it holds
                with open(path, "ab" if begin else "wb") as file:
                    for chunk in progress(iter(lambda: answer.read(2**20), b""), path.name):
                        file.write(chunk)
        except urllib.error.HTTPError as error:
            if error.code != 416:  # 416: there is nothing after what we have
                why = str(error)
                continue
        except (OSError, http.client.HTTPException) as error:
            why = str(error)
            continue
        else:
            if path.stat().st_size < size:
                why = "the connection broke"
                continue
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() == md5:
                break
        path.unlink()
        why = "its md5 is wrong"
    else:
        raise InputError(f"{url} cannot be fetched: {why}; try again, it continues")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(root)  # zipfile drops what would lead out of root from the names
    path.unlink()


def check_images(paths: Sequence[str]) -> None:
    """Raise an InputError unless each path is a file whose header PIL reads."""

    def problem(path: str) -> str | None:
        try:
            Image.open(path).close()
        except Exception as error:  # PIL raises many kinds; whichever it is goes into the message
            return str(error)
        return None

    with ThreadPoolExecutor(8) as pool:
        bad = [why for why in pool.map(problem, paths) if why]
    if bad:
        raise InputError(f"{len(bad)} of {len(paths)} images cannot be read, the first: {bad[0]}")


def parse(path: Path, reader: Callable[[str], object]) -> object:
    """reader(text of the file); whatever is wrong with it becomes an InputError that names it."""
    try:
        return reader(path.read_text(encoding="utf-8-sig"))  # Excel begins a csv with a BOM
    except FileNotFoundError:
        raise InputError(f"{path} is missing; --help and the README say what is needed") from None
    except (OSError, ValueError, LookupError, TypeError, ElementTree.ParseError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} cannot be used ({why}); correct it") from None


def load_coco(root: Path) -> Data:
    """COCO 2014. Any annotation counts, crowds too; images without annotation stay."""

    def labels(text: str) -> tuple[list[str], list[str], np.ndarray]:
        spec = json.loads(text)
        names = {c["id"]: c["name"] for c in sorted(spec["categories"], key=lambda c: c["id"])}
        column = {category: c for c, category in enumerate(names)}
        row = {image["id"]: i for i, image in enumerate(spec["images"])}
        y = np.full((len(row), len(names)), -1, dtype=np.int8)
        for a in spec["annotations"]:
            y[row[a["image_id"]], column[a["category_id"]]] = 1
        return list(names.values()), [image["file_name"] for image in spec["images"]], y

    splits, classes = [], []
    for part in ("train2014", "val2014"):
        names, files, y = parse(root / "annotations" / f"instances_{part}.json", labels)
        splits.append(Split([str(root / part / f) for f in files], y, files))
        classes.append(names)
    if classes[0] != classes[1]:
        raise InputError(f"{root}/annotations: train2014 and val2014 have other categories")
    return Data(classes[0], *splits)


VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()


def load_voc(root: Path, year: int, parts: tuple[str, str]) -> Data:
    """Objects marked difficult do not make a class present."""
    base = root / "VOCdevkit" / f"VOC{year}"

    def labels(text: str) -> np.ndarray:
        y = np.full(len(VOC_CLASSES), -1, dtype=np.int8)
        for item in ElementTree.fromstring(text).iter("object"):
            if item.findtext("difficult", "0").strip() != "1":
                y[VOC_CLASSES.index(item.findtext("name", "").strip())] = 1
        return y

    splits = []
    for part in parts:
        ids = parse(base / "ImageSets" / "Main" / f"{part}.txt", str.split)
        y = np.array([parse(base / "Annotations" / f"{name}.xml", labels) for name in ids])
        splits.append(Split([str(base / "JPEGImages" / f"{name}.jpg") for name in ids], y, ids))
    return Data(VOC_CLASSES, *splits)


def load_nuswide(root: Path) -> Data:
    """NUS-WIDE: the concepts in the order of their label files, that is, of the alphabet."""
    base, splits = root / "Groundtruth" / "TrainTestLabels", []
    classes = sorted(path.name[7:-10] for path in base.glob("Labels_*_Train.txt"))
    if not classes:
        raise InputError(f"{base} holds no Labels_*_Train.txt; fetch NUS-WIDE's Groundtruth again")

    def column(text: str) -> np.ndarray:
        if len(values := np.array(text.split(), dtype=np.int8)) != len(ids):
            raise ValueError(f"{len(values)} labels for {len(ids)} images")
        return 2 * values - 1

    for part in ("Train", "Test"):
        lines = parse(root / "ImageList" / f"{part}Imagelist.txt", str.splitlines)
        ids = [line.strip().replace("\\", "/") for line in lines if line.strip()]
        columns = [parse(base / f"Labels_{name}_{part}.txt", column) for name in classes]
        splits.append(Split([str(root / "Flickr" / i) for i in ids], np.stack(columns, 1), ids))
    return Data(classes, *splits)


def load_vg200(root: Path) -> Data:
    """Visual Genome: the 200 most frequent object names by images; 10,000 test images drawn."""

    def objects(text: str) -> list[tuple[str, set[str]]]:
        return [
            ("/".join(image["image_url"].split("/")[-2:]),
             {name.strip().lower() for o in image["objects"] for name in o["names"]})
            for image in json.loads(text)
        ]  # fmt: skip

    images = parse(root / "objects.json", objects)
    number = Counter(name for _, names in images for name in names)
    classes = sorted(sorted(number, key=lambda name: (-number[name], name))[:200])
    y = np.array([[1 if c in names else -1 for c in classes] for _, names in images], np.int8)
    order = np.random.RandomState(0).permutation(len(y))
    splits = []
    for rows in (np.sort(order[VG_TEST:]), np.sort(order[:VG_TEST])):
        ids = [images[i][0] for i in rows]
        splits.append(Split([str(root / i) for i in ids], y[rows], ids))
    return Data(classes, *splits)


VG_TEST = 10_000


def load_cub(root: Path) -> Data:
    """CUB-200-2011: 312 binary attributes; some of their lines have a field too many at the end."""
    base = root / "CUB_200_2011"

    def table(text: str) -> dict[str, str]:
        return dict(line.split(maxsplit=1) for line in text.splitlines() if line.strip())

    named = root / "attributes.txt"
    named = named if named.exists() else base / "attributes" / "attributes.txt"
    classes, files = parse(named, table), parse(base / "images.txt", table)
    train = parse(base / "train_test_split.txt", table)

    def labels(text: str) -> np.ndarray:
        column, row = ({key: k for k, key in enumerate(keys)} for keys in (classes, files))
        y = np.full((len(row), len(column)), -1, dtype=np.int8)
        for line in text.splitlines():
            image, attribute, present, *_ = line.split()
            y[row[image], column[attribute]] = 2 * int(present) - 1
        return y

    y, splits = parse(base / "attributes" / "image_attribute_labels.txt", labels), []
    for wanted in "10":
        rows = [k for k, key in enumerate(files) if train.get(key, "").strip() == wanted]
        ids = [[*files.values()][k].strip() for k in rows]
        splits.append(Split([str(base / "images" / i) for i in ids], y[rows], ids))
    return Data([name.strip() for name in classes.values()], *splits)


def load_folder(root: Path) -> Data:
    """The user's own: lines `path,label;label;-label` in train.csv and test.csv, classes.txt.

    `-label` is known absent. What a line leaves out is unknown in train.csv, absent in test.csv.
    """

    def names(text: str) -> list[str]:
        found = [line.strip() for line in text.splitlines() if line.strip()]
        if twice := [name for name, n in Counter(found).items() if n > 1]:
            raise ValueError(f"class {twice[0]} is there twice")
        return found

    classes = parse(root / "classes.txt", names)

    def table(text: str) -> dict[str, np.ndarray]:
        rows = {}
        for number, line in enumerate(csv.reader(text.splitlines()), start=1):
            if not line:
                continue
            if len(line) != 2:
                raise ValueError(f"line {number} is not path,label;label;-label")
            if line[0] in rows:
                raise ValueError(f"line {number} names {line[0]} again")
            rows[line[0]] = y = np.zeros(len(classes), np.int8)
            for label in filter(None, map(str.strip, line[1].split(";"))):
                name, sign = (label[1:], -1) if label[0] == "-" else (label, 1)
                if name not in classes:
                    why = f"line {number}: {name} is not in classes.txt; no header line is wanted"
                    raise ValueError(why)
                if y[(c := classes.index(name))] == -sign:
                    raise ValueError(f"line {number}: {name} is both present and absent")
                y[c] = sign
        return rows

    train, test = (parse(root / f"{part}.csv", table) for part in ("train", "test"))
    shape, splits = (-1, len(classes)), []
    for rows, left_out in ((train, 0), (test, -1)):
        y = np.array([*rows.values()], np.int8).reshape(shape)
        paths = [str(root / path) for path in rows]
        splits.append(Split(paths, np.where(y == 0, left_out, y), [*rows]))
    return Data(classes, *splits)


# ----------------------------------------------------------------------------------- the toy world

# A context: the colours of its sky and ground, its classes and the chance that a scene shows them.
CONTEXTS = {
    "street": ("99b9e1 6e6e73", {"person": 0.8, "car": 0.7, "traffic light": 0.55, "bus": 0.4}),
    "sea": ("96d2f5 2869b4", {"sun": 0.8, "boat": 0.7, "fish": 0.55, "umbrella": 0.4}),
    "farm": ("a5d7fa 6ea546", {"tree": 0.8, "cow": 0.7, "barn": 0.55, "tractor": 0.4}),
    "night": ("14193c 1e3228", {"moon": 0.8, "tent": 0.7, "fire": 0.55, "owl": 0.4}),
}
TOY_CLASSES = [name for _, shown in CONTEXTS.values() for name in shown]
ELSEWHERE = 0.04  # chance of a class in a scene of another context
MISLEADING = 0.2  # proportion of scenes whose sky and ground are of a context drawn at random
CLUTTER = 3.0  # plain shapes a scene has on average
OBJECT_SIZE = (12, 22)  # height in pixels
NOISE = 14  # standard deviation, of 255
# Ellipse, Rectangle, Polygon, Line or Moon, its points xy on a grid of 0..9, and a colour; a and b
# are drawn anew for every object.
DRAWINGS = {
    "person": "E30 62 s; R33 66 a; R36 49 b; R56 69 b; L33 16 s; L63 86 s",
    "car": "P14 32 62 84 a; R04 97 a; P34 43 63 74 c; E16 38 k; E66 88 k",
    "traffic light": "R47 59 k; R20 77 k; E30 62 r; E32 64 y; E35 67 g",
    "bus": "R01 97 a; R12 34 c; R42 64 c; R72 85 c; E16 38 k; E66 88 k",
    "sun": "L09 90 y; L00 99 y; L40 59 y; L04 95 y; E22 77 y",
    "boat": "P06 96 78 28 a; L40 46 n; P51 55 85 w",
    "fish": "E02 67 a; P55 92 97 a; E13 24 w",
    "umbrella": "P05 12 30 60 82 95 a; P35 40 50 65 b; L45 49 n",
    "tree": "R46 59 n; E10 84 e; E02 56 e; E43 96 e",
    "cow": "R12 76 w; E23 44 k; E54 65 k; R16 29 w; R66 79 w; E60 93 w; E72 94 s",
    "barn": "R14 89 r; P05 40 50 95 n; R36 69 w; L36 69 r; L66 39 r",
    "tractor": "R33 86 a; R40 63 a; R51 62 c; E03 49 k; E15 38 y; E65 99 k; R71 83 k",
    "moon": "M00 99 w",
    "tent": "P08 40 50 98 a; P38 43 53 68 k",
    "fire": "P17 23 44 50 64 73 87 o; P37 45 53 67 y; L08 97 n; L07 98 n",
    "owl": "E11 89 n; P23 10 41 n; P73 80 51 n; E12 44 w; E52 84 w; E23 34 k; E63 74 k; L45 56 o",
    "ball": "E00 99 a",
    "block": "R00 99 a",
    "cone": "P09 99 50 a",
}
COLOURS = dict(
    k="191919", w="f5f5f5", y="facd3c", r="d72d28", g="3cb44b", n="784b28", o="f58228", s="f0c3a0",
    e="2d7832", c="96cdeb",
)  # fmt: skip


def jitter(colour: bytes | str, rng: np.random.Generator) -> tuple[int, ...]:
    rgb = colour if isinstance(colour, bytes) else bytes.fromhex(colour)
    return tuple(min(max(int(v + rng.normal(0, 20)), 0), 255) for v in rgb)


def draw_object(draw: ImageDraw.ImageDraw, name: str, box: tuple, rng: np.random.Generator) -> None:
    """Draw one object into box = (left, top, width, height), in pixels, colours jittered."""
    left, top, width, height = box
    colours = COLOURS | {"a": rng.bytes(3), "b": rng.bytes(3)}
    mirrored = rng.random() < 0.5
    for primitive in DRAWINGS[name].split("; "):
        *points, key = primitive[1:].split()
        points = [(9 - int(x) if mirrored else int(x), int(y)) for x, y in points]
        points = [(left + width * x / 9, top + height * y / 9) for x, y in points]
        xs, ys = zip(*points, strict=True)
        corners = (min(xs), min(ys), max(xs), max(ys))
        fill = jitter(colours[key], rng)
        match primitive[0]:
            case "E":
                draw.ellipse(corners, fill)
            case "R":
                draw.rectangle(corners, fill)
            case "P":
                draw.polygon(points, fill)
            case "L":
                draw.line(points, fill, max(1, round(width / 14)))
            case "M":
                draw.chord(corners, 60, 300, fill)


def draw_scene(names: list[str], context: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (size, size, 3): sky, ground, clutter, the named objects, noise."""
    full = 2 * size  # drawn at twice the size, then halved: smooth edges
    sky, ground = (jitter(colour, rng) for colour in CONTEXTS[context][0].split())
    image = Image.new("RGB", (full, full), sky)
    draw, horizon = ImageDraw.Draw(image), rng.uniform(0.4, 0.7) * full
    draw.rectangle((0, horizon, full, full), ground)
    clutter = rng.choice(["ball", "block", "cone"], rng.poisson(CLUTTER * (size / 64) ** 2))
    for name in (*clutter, *rng.permutation(names)):
        height = 2 * rng.uniform(*OBJECT_SIZE) if name in TOY_CLASSES else rng.uniform(6, 28)
        low, high = horizon - height, full - 0.9 * height
        if name in ("sun", "moon", *clutter):
            low, high = 0, 0.35 * full if name in TOY_CLASSES else full
        width = height * rng.uniform(0.8, 1.25)
        place = rng.uniform(-0.1 * width, full - 0.9 * width), rng.uniform(low, high)
        draw_object(draw, str(name), (*place, width, height), rng)
    noise = NOISE * rng.standard_normal((size, size, 3))
    return np.clip(np.asarray(image.reduce(2)) + noise, 0, 255).astype(np.uint8)


def toy_scenes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns images (n, 64, 64, 3) uint8, y (n, C) int8 in {1, -1}, contexts (n,) in 0..3."""
    rng = np.random.default_rng(seed)
    contexts, random = rng.integers(len(CONTEXTS), size=(2, n))
    backgrounds = np.where(rng.random(n) < MISLEADING, random, contexts)
    chance = np.full((len(CONTEXTS), len(TOY_CLASSES)), ELSEWHERE)
    for k, (_, shown) in enumerate(CONTEXTS.values()):
        chance[k, 4 * k : 4 * k + 4] = list(shown.values())
    y = np.where(rng.random((n, len(TOY_CLASSES))) < chance[contexts], 1, -1).astype(np.int8)
    names = [[TOY_CLASSES[c] for c in np.flatnonzero(row == 1)] for row in y]
    drawn = zip(names, [list(CONTEXTS)[k] for k in backgrounds], strict=True)
    return np.stack([draw_scene(shown, k, 64, rng) for shown, k in drawn]), y, contexts


def load_toy(root: None) -> Data:
    """2,000 train and 1,000 test scenes, made in memory."""
    parts = [(toy_scenes(n, seed)[:2], seed) for seed, n in enumerate((2000, 1000))]
    train, test = (Split(x, y, [f"toy-{s}-{i}" for i in range(len(y))]) for (x, y), s in parts)
    return Data(TOY_CLASSES, train, test)


def cached_weights(name: str, make: Callable[[], nn.Module]) -> str:
    """Path of the state dict of `make()`, which is called once for all runs of this user.

    The name of the file holds a hash of the recipe: make's source and that of the toy world. Always
    two threads: their number changes the rounding, and with it the weights.
    """
    world = CONTEXTS, DRAWINGS, COLOURS, CLUTTER, OBJECT_SIZE, NOISE, ELSEWHERE, MISLEADING
    world += TOY_CLIP, TOY_CAPTIONS
    made = make, fit, toy_layers, toy_scenes, draw_scene, draw_object, jitter
    sources = [inspect.getsource(function) for function in made]
    recipe = hashlib.sha256(repr((world, sources)).encode()).hexdigest()[:8]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weak-multilabel"
    path = base / f"{name}-{recipe}.pth"
    with first_process_first(), torch.random.fork_rng(devices=[]):
        if not path.exists():
            print(f"pretraining for the toy world, once, into {path}", flush=True)
            base.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(0)
            threads = torch.get_num_threads()
            torch.set_num_threads(2)
            save_checkpoint(path, make().state_dict())
            torch.set_num_threads(threads)
    return str(path)


def fit(net: nn.Module, loss: Callable, n: int, steps: int, lr: float) -> nn.Module:
    """Minimise loss(indices into n items, 64 a step) over the parameters of net; returns net."""
    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in progress(range(steps), "pretraining for the toy world, once"):
        optimizer.zero_grad()
        loss(torch.randint(n, (64,))).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def toy_layers() -> nn.Sequential:
    """Five convolutions, stride 8: (B, 3, 64, 64) -> (B, 96, 8, 8)."""
    layers = []
    for i, o, stride in ((3, 24, 2), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1)):
        conv = nn.Conv2d(i, o, 3, stride, padding=1, bias=False)
        layers.append(nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU(inplace=True)))
    return nn.Sequential(*layers)


def pretrained_toy_layers() -> nn.Sequential:
    """What ImageNet is to a real trunk: name the one object of photos that are in no data set."""
    rng, n = np.random.default_rng(2), 6000
    target = torch.tensor(rng.integers(len(TOY_CLASSES), size=n))
    photos = [draw_scene([TOY_CLASSES[c]], rng.choice(list(CONTEXTS)), 32, rng) for c in target]
    images = normalise(torch.tensor(np.stack(photos)).permute(0, 3, 1, 2))
    net = nn.Sequential(toy_layers(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 16))
    loss = nn.functional.cross_entropy
    return fit(net, lambda k: loss(net(images[k]), target[k]), n, steps=190, lr=5e-3)[0]


TOY_CLIP = dict(  # what becomes of open_clip's RN50-quickgelu; 3 x 3 positions
    embed_dim=128,
    vision_cfg=dict(layers=[1, 1, 1, 1], width=16, image_size=96),
    text_cfg=dict(context_length=16, vocab_size=49408, width=128, heads=2, layers=2),
)
TOY_CAPTIONS = "a photo of a {}", "the region showing a {}", "a picture of a {}", "there is a {}"


def pretrained_toy_clip() -> nn.Module:
    """What OpenAI's CLIP is to real photographs: learns from captions of scenes in no data set.

    A caption names one or two random objects of its scene; it is right for every scene of the batch
    that shows them (the targets of UniCL, CVPR 2022), which learns faster than one right scene.
    """
    rng, size = np.random.default_rng(4), TOY_CLIP["vision_cfg"]["image_size"]
    scenes, y, _ = toy_scenes(4000, seed=3)
    scenes, y = torch.tensor(scenes[(y == 1).any(1)]), y[(y == 1).any(1)] == 1
    net = open_clip.create_model("RN50-quickgelu", **TOY_CLIP)
    net.token_embedding.requires_grad_(False)  # 49,408 random words, of which captions use 30
    tokenize = open_clip.SimpleTokenizer(context_length=TOY_CLIP["text_cfg"]["context_length"])

    def loss(index: Tensor) -> Tensor:
        named, captions = np.zeros_like(y[index]), []
        for shown, chosen in zip(y[index], named, strict=True):
            candidates = rng.permutation(np.flatnonzero(shown))
            chosen[candidates[: rng.integers(1, 3)]] = True
            names = " and a ".join(TOY_CLASSES[c] for c in np.flatnonzero(chosen))
            captions.append(rng.choice(TOY_CAPTIONS).format(names))
        images = v2.functional.resize(scenes[index].permute(0, 3, 1, 2), [size, size])
        image, text, scale = net(normalise(images, *CLIP_MEAN_STD), tokenize(captions))
        right = torch.tensor((y[index][:, None] >= named).all(-1)).float()  # (scenes, captions)
        logits = scale * image @ text.T
        pairs = ((logits, right), (logits.T, right.T))
        return sum(nn.functional.cross_entropy(x, r / r.sum(1, True)) for x, r in pairs) / 2

    return fit(net, loss, len(y), steps=300, lr=1e-3)


CLIP_MEAN_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def load_clip(arch: str, weights: str, size: int) -> tuple[nn.Module, Callable]:
    """open_clip's CLIP with a ResNet tower for images of `size` pixels, and its tokenizer.

    arch "toy" or a name of open_clip; weights "default" (OpenAI's; the toy world's own), "none" or
    a path. The positional table is interpolated when size is not the tower's own.
    """
    name, config = (("RN50-quickgelu", TOY_CLIP) if arch == "toy" else (arch, {}))
    spec = open_clip.get_model_config(name)
    if spec is None or not isinstance(spec["vision_cfg"].get("layers"), list):
        why = "is unknown" if spec is None else "has no spatial map before its pooling"
        raise InputError(f"--arch {arch} {why}; choose RN50-quickgelu, RN101-quickgelu or toy")
    if arch != "toy" and weights == "default" and not spec.get("quick_gelu"):
        raise InputError(f"--arch {arch}: OpenAI's weights want another activation; add -quickgelu")
    if size % 32:
        raise InputError(f"--size {size} must be a multiple of 32, the stride of the tower")
    if weights == "default":
        weights = cached_weights("toy-clip", pretrained_toy_clip) if arch == "toy" else "openai"
    try:
        with first_process_first():  # it may download
            net = open_clip.create_model(name, None if weights == "none" else weights, **config)
    except (RuntimeError, OSError, ValueError, pickle.UnpicklingError) as error:
        why, hint = " ".join(str(error).split())[:150], "give another file"
        if weights == "openai":
            hint = "they are fetched once: go online, or try --arch toy --size 96"
        raise InputError(f"--arch {arch} --weights {weights}: {why} ...; {hint}") from None
    pool = net.visual.attnpool
    mean, grid = pool.positional_embedding.detach().split((1, len(pool.positional_embedding) - 1))
    grid = grid.unflatten(0, (math.isqrt(len(grid)), -1)).permute(2, 0, 1)[None]  # (1, D, h, w)
    grid = nn.functional.interpolate(grid, (size // 32, size // 32), mode="bicubic")
    pool.positional_embedding = nn.Parameter(torch.cat((mean, grid.flatten(2)[0].T)))
    return net.eval(), open_clip.get_tokenizer(name, context_length=net.context_length)


def pool_features(pool: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The attention pool of a CLIP ResNet without and with its attention; map x (B, D_in, h, w).

    Returns local features (B, N, D), the value of every position by itself, and CLIP's image
    feature (B, D), an average of these over positions and their mean, weighted by head. It has one
    query; open_clip's pool computes one more for every position.
    """
    x = x.flatten(2).transpose(1, 2)  # (B, N, D_in)
    x = torch.cat((x.mean(1, keepdim=True), x), dim=1) + pool.positional_embedding
    q, k, v = pool.q_proj(x[:, :1]), pool.k_proj(x), pool.v_proj(x)
    heads = (z.unflatten(2, (pool.num_heads, -1)).transpose(1, 2) for z in (q, k, v))
    whole = nn.functional.scaled_dot_product_attention(*heads)  # (B, heads, 1, D_in / heads)
    # l_i = W_c (W_v (x_i + e_i) + b_v) + b_c
    return pool.c_proj(v[:, 1:]), pool.c_proj(whole.flatten(1))


def prompt_tokens(tokenize: Callable, prompt: str, names: list[str]) -> Tensor:
    """Tokens (len(names), context length) of the prompt with each name in the place of {}."""
    if not all(name.strip() for name in names):
        raise InputError(f"class {[*map(str.strip, names)].index('')} has no name for CLIP to read")
    return tokenize([prompt.format(name.replace("_", " ")) for name in names])


VOC_TREE = "VOCdevkit/VOC{}/{{Annotations,ImageSets/Main,JPEGImages}}"
DATASETS = {  # name: tree expected under --root, loader, official counts, where it is
    "toy": ("", load_toy, None, ""),
    "coco": (
        "annotations/instances_{train,val}2014.json, train2014/, val2014/",
        load_coco, (82783, 40504), "",
    ),
    "voc2007": (
        VOC_TREE.format(2007), lambda root: load_voc(root, 2007, ("trainval", "test")),
        (5011, 4952), "",
    ),
    "voc2012": (
        VOC_TREE.format(2012), lambda root: load_voc(root, 2012, ("train", "val")),
        (5717, 5823), "",
    ),
    "vg200": (
        "objects.json, VG_100K/, VG_100K_2/", load_vg200, (98249, 10000),
        "get images and objects (15 GB) from homes.cs.washington.edu/~ranjay/visualgenome",
    ),
    "nuswide": (
        "ImageList/, Groundtruth/TrainTestLabels/, Flickr/*/*.jpg", load_nuswide, (161789, 107859),
        "ask for NUS-WIDE's images (about 30 GB) at lms.comp.nus.edu.sg/wp-content/uploads/2019",
    ),
    "cub": (
        "attributes.txt, CUB_200_2011/{images,attributes,images.txt,train_test_split.txt}",
        load_cub, (5994, 5794), "get CUB-200-2011 (1.1 GB) from www.vision.caltech.edu/datasets",
    ),
    "folder": (
        "train.csv, test.csv, classes.txt and the images", load_folder, None, "it is your own",
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------- loading


def open_image(item: str | np.ndarray) -> Image.Image:
    """An RGB image from a file of 1 to 16 bits a channel or a uint8 array, else InputError."""
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    try:
        with Image.open(item) as image:
            if image.mode in ("I", "F"):
                raise ValueError("32 bits a pixel have no known range; save it with 8 or 16")
            if image.mode.startswith("I"):  # 16 bits: convert() would clip them at 255
                return Image.fromarray(np.uint8(np.asarray(image) >> 8)).convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # PIL raises many kinds; whichever it is goes into the message
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"image {item} cannot be read ({why}); replace or remove it") from None


def train_transform(size: int, crops: Sequence[int]) -> v2.Transform:
    """PIL image -> uint8 (3, size, size): resize to 512, random square crop, resize to 448, flip.

    The numbers are those of size 448 (SST, "Implementation Details") and scale with it; bicubic.
    """
    full, bicubic = round(512 * size / 448), InterpolationMode.BICUBIC
    crop = v2.RandomChoice([v2.RandomCrop(min(full, round(c * size / 448))) for c in crops])
    resize, flip = v2.Resize((size, size), bicubic), v2.RandomHorizontalFlip()
    return v2.Compose([v2.Resize((full, full), bicubic), crop, resize, flip, v2.ToImage()])


def test_transform(size: int) -> v2.Transform:
    """PIL image -> uint8 (3, size, size); bicubic, the aspect is not kept."""
    return v2.Compose([v2.Resize((size, size), InterpolationMode.BICUBIC), v2.ToImage()])


def normalise(x: Tensor, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, on x's device: what travels there is a quarter the size."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (mean, std))
    return ((x / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


class ImageDataset(Dataset):
    """Items (*views, y (C,), index) by key (epoch, index), one view by each of `transforms`.

    The augmentation hangs on seed, epoch and index alone: any number of workers gives the same
    batches, and a resumed run draws what the uninterrupted one drew.
    """

    def __init__(self, images: Sequence, y: np.ndarray, transforms: list, seed: int) -> None:
        self.images, self.y = images, torch.as_tensor(y)
        self.transforms, self.seed = transforms, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        epoch, i = key
        image = open_image(self.images[i])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, epoch, i)) % 2**31)
            return *(transform(image) for transform in self.transforms), self.y[i], i


class EpochSampler(Sampler):
    """Batches of keys (epoch, index): shuffled by (seed, epoch), in order without a seed.

    Set `.epoch`, and `.skip` to begin after so many batches. A shuffled epoch leaves out a last
    smaller batch: batch statistics want whole ones.
    """

    skip = 0

    def __init__(self, indices: np.ndarray, batch_size: int, seed: int | None = None) -> None:
        self.indices, self.batch_size, self.seed, self.epoch = indices, batch_size, seed, 0
        self.whole = seed is not None and len(indices) >= batch_size

    def __len__(self) -> int:
        return (len(self.indices) + (0 if self.whole else self.batch_size - 1)) // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.indices
        if self.seed is not None:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        for k in range(self.skip, len(self)):
            batch = order[k * self.batch_size : (k + 1) * self.batch_size]
            yield [(self.epoch, i) for i in batch.tolist()]


def finish_the_step(worker: int) -> None:
    """A signal to all processes of a run reaches the loader's: they must outlive the step."""
    signal.signal(signal.SIGTERM, ask_to_stop)


class OwnPart(Sampler):
    """The part of every batch of `sampler` that is this process's, under torchrun."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        k, n = rank(), processes()
        for batch in self.sampler:
            size = len(batch)
            if self.sampler.seed is not None and size % n:
                raise InputError(f"{n} processes cannot share {size} images; change --batch-size")
            if own := batch[size * k // n : size * (k + 1) // n]:
                yield own


def make_loader(
    images: Sequence, y: np.ndarray, views: list, sampler: Sampler, args: Namespace
) -> DataLoader:
    """Brings (*uint8 views, labels, indices) of the batches of keys that `sampler` lists."""
    workers = dict(num_workers=args.workers, persistent_workers=args.workers > 0)
    workers |= dict(pin_memory=torch.cuda.is_available(), worker_init_fn=finish_the_step)
    sampler = OwnPart(sampler) if processes() > 1 else sampler
    dataset, own = ImageDataset(images, y, views, args.seed), torch.Generator()
    return DataLoader(dataset, batch_sampler=sampler, generator=own, **workers)


def test_loader(data: Data, args: Namespace) -> DataLoader:
    """Brings (image, labels, index) of every test image once, in order."""
    sampler = EpochSampler(np.arange(len(data.test.y)), args.batch_size)
    return make_loader(data.test.images, data.test.y, [test_transform(args.size)], sampler, args)


# ----------------------------------------------------------------------------------------- metrics


def multilabel_metrics(logits: np.ndarray, y: np.ndarray) -> dict:
    """Metrics in percent of float logits (images, C) for y (images, C) in {1, -1}, else ValueError.

    `mAP`: non-interpolated, sklearn's average_precision_score. `mAP_interp`: VOC2010's all-point
    interpolation. Means over classes leave out those without a positive: `empty_classes` of them,
    NaN in `ap` (C,). OP OR OF1 CP CR CF1 at p >= 0.5; with `_top3` for the 3 highest scores of an
    image.
    """
    logits, y = np.asarray(logits, np.float32), np.asarray(y)
    if logits.shape != y.shape or not np.isin(y, (1, -1)).all():
        raise ValueError(f"logits {logits.shape} and y {y.shape} in {{1, -1}} do not fit")
    if not np.isfinite(logits).all():
        raise InputError("a score is not finite: training has diverged, a lower --lr may help")
    truth = y == 1
    shown = truth.any(0)
    ap, interpolated = np.full((2, y.shape[1]), np.nan)
    for c in np.flatnonzero(shown):
        precision, recall, _ = precision_recall_curve(truth[:, c], logits[:, c])
        width = -100 * np.diff(recall)
        ap[c] = np.sum(width * precision[:-1])
        interpolated[c] = np.sum(width * np.maximum.accumulate(precision[:-1]))
    mean = [float(v[shown].mean()) if shown.any() else math.nan for v in (ap, interpolated)]
    result = dict(zip(("mAP", "mAP_interp"), mean, strict=True))
    top3 = np.zeros_like(truth)
    np.put_along_axis(top3, np.argsort(-logits, axis=1, kind="stable")[:, :3], True, axis=1)
    for suffix, said in (("", logits >= 0), ("_top3", top3)):
        right, said, there = (m.sum(0) for m in (said & truth, said, truth))
        overall = right.sum() / max(said.sum(), 1), right.sum() / max(there.sum(), 1)
        ratios = [(right / np.maximum(v, 1))[shown] for v in (said, there)]
        by_class = [v.mean() if len(v) else 0.0 for v in ratios]
        for letter, (p, r) in (("O", overall), ("C", by_class)):
            f1 = 2 * p * r / max(p + r, 1e-12)
            for name, value in (("P", p), ("R", r), ("F1", f1)):
                result[letter + name + suffix] = 100 * float(value)
    return result | dict(empty_classes=int((~shown).sum()), ap=ap)


def pseudo_counts(pseudo: Tensor, y: Tensor, truth: Tensor) -> Tensor:
    """(5,): pseudo positives, those with a truth, those right, hidden positives, images.

    Diagnostic: sees the truth, which is 0 where nobody knows it.
    """
    guess, hidden = (pseudo == 1) & (y == 0), (y == 0) & (truth == 1)
    images = hidden.new_tensor(len(y), dtype=torch.long)
    judged, right = guess & (truth != 0), guess & hidden
    return torch.stack([guess.sum(), judged.sum(), right.sum(), hidden.sum(), images])


def pseudo_quality(counts: dict[str, Tensor]) -> dict:
    """Log entries from summed `pseudo_counts` by name; None where a ratio has no denominator."""
    entry = {}
    for name, values in counts.items():
        guessed, judged, right, hidden, images = values.tolist()
        entry[f"{name}_per_image"] = guessed / max(images, 1)
        entry[f"{name}_precision"] = right / judged if judged else None
        entry[f"{name}_recall"] = right / hidden if hidden else None
    return entry


# -------------------------------------------------------------------------------------------- runs


def add_up(tally: dict, values: dict[str, Tensor]) -> None:
    """tally[name] += value. An epoch's tally is {} at its start and saved when interrupted."""
    for name, value in values.items():
        tally[name] = tally[name] + value if name in tally else value


def add_losses(tally: dict, parts: dict[str, Tensor]) -> None:
    """Count a step and add up the parts of its loss, scalars on any device; waits for none."""
    tally["step"] = tally.get("step", 0) + 1
    parts = {name: value.detach() for name, value in parts.items()}
    add_up(tally, {name: torch.stack((v, v.isfinite())) for name, v in parts.items()})


def mean_losses(tally: dict, epoch: int) -> dict:
    """Log entries: the means of an epoch. InputError names the step and the part that broke."""
    sums = {name: value.tolist() for name, value in tally.items() if name.startswith("loss")}
    name, finite = min(((name, int(n)) for name, (_, n) in sums.items()), key=lambda item: item[1])
    if finite < tally["step"]:
        where = f"epoch {epoch}, step {finite + 1}: {name} is not finite"
        raise InputError(f"{where}; the checkpoint before it is whole, a lower --lr may help")
    return {name: total / tally["step"] for name, (total, _) in sums.items()}


def check_args(args: Namespace, above_zero: str, not_below_zero: str) -> Namespace:
    """Check what every script has, and the arguments that a script names; returns them."""
    check_known(args.known)
    for name in f"size epochs batch_size lr limit stop_after {above_zero}".split():
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be above 0")
    for name in f"workers seed mask_seed {not_below_zero}".split():
        if not 0 <= getattr(args, name) < 2**32:  # numpy's seeds end there
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {getattr(args, name)} must be at least 0 and below 2^32")
    if (args.eval or args.predict) and args.resume in (None, "auto"):
        raise InputError("--eval and --predict need --resume PATH, the last.pt of a run")
    if args.resume == "auto" and not args.out:
        raise InputError("--resume auto needs --out, the folder of the run to continue")
    if args.dry_run:
        args.limit, args.epochs = max(64, 2 * args.batch_size), 1
    return args


def load_weights(net: nn.Module, path: str) -> nn.Module:
    """Load a state dict into `net` and return it; InputError when the file is none or misfits."""
    if not Path(path).is_file():
        raise InputError(f"--weights {path} is no file; give a state dict, default or none")
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a file of any content comes here
        why = " ".join(str(error).split())[:200]
        raise InputError(f"--weights {path} does not fit: {type(error).__name__}: {why}") from None
    return net


def save_checkpoint(path: Path, state: dict) -> None:
    """Write under a temporary name, fsync, rename: whatever happens, `path` is whole."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# arguments that may change when a run is continued
FREE = set(
    "out resume stop_after workers device root download compile eval predict dry_run limit weights"
    .split()
)


def load_checkpoint(args: Namespace, method: str, model_args: Sequence[str]) -> dict | None:
    """The checkpoint of --resume, None without one; its weights replace --weights.

    To continue a run, all arguments but those of `FREE` must be equal; --eval and --predict take
    `model_args` from the checkpoint.
    """
    path = f"{args.out}/last.pt" if args.resume == "auto" else args.resume
    if path is None or (args.resume == "auto" and not Path(path).exists()):
        return None
    if not Path(path).is_file():
        raise InputError(f"--resume {path} does not exist; give the last.pt of a run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["method"]
    except Exception as error:  # a file of any content comes here
        why = type(error).__name__
        raise InputError(f"--resume {path} is no readable checkpoint ({why})") from None
    if found != method:
        raise InputError(f"--resume {path} was written by {found}.py; use that")
    for name, new in vars(args).items():
        old = state["args"].get(name, new)
        if name in model_args and (args.eval or args.predict):
            setattr(args, name, old)
        elif name not in FREE and old != new and not (args.eval or args.predict):
            raise InputError(f"--resume {path}: {name} was {old} and is {new} now; give {old}")
    args.weights = "none"
    return state


def check_same_run(state: dict, run: dict, args: Namespace) -> None:
    """Refuse to continue a run with other data, classes or mask; the InputError names both."""
    for name, value in run.items():
        if state[name] != value and not (args.eval and name == "mask"):
            hint = "give the --data, --root, --limit, --known and --mask-seed of that run"
            raise InputError(f"--resume: {name} was {state[name]} and is {value} now; {hint}")


def to_device(tally: dict, device: torch.device) -> dict:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in tally.items()}


def set_generators(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class RunLog:
    """The folder OUT of a run: log.jsonl, last.pt, samples.png. A dry run writes nothing.

    log.jsonl begins with {"run": ...} and has one object an epoch, echoed as a line on stdout.
    `start` is the epoch at which a checkpoint goes on, whose line and later ones are dropped, 0
    without a checkpoint.
    """

    def __init__(
        self, args: Namespace, run: dict, y: np.ndarray, start: int, device: torch.device
    ) -> None:
        free = (f"runs/{run['method']}-{run['data']}-{n}" for n in count(1))
        self.out = Path(args.out or next(path for path in free if not Path(path).exists()))
        self.args, self.run, self.device = args, run, device
        self.silent = args.dry_run or rank() > 0
        last, resume = self.out / "last.pt", args.resume
        if last.exists() and not (resume == "auto" or (resume and last.samefile(resume))):
            raise InputError(f"--out {self.out} holds a run; add --resume auto, or choose another")
        where = "nothing is written" if args.dry_run else f"log in {self.out}"
        size = f"{y.shape[0]} training images of {y.shape[1]} classes"
        known = f"{(y != 0).mean():.2%} of the labels known, mask {run['mask']}"
        print(f"{run['method']} on {run['data']}: {size}, {known}; {where}", flush=True)
        if self.silent:
            return
        versions = dict(python=platform.python_version(), torch=torch.__version__)
        cuda = device.type == "cuda"
        versions["device"] = torch.cuda.get_device_name(device) if cuda else str(device)
        line = run | versions | dict(command=sys.argv, seed=args.seed, args=vars(args))
        self.out.mkdir(parents=True, exist_ok=True)
        for stale in self.out.glob("last.*.tmp"):  # of a run that was killed while it wrote
            stale.unlink()
        path, lines = self.out / "log.jsonl", [json.dumps({"run": line})]
        old = path.read_text().splitlines(keepends=True) if path.exists() else []
        if start and old:
            whole = (line.strip() for line in old[1:] if line.endswith("\n"))
            lines = [old[0].strip(), *(x for x in whole if json.loads(x)["epoch"] < start)]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines))
        os.replace(temporary, path)

    def write(self, entry: dict) -> None:
        if not self.silent:
            entry = {k: None if v != v else v for k, v in entry.items()}  # JSON knows no NaN
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")

    def epoch(self, entry: dict, begin: float) -> None:
        """Log an epoch that began at time `begin`."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        entry |= dict(seconds=time.time() - begin)
        self.write(entry | dict(peak_memory_gb=peak / 2**30))
        line = "epoch {epoch:3d}  loss {loss:.4f}  mAP {mAP:.2f}  mAP-interp {mAP_interp:.2f}"
        line += "  OF1 {OF1:.1f}  CF1 {CF1:.1f}  {seconds:.1f} s  {images_per_second:.0f} images/s"
        if entry["pseudo_per_image"]:
            line += "  pseudo {pseudo_per_image:.2f}/image"
        if entry["pseudo_precision"] is not None:
            line += ", {pseudo_precision:.0%} right"
        print(line.format(**entry), flush=True)

    def checkpoint(self, state: dict) -> None:
        if not self.silent:
            generators = dict(cpu=torch.get_rng_state())
            if self.device.type == "cuda":
                generators["cuda"] = torch.cuda.get_rng_state(self.device)
            state |= self.run | dict(args=vars(self.args), generators=generators)
            try:
                save_checkpoint(self.out / "last.pt", state)
            except (OSError, RuntimeError) as error:  # torch.save raises either on a full disk
                why = f"{str(error).splitlines()[0]}; the checkpoint before it is whole"
                raise InputError(f"--out {self.out}: last.pt cannot be written: {why}") from None

    def interrupt(self, epoch: int, state: dict) -> None:
        """Save a run in the middle of an epoch, then raise Interrupted.

        InputError, and nothing is saved, when the loss broke in that epoch.
        """
        if "step" in state["tally"]:
            mean_losses(state["tally"], epoch)
        self.checkpoint(state)
        saved = f"saved; --out {self.out} --resume auto continues"
        raise Interrupted(f"in epoch {epoch}, {'nothing saved' if self.silent else saved}")

    def samples(self, data: Data, logits: np.ndarray | None, more: Sequence[Cell] = ()) -> None:
        """samples.png: test images, their labels found, missed and wrongly said; more cells."""
        if self.silent or logits is None:
            return
        cells = []
        for k, (said, true) in enumerate(zip(logits[:18] >= 0, data.test.y[:18] == 1, strict=True)):
            text = []
            for word, which, colour in (
                ("found", said & true, "green"),
                ("missed", true & ~said, "gray"),
                ("wrong", said & ~true, "red"),
            ):
                names = ", ".join(data.classes[c] for c in np.flatnonzero(which))
                wrapped = textwrap.wrap(f"{word}: {names}", 30) if names else ()
                text += [(line, colour) for line in wrapped]
            text = text or [("nothing there, nothing said", "gray")]
            cells.append((open_image(data.test.images[k]), text))
        draw_sheet([*cells, *more], 6, self.out / "samples.png")
        print(f"test images with their labels and predictions: {self.out / 'samples.png'}")


Cell = tuple[Image.Image, list[tuple[str, str]]]


def draw_sheet(cells: Sequence[Cell], columns: int, path: Path, lines: int = 5) -> None:
    """Save a picture of cells: an image and, below it, up to `lines` lines of (text, colour)."""
    side, step = 176, 13
    height, rows = side + step * lines + 8, -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for k, (image, text) in enumerate(cells):
        x, y = k % columns * (side + 4), k // columns * height
        sheet.paste(image.resize((side, side)), (x, y))
        for n, (line, colour) in enumerate(text[:lines]):
            draw.text((x, y + side + 1 + n * step), line, colour, font)
    sheet.save(path)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]
    cells = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def metrics_table(columns: dict[str, dict]) -> str:
    """A Markdown table of results of `multilabel_metrics`, one column each."""
    keys = [key for key in next(iter(columns.values())) if key not in ("ap", "empty_classes")]
    rows = [[key.replace("_", "-"), *(f"{m[key]:.2f}" for m in columns.values())] for key in keys]
    rows.append(["classes left out", *(str(m["empty_classes"]) for m in columns.values())])
    return markdown_table(["metric, %", *columns], rows)


def class_table(classes: Sequence[str], ap: np.ndarray, y: np.ndarray) -> str:
    """A Markdown table of per-class AP, best first, with the number of test positives."""
    order = np.argsort(-np.nan_to_num(ap, nan=-1), kind="stable")
    rows = [[classes[c], f"{ap[c]:.2f}", str((y[:, c] == 1).sum())] for c in order]
    return markdown_table(["class", "AP, %", "positives"], rows)


def report_test(data: Data, metrics: dict, logits: np.ndarray, args: Namespace) -> None:
    """Print the metrics and the AP of every class; predictions.npz goes beside the checkpoint."""
    print(metrics_table({"test": metrics}))
    print(class_table(data.classes, metrics["ap"], data.test.y))
    path = Path(args.resume).parent / "predictions.npz"
    if rank():
        return
    np.savez(path, ids=np.array(data.test.ids), logits=logits, labels=data.test.y)
    print(f"ids, logits and labels: {path}")


@torch.no_grad()
def predict(score: Callable, args: Namespace, classes: list[str], device: torch.device) -> None:
    """Print the five most probable labels of each image of --predict, and draw them below it.

    score: images -> logits. The pictures go to --out or here, as NAME-labels.png.
    """
    drawn = set()
    for path in args.predict:
        image, name = open_image(path), Path(path).stem
        while name in drawn:  # of another folder
            name += "+"
        drawn.add(name)
        p = torch.sigmoid(score(test_transform(args.size)(image)[None].to(device)))[0]
        top = [(classes[c], f"{p[c]:.3f}") for c in p.argsort(descending=True)[:5].tolist()]
        picture = Path(args.out or ".") / f"{name}-labels.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet([(image, [(f"{label} {value}", "black") for label, value in top])], 1, picture)
        print(path, markdown_table(["label", "probability"], top), f"-> {picture}", sep="\n")
