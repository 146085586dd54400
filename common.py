# SPDX-License-Identifier: MIT
"""What the three scripts share: labels and their hiding, data sets, loading, metrics, and reports.

Labels, everywhere: an int8 array y (images, C); +1 known present, 0 unknown, -1 known absent.
Letters, everywhere: B images of a batch, C classes, D feature width, N positions of the feature
map. Bad input raises `InputError`, whose text is one line that says what is wrong and what to do;
`run_script` prints it and exits with status 2.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import platform
import resource
import sys
import time
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import precision_recall_curve
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm


class InputError(ValueError):
    """Something the user gave is wrong; the text is one line that names it and says what to do."""


def refuse(message: str) -> None:
    """argparse's `error` method: one line, no usage."""
    raise InputError(f"{message}; --help lists the arguments")


def run_script(main: Callable[[], None]) -> None:
    """Call `main`; an InputError becomes one line on stderr and exit status 2."""
    try:
        main()
    except InputError as error:
        # from a loader's worker the text comes wrapped in a traceback; its last line is the message
        message = str(error).strip().splitlines()[-1].split("InputError: ")[-1]
        print("error:", message, file=sys.stderr)
        sys.exit(2)


def progress(items: Iterable, name: str) -> tqdm:
    """A progress bar, silent when stdout is no terminal."""
    return tqdm(items, name, leave=False, disable=not sys.stdout.isatty())


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

    def first(self, limit: int | None) -> Split:
        return Split(self.images[:limit], self.y[:limit], self.ids[:limit])


@dataclass
class Data:
    classes: list[str]
    train: Split
    test: Split


def load_data(name: str, root: str | None, limit: int | None = None) -> Data:
    """Load a data set; `limit` keeps the first images of each split. InputError on bad files."""
    if name not in DATASETS:
        raise InputError(f"--data {name} is unknown; choose from {', '.join(DATASETS)}")
    if name == "toy":
        data = load_toy()
    elif root is None or not Path(root).is_dir():
        raise InputError(f"--root {root} is no folder; --data {name} {DATASETS[name].__doc__}")
    else:
        data = DATASETS[name](Path(root))
    data = Data(data.classes, data.train.first(limit), data.test.first(limit))
    for part, split in (("train", data.train), ("test", data.test)):
        split.y = check_labels(split.y, len(data.classes), f"{name} {part}")
        if not len(split.y):
            raise InputError(f"{name} {part} in {root} has no image")
        if name != "toy":
            check_images(split.images)
    return data


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


