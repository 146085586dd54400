# SPDX-License-Identifier: MIT
"""The toy world: drawn scenes of 16 everyday things in four contexts, and a trunk that knows them.

The scenes are made in memory, 3,000 in about a second, the same on every machine. `networks.py`
beside this file made the trunk and the CLIP of the toy world.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

HERE = Path(__file__).resolve().parent

# A context: the colours of its sky and ground, its classes and the chance that a scene shows them.
CONTEXTS = {
    "street": ("99b9e1 6e6e73", {"person": 0.8, "car": 0.7, "traffic light": 0.55, "bus": 0.4}),
    "sea": ("96d2f5 2869b4", {"sun": 0.8, "boat": 0.7, "fish": 0.55, "umbrella": 0.4}),
    "farm": ("a5d7fa 6ea546", {"tree": 0.8, "cow": 0.7, "barn": 0.55, "tractor": 0.4}),
    "night": ("14193c 1e3228", {"moon": 0.8, "tent": 0.7, "fire": 0.55, "owl": 0.4}),
}
CLASSES = [name for _, shown in CONTEXTS.values() for name in shown]
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
    draw = ImageDraw.Draw(image)
    horizon = rng.uniform(0.4, 0.7) * full
    draw.rectangle((0, horizon, full, full), ground)
    clutter = rng.choice(["ball", "block", "cone"], rng.poisson(CLUTTER * (size / 64) ** 2))
    for name in (*clutter, *rng.permutation(names)):
        height = 2 * rng.uniform(*OBJECT_SIZE) if name in CLASSES else rng.uniform(6, 28)
        low = horizon - height
        high = full - 0.9 * height
        if name in ("sun", "moon", *clutter):
            low = 0
            high = 0.35 * full if name in CLASSES else full
        width = height * rng.uniform(0.8, 1.25)
        place = rng.uniform(-0.1 * width, full - 0.9 * width), rng.uniform(low, high)
        draw_object(draw, str(name), (*place, width, height), rng)
    noise = NOISE * rng.standard_normal((size, size, 3))
    return np.clip(np.asarray(image.reduce(2)) + noise, 0, 255).astype(np.uint8)


def scenes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns images (n, 64, 64, 3) uint8, y (n, C) int8 in {1, -1}, contexts (n,) in 0..3."""
    rng = np.random.default_rng(seed)
    contexts, random = rng.integers(len(CONTEXTS), size=(2, n))
    backgrounds = np.where(rng.random(n) < MISLEADING, random, contexts)
    chance = np.full((len(CONTEXTS), len(CLASSES)), ELSEWHERE)
    for k, (_, shown) in enumerate(CONTEXTS.values()):
        chance[k, 4 * k : 4 * k + 4] = list(shown.values())
    y = np.where(rng.random((n, len(CLASSES))) < chance[contexts], 1, -1).astype(np.int8)
    names = [[CLASSES[c] for c in np.flatnonzero(row == 1)] for row in y]
    drawn = zip(names, [list(CONTEXTS)[k] for k in backgrounds], strict=True)
    return np.stack([draw_scene(shown, k, 64, rng) for shown, k in drawn]), y, contexts


def load(part: str) -> tuple:
    """The classes; images and labels of the 2,000 "train" or the 1,000 "test" scenes."""
    images, y, _ = scenes(*dict(train=(2000, 0), test=(1000, 1))[part])
    return CLASSES, images, y


# --------------------------------------------------------------------------------------- the trunk


class Trunk(nn.Module):
    """Five convolutions, stride 8: (B, 3, 64, 64) -> (B, 96, 8, 8). Its stages are called, and end
    in two that are left out, as those of torchvision's ResNets."""

    def __init__(self) -> None:
        super().__init__()
        stem = convolution(3, 24, 2), convolution(24, 48, 2), convolution(48, 48, 1)
        self.stem = nn.Sequential(*stem)
        self.layer4 = nn.Sequential(convolution(48, 96, 2), convolution(96, 96, 1))
        self.avgpool = nn.Identity()
        self.fc = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer4(self.stem(x))


def convolution(i: int, o: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(i, o, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU(inplace=True))


def load_trunk() -> Trunk:
    """The trunk, as `networks.py` made it."""
    net = Trunk()
    net.load_state_dict(torch.load(HERE / "trunk.pt", weights_only=True))
    return net