def load_coco(root: Path) -> Data:
    """needs annotations/instances_{train,val}2014.json, train2014/*.jpg and val2014/*.jpg there"""

    def split(part: str) -> tuple[list[str], Split]:
        path = root / "annotations" / f"instances_{part}.json"
        try:
            spec = json.loads(path.read_text(encoding="utf-8"))
            names = {c["id"]: c["name"] for c in sorted(spec["categories"], key=lambda c: c["id"])}
            column = {category: c for c, category in enumerate(names)}
            row = {image["id"]: i for i, image in enumerate(spec["images"])}
            y = -np.ones((len(row), len(names)), dtype=np.int8)
            for a in spec["annotations"]:  # crowds too; an image without annotation has no label
                y[row[a["image_id"]], column[a["category_id"]]] = 1
            files = [image["file_name"] for image in spec["images"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise InputError(f"{path} is not COCO's json ({why}); fetch it again") from None
        return list(names.values()), Split([str(root / part / f) for f in files], y, files)

    (classes, train), (test_classes, test) = split("train2014"), split("val2014")
    if classes != test_classes:
        raise InputError(f"{root}/annotations: train2014 and val2014 have other categories")
    return Data(classes, train, test)


VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()


def load_voc2007(root: Path) -> Data:
    """needs VOCdevkit/VOC2007/{Annotations,ImageSets/Main,JPEGImages} there"""
    base = root / "VOCdevkit" / "VOC2007"

    def split(part: str) -> Split:
        path = base / "ImageSets" / "Main" / f"{part}.txt"
        try:
            ids = path.read_text().split()
            y = -np.ones((len(ids), len(VOC_CLASSES)), dtype=np.int8)
            for i, name in enumerate(ids):
                path = base / "Annotations" / f"{name}.xml"
                for item in ElementTree.parse(path).iter("object"):
                    if item.findtext("difficult", "0").strip() != "1":  # difficult: absent
                        y[i, VOC_CLASSES.index(item.findtext("name", "").strip())] = 1
        except (OSError, ValueError, ElementTree.ParseError) as error:
            why = f"{type(error).__name__}: {error}"
            raise InputError(f"{path} cannot be read ({why}); fetch VOC again") from None
        return Split([str(base / "JPEGImages" / f"{name}.jpg") for name in ids], y, ids)

    return Data(VOC_CLASSES, split("trainval"), split("test"))


# ----------------------------------------------------------------------------------- the toy world

# A context and the chance that its classes show in a scene of it; other classes show rarely.
CONTEXTS = {
    "street": {"person": 0.8, "car": 0.7, "traffic light": 0.55, "bus": 0.4},
    "sea": {"sun": 0.8, "boat": 0.7, "fish": 0.55, "umbrella": 0.4},
    "farm": {"tree": 0.8, "cow": 0.7, "barn": 0.55, "tractor": 0.4},
    "night": {"moon": 0.8, "tent": 0.7, "fire": 0.55, "owl": 0.4},
}
OUT_OF_CONTEXT = 0.04
MISLEADING = 0.2  # proportion of scenes whose background is drawn at random
NOISE = 14  # standard deviation, of 255
SKY_AND_GROUND = {
    "street": ((150, 185, 225), (110, 110, 115)),
    "sea": ((150, 210, 245), (40, 105, 180)),
    "farm": ((165, 215, 250), (110, 165, 70)),
    "night": ((20, 25, 60), (30, 50, 40)),
}
# Primitives: E ellipse, R rectangle, P polygon, L line, M moon; points in percent of the object's
# box; a colour, of which a and b are drawn anew for every object.
DRAWINGS = {
    "person": "E 36 0 64 28 s; R 36 28 64 65 a; R 37 65 48 100 b; R 52 65 63 100 b; "
    "L 36 32 20 60 s; L 64 32 80 60 s",
    "car": "P 18 50 32 25 70 25 84 50 a; R 2 48 98 76 a; P 34 48 40 32 66 32 74 48 c; "
    "E 14 62 38 90 k; E 64 62 88 90 k",
    "traffic light": "R 46 60 54 100 k; R 30 0 70 64 k; E 40 4 60 22 r; E 40 24 60 42 y; "
    "E 40 44 60 62 g",
    "bus": "R 0 15 100 80 a; R 8 25 28 45 c; R 32 25 52 45 c; R 56 25 76 45 c; R 80 25 96 62 c; "
    "E 12 68 34 94 k; E 66 68 88 94 k",
    "sun": "L 50 0 50 100 y; L 0 50 100 50 y; L 14 14 86 86 y; L 14 86 86 14 y; E 22 22 78 78 y",
    "boat": "P 0 65 100 65 80 95 20 95 a; L 48 5 48 65 n; P 52 8 52 58 92 58 w",
    "fish": "E 0 25 75 75 a; P 65 50 100 20 100 80 a; E 14 38 24 50 w",
    "umbrella": "P 0 50 10 25 30 8 50 3 70 8 90 25 100 50 a; P 35 50 42 15 50 3 58 15 65 50 b; "
    "L 50 50 50 100 n",
    "tree": "R 42 60 58 100 n; E 10 0 90 45 e; E 0 25 60 70 e; E 40 25 100 70 e",
    "cow": "R 15 25 80 65 w; E 25 28 45 52 k; E 55 38 72 60 k; R 18 65 28 95 w; R 66 65 76 95 w; "
    "E 74 8 100 42 w; E 82 28 100 44 s",
    "barn": "R 8 45 92 100 r; P 0 48 50 5 100 48 n; R 36 62 64 100 w; L 36 62 64 100 r; "
    "L 64 62 36 100 r",
    "tractor": "R 35 35 95 65 a; R 40 5 70 38 a; R 45 12 64 32 c; E 0 40 52 95 k; "
    "E 14 55 38 80 y; E 66 60 98 95 k; R 84 15 90 36 k",
    "moon": "M 5 5 95 95 w",
    "tent": "P 0 90 50 8 100 90 a; P 35 90 50 35 65 90 k; L 50 8 58 0 n",
    "fire": "P 15 80 25 35 40 50 50 0 62 48 78 30 86 80 o; P 32 80 42 50 50 30 60 52 68 80 y; "
    "L 5 95 95 80 n; L 5 80 95 95 n",
    "owl": "E 15 10 85 100 n; P 18 25 22 0 40 14 n; P 82 25 78 0 60 14 n; E 22 18 50 48 w; "
    "E 50 18 78 48 w; E 32 28 42 40 k; E 58 28 68 40 k; P 45 45 55 45 50 58 o",
}
COLOURS = dict(
    k=(25, 25, 30), w=(245, 245, 245), y=(250, 205, 60), r=(215, 45, 40), g=(60, 180, 75),
    n=(120, 75, 40), o=(245, 130, 40), s=(240, 195, 160), e=(45, 120, 50), c=(150, 205, 235),
)  # fmt: skip
TOY_CLASSES = [name for shown in CONTEXTS.values() for name in shown]
TOY_SIZE = 64  # pixels
CLUTTER = 3.0  # plain shapes a scene has on average
OBJECT_SIZE = (12, 22)  # height in pixels


def draw_object(
    draw: ImageDraw.ImageDraw, name: str, box: Sequence[float], rng: np.random.Generator
) -> None:
    """Draw one object into box = (left, top, width, height), in pixels, colours jittered."""
    left, top, width, height = box
    shift = rng.integers(-35, 36, 3)
    mirrored = rng.random() < 0.5
    colours = COLOURS | {"a": tuple(rng.integers(0, 256, 3)), "b": tuple(rng.integers(0, 256, 3))}
    line_width = max(1, round(width / 14))
    for primitive in DRAWINGS[name].split("; "):
        kind, *numbers, key = primitive.split()
        colour = tuple(np.clip(colours[key] + shift, 0, 255).tolist())
        x, y = np.array(numbers, float).reshape(-1, 2).T / 100
        x = left + width * (1 - x if mirrored else x)
        y = top + height * y
        box, points = (x.min(), y.min(), x.max(), y.max()), list(zip(x, y, strict=True))
        if kind == "P":
            draw.polygon(points, colour)
        elif kind == "L":
            draw.line(points, colour, line_width)
        elif kind == "M":
            draw.chord(box, 60, 300, colour)
        else:
            (draw.ellipse if kind == "E" else draw.rectangle)(box, colour)


def draw_scene(
    names: Sequence[str], context: str, rng: np.random.Generator, size: int = TOY_SIZE
) -> Image.Image:
    """Sky, ground, clutter of plain shapes, the named objects; at twice the size, then halved."""
    size = 2 * size
    sky, ground = (
        tuple(int(v) for v in np.clip(rng.normal(c, 20), 0, 255)) for c in SKY_AND_GROUND[context]
    )
    image = Image.new("RGB", (size, size), sky)
    draw = ImageDraw.Draw(image)
    horizon = rng.uniform(0.4, 0.7) * size
    draw.rectangle((0, horizon, size, size), ground)
    for _ in range(rng.poisson(CLUTTER * (size / 2 / TOY_SIZE) ** 2)):
        x, y, w, h = rng.uniform((0, 0, 6, 6), (size, size, 28, 28))
        fill = tuple(rng.integers(0, 256, 3))
        corners = (x, y, x + w, y + h)
        if rng.random() < 0.4:
            draw.ellipse(corners, fill)
        elif rng.random() < 0.5:
            draw.rectangle(corners, fill)
        else:
            draw.polygon(((x, y + h), (x + w, y + h), (x + w / 2, y)), fill)
    for name in rng.permutation(names):
        height = 2 * rng.uniform(*OBJECT_SIZE)
        width = height * rng.uniform(0.8, 1.25)
        low, high = (
            (0, 0.35 * size) if name in ("sun", "moon") else (horizon - height, size - 0.9 * height)
        )
        box = (rng.uniform(-0.1 * width, size - 0.9 * width), rng.uniform(low, high), width, height)
        draw_object(draw, str(name), box, rng)
    return image.reduce(2)


def toy_scenes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns images (n, 64, 64, 3) uint8, y (n, C) int8 in {1, -1}, contexts (n,) in 0..3."""
    rng = np.random.default_rng(seed)
    contexts = rng.integers(len(CONTEXTS), size=n)
    backgrounds = np.where(
        rng.random(n) < MISLEADING, rng.integers(len(CONTEXTS), size=n), contexts
    )
    home = np.array([[name in shown for name in TOY_CLASSES] for shown in CONTEXTS.values()])
    chance = np.array([p for shown in CONTEXTS.values() for p in shown.values()])
    y = np.where(
        rng.random((n, len(TOY_CLASSES))) < np.where(home[contexts], chance, OUT_OF_CONTEXT), 1, -1
    )
    images = np.empty((n, TOY_SIZE, TOY_SIZE, 3), dtype=np.uint8)
    for i in range(n):
        names = [TOY_CLASSES[c] for c in np.flatnonzero(y[i] == 1)]
        images[i] = draw_scene(names, list(CONTEXTS)[backgrounds[i]], rng)
    noise = rng.standard_normal(images.shape, dtype=np.float32) * NOISE
    return np.clip(images + noise, 0, 255).astype(np.uint8), y.astype(np.int8), contexts


def load_toy() -> Data:
    """is made in memory: 2,000 train and 1,000 test scenes"""
    splits = []
    for n, seed in ((2000, 0), (1000, 1)):
        images, y, _ = toy_scenes(n, seed)
        splits.append(Split(images, y, [f"toy-{seed}-{i}" for i in range(n)]))
    return Data(TOY_CLASSES, *splits)


def cache_file(name: str, *recipe: object) -> Path:
    """Path in the user's cache; its name holds a hash of values and of functions' source."""
    text = "".join(inspect.getsource(r) if callable(r) else repr(r) for r in recipe)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weak-multilabel"
    base.mkdir(parents=True, exist_ok=True)
    return base / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.pth"


def toy_layers() -> nn.Sequential:
    """Five convolutions, stride 8: (B, 3, 64, 64) -> (B, 96, 8, 8)."""

    def conv(i: int, o: int, stride: int) -> nn.Sequential:
        layer = nn.Conv2d(i, o, 3, stride, padding=1, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(o), nn.ReLU(inplace=True))

    return nn.Sequential(
        conv(3, 24, 2), conv(24, 48, 2), conv(48, 48, 1), conv(48, 96, 2), conv(96, 96, 1)
    )


def pretrain_toy_layers(layers: nn.Sequential, photos: int = 6000, epochs: int = 2) -> None:
    """What ImageNet is to a real trunk: name the one object of photos that are in no data set."""
    rng, generator = np.random.default_rng(2), torch.Generator().manual_seed(0)
    target = rng.integers(len(TOY_CLASSES), size=photos)
    context = [list(CONTEXTS)[k] for k in rng.integers(len(CONTEXTS), size=photos)]
    drawn = [
        np.asarray(draw_scene([TOY_CLASSES[c]], k, rng, size=32))
        for c, k in zip(target, context, strict=True)
    ]
    noisy = np.stack(drawn) + NOISE * rng.standard_normal((photos, 32, 32, 3))
    images = torch.tensor(np.clip(noisy, 0, 255).astype(np.uint8)).permute(0, 3, 1, 2)
    images, target = normalise(images), torch.tensor(target)
    head = nn.Linear(96, len(TOY_CLASSES))
    optimizer = torch.optim.AdamW([*layers.parameters(), *head.parameters()], weight_decay=0.01)
    order = [torch.randperm(photos, generator=generator).split(64) for _ in range(epochs)]
    batches = [index for split in order for index in split if len(index) == 64]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=len(batches))
    for index in progress(batches, "pretraining the toy trunk, once"):
        logits = head(layers(images[index]).mean((2, 3)))
        loss = nn.functional.cross_entropy(logits, target[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def toy_trunk(weights: str) -> nn.Sequential:
    """The toy world's trunk; weights "default" (pretrained once, cached), "none" or PATH."""
    layers = toy_layers()
    if weights == "default":
        world = (CONTEXTS, SKY_AND_GROUND, DRAWINGS, COLOURS, CLUTTER, OBJECT_SIZE, NOISE)
        path = cache_file(
            "toy-trunk", world, draw_scene, draw_object, toy_layers, pretrain_toy_layers
        )
        if not path.exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                layers = toy_layers()
                pretrain_toy_layers(layers)
            save_checkpoint(path, layers.state_dict())
        weights = str(path)
    return layers if weights == "none" else load_weights(layers, weights)


DATASETS = {"toy": load_toy, "coco": load_coco, "voc2007": load_voc2007}


# ----------------------------------------------------------------------------------------- loading


def load_weights(net: nn.Module, path: str) -> nn.Module:
    """Load a state dict into `net` and return it; InputError when the file is none or misfits."""
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a file of any content comes here
        why = " ".join(str(error).split())[:200]
        raise InputError(f"--weights {path} does not fit: {type(error).__name__}: {why}") from None
    return net


def torchvision_trunk(arch: str, weights: str) -> nn.Sequential:
    """A torchvision classifier less its head; weights "default" (ImageNet V1), "none" or PATH."""
    try:
        pretrained = "IMAGENET1K_V1" if weights == "default" else None
        net = torchvision.models.get_model(arch, weights=pretrained)
    except OSError as error:
        raise InputError(f"--weights of {arch} cannot be fetched ({error}); give a file") from None
    except ValueError:
        raise InputError(f"--arch {arch} is unknown; try resnet101 or mobilenet_v2") from None
    if weights not in ("default", "none"):
        load_weights(net, weights)
    if hasattr(net, "layer4"):
        return nn.Sequential(*list(net.children())[:-2])
    if not hasattr(net, "features"):
        raise InputError(f"--arch {arch} has no spatial trunk; try resnet101 or mobilenet_v2")
    return net.features


def read_glove(path: str, classes: list[str]) -> Tensor:
    """Word vectors (C, 300) of a GloVe text file: the mean over the words of each class name."""
    wanted, found = {word for name in classes for word in name.lower().split()}, {}
    try:
        with open(path, encoding="utf-8") as file:
            for word, *numbers in (line.rstrip().split(" ") for line in file):
                if word in wanted and len(numbers) == 300:
                    found[word] = torch.tensor([float(n) for n in numbers])
    except (OSError, ValueError) as error:
        raise InputError(f"--glove {path}: {error}") from None
    if missing := sorted(wanted - set(found)):
        raise InputError(f"--glove {path} has no 300-d vector for: {', '.join(missing)}")
    return torch.stack(
        [torch.stack([found[w] for w in n.lower().split()]).mean(0) for n in classes]
    )


def open_image(item: str | np.ndarray) -> Image.Image:
    """An RGB image from a file of any mode, or from a uint8 array; InputError when unreadable."""
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    try:
        with Image.open(item) as image:
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
    """Items (image, y (C,), index) by key (epoch, index).

    The augmentation hangs on seed, epoch and index alone: any number of workers gives the same
    batches, and a resumed run draws what the uninterrupted one drew.
    """

    def __init__(
        self, images: Sequence[str] | np.ndarray, y: np.ndarray, transform: v2.Transform, seed: int
    ) -> None:
        self.images, self.y, self.transform = images, torch.as_tensor(y), transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        epoch, i = key
        image = open_image(self.images[i])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, epoch, i)) % 2**31)
            return self.transform(image), self.y[i], i


class EpochSampler(Sampler):
    """Keys (epoch, index): shuffled by (seed, epoch), in order without a seed. Set `.epoch`."""

    def __init__(self, n: int, seed: int | None = None) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.n)
        if self.seed is not None:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n)
        return iter([(self.epoch, i) for i in order.tolist()])


def make_loaders(data: Data, y: np.ndarray, args: Namespace, device: torch.device) -> list:
    """Loaders of (uint8 images, labels, indices): train with labels y, shuffled, and test."""
    shared = dict(batch_size=args.batch_size, num_workers=args.workers)
    shared |= dict(persistent_workers=args.workers > 0, pin_memory=device.type == "cuda")
    train = ImageDataset(data.train.images, y, train_transform(args.size, args.crops), args.seed)
    test = ImageDataset(data.test.images, data.test.y, test_transform(args.size), args.seed)
    shuffled, in_order = EpochSampler(len(y), args.seed), EpochSampler(len(data.test.y))
    whole = len(y) >= args.batch_size  # batch statistics want whole batches
    return [
        DataLoader(train, sampler=shuffled, drop_last=whole, **shared),
        DataLoader(test, sampler=in_order, **shared),
    ]


# ----------------------------------------------------------------------------------------- metrics


def multilabel_metrics(logits: np.ndarray, y: np.ndarray) -> dict:
    """Metrics in percent of float logits (images, C) for y (images, C) in {1, -1}, else ValueError.

    `mAP`: non-interpolated, sklearn's average_precision_score. `mAP_interp`: VOC2010's all-point
    interpolation. Both leave out classes without a positive: `empty_classes` of them, NaN in `ap`
    (C,). OP OR OF1 CP CR CF1 at p >= 0.5; with `_top3` for the 3 highest scores of an image.
    """
    logits, y = np.asarray(logits, np.float32), np.asarray(y)
    if logits.shape != y.shape or not np.isin(y, (1, -1)).all() or not np.isfinite(logits).all():
        raise ValueError(f"finite logits {logits.shape} and y {y.shape} in {{1, -1}} wanted")
    truth = y == 1
    shown = truth.any(0)
    ap, interpolated = np.full((2, y.shape[1]), np.nan)
    for c in np.flatnonzero(shown):
        precision, recall, _ = precision_recall_curve(truth[:, c], logits[:, c])
        width = -100 * np.diff(recall)
        ap[c] = np.sum(width * precision[:-1])
        interpolated[c] = np.sum(width * np.maximum.accumulate(precision[:-1]))
    top3 = np.zeros_like(truth)
    np.put_along_axis(top3, np.argsort(-logits, axis=1, kind="stable")[:, :3], True, axis=1)
    mean = [float(v[shown].mean()) if shown.any() else math.nan for v in (ap, interpolated)]
    result = dict(zip(("mAP", "mAP_interp"), mean, strict=True))
    for suffix, said in (("", logits >= 0), ("_top3", top3)):
        right, said, there = ((m.sum(0)[shown]) for m in (said & truth, said, truth))
        overall = right.sum() / max(said.sum(), 1), right.sum() / max(there.sum(), 1)
        by_class = [(right / np.maximum(v, 1)).sum() / max(len(v), 1) for v in (said, there)]
        for letter, (p, r) in (("O", overall), ("C", by_class)):
            f1 = 2 * p * r / max(p + r, 1e-12)
            for name, value in (("P", p), ("R", r), ("F1", f1)):
                result[letter + name + suffix] = 100 * float(value)
    return result | dict(empty_classes=int((~shown).sum()), ap=ap)


def pseudo_counts(pseudo: Tensor, y: Tensor, truth: Tensor) -> Tensor:
    """(4,): pseudo positives, those right, hidden positives, images. Diagnostic: sees the truth."""
    guess, hidden = (pseudo == 1) & (y == 0), (y == 0) & (truth == 1)
    images = hidden.new_tensor(len(y), dtype=torch.long)
    return torch.stack([guess.sum(), (guess & hidden).sum(), hidden.sum(), images])


def pseudo_quality(counts: dict[str, Tensor]) -> dict:
    """Log entries from summed `pseudo_counts` by name; None where a ratio has no denominator."""
    entry = {}
    for name, values in counts.items():
        guessed, right, hidden, images = values.tolist()
        entry[f"{name}_per_image"] = guessed / images
        entry[f"{name}_precision"] = right / guessed if guessed else None
        entry[f"{name}_recall"] = right / hidden if hidden else None
    return entry


# -------------------------------------------------------------------------------------------- runs


def check_args(args: Namespace) -> Namespace:
    """Checks every script makes of its arguments; returns them."""
    check_known(args.known)
    for name in "size epochs batch_size lr limit stop_after".split():
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be above 0")
    if args.workers < 0:
        raise InputError(f"--workers {args.workers} must not be below 0")
    if (args.eval or args.predict) and args.resume in (None, "auto"):
        raise InputError("--eval and --predict need --resume PATH, the last.pt of a run")
    if args.resume == "auto" and not args.out:
        raise InputError("--resume auto needs --out, the folder of the run to continue")
    if args.dry_run:
        args.limit, args.epochs = 2 * args.batch_size, 1
    return args


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used ({why}); try cpu") from None


def save_checkpoint(path: Path, state: dict) -> None:
    """Write under a temporary name, fsync, rename: whatever happens, `path` is whole."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(args: Namespace, method: str, model_args: Sequence[str]) -> dict | None:
    """The checkpoint of --resume, None without one. Puts its `model_args` into args, weights none.

    To continue a run they must be equal; --eval and --predict take the checkpoint's.
    """
    path = f"{args.out}/last.pt" if args.resume == "auto" else args.resume
    if path is None or (args.resume == "auto" and not Path(path).exists()):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["method"]
    except Exception as error:  # a file of any content comes here
        why = type(error).__name__
        raise InputError(f"--resume {path} is no readable checkpoint ({why})") from None
    if found != method:
        raise InputError(f"--resume {path} was written by {found}.py; use that")
    for name in model_args:
        old, new = state["args"][name], getattr(args, name)
        if old != new and not (args.eval or args.predict):
            raise InputError(f"--resume {path}: {name} was {old} and is {new} now; give {old}")
        setattr(args, name, old)
    args.weights = "none"
    return state


def check_same_run(state: dict, run: dict, args: Namespace) -> None:
    """Refuse to continue a run with other data, classes or mask; the InputError names both."""
    for name, value in run.items():
        if state[name] != value and not (args.eval and name == "mask"):
            raise InputError(f"--resume: {name} was {state[name]} and is {value} now")


def get_generators() -> dict:
    return dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all())


def set_generators(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class RunLog:
    """The folder OUT of a run: log.jsonl, last.pt, samples.png. A dry run writes nothing.

    log.jsonl begins with {"run": ...} and has one object an epoch, echoed as a line on stdout.
    """

    def __init__(
        self,
        args: Namespace,
        run: dict,
        y: np.ndarray,
        data: Data,
        device: torch.device,
        start: int,  # the first epoch of this process
    ) -> None:
        free = (f"runs/{run['method']}-{run['data']}-{n}" for n in count(1))
        self.out = Path(args.out or next(path for path in free if not Path(path).exists()))
        self.args, self.run, self.data, self.device = args, run, data, device
        if (self.out / "last.pt").exists() and not args.resume:
            raise InputError(f"--out {self.out} holds a run; add --resume auto, or choose another")
        where = "nothing is written" if args.dry_run else f"log in {self.out}"
        known = f"{(y != 0).mean():.2%} of the labels known, mask {run['mask']}"
        sizes = f"{len(y)} train and {len(data.test.y)} test images, {y.shape[1]} classes"
        print(f"{run['method']} on {run['data']}: {sizes}, {known}, {device}, {where}", flush=True)
        if args.dry_run:
            return
        versions = dict(python=platform.python_version(), torch=torch.__version__)
        line = {"command": sys.argv, **versions, "device": str(device), "seed": args.seed}
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            path = self.out / "log.jsonl"
            lines = [json.dumps({"run": run | line | {"args": vars(args)}})]
            if args.resume and path.exists():
                lines = path.read_text().splitlines()[:start]  # drops what the checkpoint lacks
            path.write_text("".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise InputError(f"--out {self.out}: {error.strerror}") from None

    def epoch(self, entry: dict, begin: float, speed: float) -> None:
        """Log an epoch that began at time `begin` and trained `speed` images a second."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        entry |= dict(seconds=time.time() - begin, images_per_second=speed)
        entry |= dict(peak_memory_gb=peak / 2**30)
        if not self.args.dry_run:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
        line = "epoch {epoch:3d}  loss {loss:.4f}  mAP {mAP:.2f}  mAP-interp {mAP_interp:.2f}"
        line += "  OF1 {OF1:.1f}  CF1 {CF1:.1f}  {seconds:.1f} s  {images_per_second:.0f} images/s"
        if entry["pseudo_per_image"]:
            line += "  pseudo {pseudo_per_image:.2f}/image, {pseudo_precision:.0%} right"
        print(line.format(**entry), flush=True)

    def checkpoint(self, state: dict) -> None:
        if not self.args.dry_run:
            state |= self.run | dict(args=vars(self.args), generators=get_generators())
            save_checkpoint(self.out / "last.pt", state)

    def samples(self, logits: np.ndarray | None) -> None:
        """samples.png: test images, their true labels, predictions green if right, red if wrong."""
        if self.args.dry_run or logits is None:
            return
        test, classes, side, font = (
            self.data.test,
            self.data.classes,
            170,
            ImageFont.load_default(11),
        )
        sheet = Image.new("RGB", (6 * (side + 8), 3 * (side + 82)), "white")
        draw = ImageDraw.Draw(sheet)
        for k in range(min(18, len(logits))):
            left, top = k % 6 * (side + 8), k // 6 * (side + 82)
            sheet.paste(open_image(test.images[k]).resize((side, side)), (left, top))
            true = [(classes[c], "black") for c in np.flatnonzero(test.y[k] == 1)]
            said = [c for c in np.argsort(-logits[k]) if logits[k, c] >= 0]
            said = [(classes[c], "green" if test.y[k, c] == 1 else "red") for c in said]
            y = top + side
            for words in ([("true:", "gray"), *true], [("predicted:", "gray"), *said]):
                x = left
                for word, colour in words:
                    if x + draw.textlength(word, font) > left + side:
                        x, y = left, y + 13
                    draw.text((x, y), word, colour, font)
                    x += draw.textlength(word + "  ", font)
                y += 14
        sheet.save(self.out / "samples.png")
        print(f"test images with their labels and predictions: {self.out / 'samples.png'}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]
    cells = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def metrics_table(columns: dict[str, dict]) -> str:
    """A Markdown table of results of `multilabel_metrics`, one column each."""
    first = next(iter(columns.values()))
    keys = [key for key in first if key not in ("ap", "empty_classes")]
    names = {"mAP_interp": "mAP-interp"}
    rows = [[names.get(k, k), *(f"{m[k]:.2f}" for m in columns.values())] for k in keys]
    rows.append(["classes left out", *(str(m["empty_classes"]) for m in columns.values())])
    return markdown_table(["metric, %", *columns], rows)


def class_table(classes: Sequence[str], ap: np.ndarray, y: np.ndarray) -> str:
    """A Markdown table of per-class AP, best first, with the number of test positives."""
    order = np.argsort(-np.nan_to_num(ap, nan=-1), kind="stable")
    rows = [[classes[c], f"{ap[c]:.2f}", str((y[:, c] == 1).sum())] for c in order]
    return markdown_table(["class", "AP, %", "positives"], rows)


@torch.no_grad()
def predict(
    score: Callable[[Tensor], Tensor], args: Namespace, classes: list[str], device: torch.device
) -> None:
    """Print the five most probable labels of each image of --predict; score: images -> logits."""
    images = [test_transform(args.size)(open_image(path)) for path in args.predict]
    for path, p in zip(
        args.predict, torch.sigmoid(score(torch.stack(images).to(device))), strict=True
    ):
        rows = [[classes[c], f"{p[c]:.3f}"] for c in p.argsort(descending=True)[:5].tolist()]
        print(path, markdown_table(["label", "probability"], rows), sep="\n")
