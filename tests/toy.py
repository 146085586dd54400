# SPDX-License-Identifier: MIT
"""The toy world: drawn scenes of 16 everyday things in four contexts, and two networks for it.

    python tests/toy.py          makes toy_trunk.pt and toy_clip/ beside this file anew

The scenes are made in memory, 3,000 in about a second, the same on every machine. The networks are
files of the project: a trunk that names the one object of small photos, as ImageNet's do, and a
CLIP that learned from captions. None of the scenes that they learned from is in the data set.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

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


def load(limit: int | None = None) -> tuple:
    """The classes; images and labels of 2,000 training scenes and 1,000 test scenes, or the first
    `limit` of each."""
    splits = (scenes(n, seed)[:2] for seed, n in enumerate((2000, 1000)))
    return CLASSES, *((images[:limit], y[:limit]) for images, y in splits)


# ------------------------------------------------------------------------------------ the networks


class Trunk(nn.Module):
    """Five convolutions, `features`, stride 8: (B, 3, 64, 64) -> (B, 96, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        for i, o, stride in ((3, 24, 2), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1)):
            conv = nn.Conv2d(i, o, 3, stride, padding=1, bias=False)
            relu = nn.ReLU(inplace=True)
            self.features.append(nn.Sequential(conv, nn.BatchNorm2d(o), relu))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


def fit(net: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float) -> nn.Module:
    """Minimise loss() over the parameters of net; returns net."""
    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in tqdm(range(steps), mininterval=10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def halves(net: nn.Module) -> dict[str, Tensor]:
    state = net.state_dict().items()
    return {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state}


def make_trunk(path: Path) -> None:
    """What ImageNet is to a real trunk: name the one object of 6,000 photos, 32 x 32."""
    rng = np.random.default_rng(2)
    n = 6000
    target = torch.tensor(rng.integers(len(CLASSES), size=n))
    photos = [draw_scene([CLASSES[c]], rng.choice(list(CONTEXTS)), 32, rng) for c in target]
    images = common.normalise(torch.tensor(np.stack(photos)).permute(0, 3, 1, 2))
    net = nn.Sequential(Trunk(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 16))

    def loss() -> Tensor:
        k = torch.randint(n, (64,))
        return nn.functional.cross_entropy(net(images[k]), target[k])

    torch.save(halves(fit(net, loss, steps=190, lr=5e-3)[0]), path)


CLIP = dict(  # a CLIP ResNet with 4 x 4 positions
    embed_dim=128,
    quick_gelu=True,
    vision_cfg=dict(layers=[1, 2, 2, 1], width=16, image_size=128),
    text_cfg=dict(context_length=16, vocab_size=49408, width=96, heads=2, layers=2),
)
TRUNK = str(Path(__file__).resolve().parent / "toy_trunk.pt")
PHOTO = "a photo of a {}"
REGION = "the region showing a {}"


def write_captions(said: np.ndarray, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """For each row of said (2, B, C), what could be said of photo and region, a caption of one or
    two things: 2B texts, and (B, 2B), which text is right for which scene (the targets of UniCL,
    CVPR 2022)."""
    text, right = [], []
    for prompt, labels in zip((PHOTO, REGION), said, strict=True):
        chosen = np.zeros_like(labels)
        for row, there in zip(chosen, labels, strict=True):
            row[rng.permutation(np.flatnonzero(there))[: rng.integers(1, 3)]] = True
            words = " and a ".join(CLASSES[c] for c in np.flatnonzero(row))
            text.append(prompt.format(words))
        right.append((labels[:, None] >= chosen).all(-1))  # (B, B)
    return text, np.concatenate(right, axis=1)


def make_clip(folder: Path, steps: int = 4000, number: int = 20_000, batch: int = 64) -> None:
    """What OpenAI's CLIP is to real photographs: learns from captions of scenes in no data set.

    Who captions a photo misses some things and assumes others that go with the context, so that
    CLIP's ranking is mediocre; who captions a region says what is there. A photo's caption meets
    the image feature, a region's the best of the local ones.
    """
    rng = np.random.default_rng(4)
    images, y, contexts = scenes(number, seed=3)
    shown = y == 1
    home = np.repeat(np.arange(4), 4) == contexts[:, None]
    chance = np.where(shown, 0.7, 0.7 * home)
    said = np.stack((rng.random(y.shape) < chance, shown))  # (2, images, C): of photo, of region
    rows = np.flatnonzero(said.any(2).all(0))
    net = open_clip.model.CLIP(**CLIP).to(memory_format=torch.channels_last)
    net.token_embedding.requires_grad_(False)  # 49,408 random words, of which captions use 30
    tokenize = open_clip.SimpleTokenizer(context_length=CLIP["text_cfg"]["context_length"])
    net.visual.preprocess_cfg = dict(mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD)
    size = CLIP["vision_cfg"]["image_size"]

    def loss() -> Tensor:
        k = rng.choice(rows, batch)
        text, right = write_captions(said[:, k], rng)
        x = torch.tensor(images[k]).permute(0, 3, 1, 2)
        x = v2.functional.resize(x, [size, size], v2.InterpolationMode.BICUBIC)
        f, u = common.clip_features(net.visual, x)
        t = net.encode_text(tokenize(text), normalize=True)
        local = torch.einsum("bnd,td->btn", u, t[batch:]).amax(-1)
        logits = net.logit_scale.exp() * torch.cat((f @ t[:batch].T, local), dim=1)
        target = torch.tensor(right).float()
        pairs = (logits, target), (logits.T, target.T)
        return sum(nn.functional.cross_entropy(x, r / r.sum(1, True)) for x, r in pairs) / 2

    save_clip(folder, fit(net, loss, steps, lr=1e-3), tokenize)


def save_clip(folder: Path, net: nn.Module, tokenize: Callable) -> None:
    """A folder that open_clip loads. Words of no prompt are 0, which git packs to nothing."""
    state = halves(net)
    names = [" and a ".join(CLASSES[k : k + 2]) for k in range(0, 16, 2)]
    used = tokenize([prompt.format(name) for prompt in (PHOTO, REGION) for name in names])
    unused = torch.ones(len(state["token_embedding.weight"]), dtype=torch.bool)
    unused[used] = False
    state["token_embedding.weight"][unused] = 0
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "open_clip_model.safetensors")
    preprocess = net.visual.preprocess_cfg | dict(interpolation="bicubic", resize_mode="squash")
    config = json.dumps(dict(model_cfg=CLIP, preprocess_cfg=preprocess), indent=1)
    (folder / "open_clip_config.json").write_text(config + "\n")


def linear_probe(f: np.ndarray, y: np.ndarray, x: np.ndarray, c: float) -> np.ndarray:
    """Logits (m, C) of x (m, D) by logistic regressions, one a class, each fitted to its known
    entries of f (n, D) and y (n, C); -1e4 for a class of which they do not show both values."""
    logits = np.full((len(x), y.shape[1]), -1e4)
    for k, labels in enumerate(y.T):
        known = labels != 0
        if len({*labels[known]}) == 2:
            fitted = LogisticRegression(C=c, max_iter=1000).fit(f[known], labels[known])
            logits[:, k] = fitted.decision_function(x)
    return logits


@torch.no_grad()
def report(arch: str) -> None:
    """Print the test mAP of a CLIP's own ranking, and of linear probes on its image feature."""
    size = CLIP["vision_cfg"]["image_size"]
    net, tokenize = common.load_clip(arch, "default", size)
    t = net.encode_text(common.prompt_tokens(tokenize, PHOTO, CLASSES), normalize=True)
    (x, y), (x_test, y_test) = load()[1:]

    def features(images: np.ndarray) -> Tensor:
        data = common.ImageDataset(images, np.zeros(len(images)), common.make_transform(size))
        batches = DataLoader(data, batch_size=100)
        return torch.cat([common.clip_features(net.visual, x)[0] for x, *_ in batches])

    f = features(x)
    f_test = features(x_test)
    scores = {"zero-shot": (f_test @ t.T).numpy()}
    for known in (1, 0.1):
        labels = common.hide_entries(y, known, 0)
        probe = linear_probe(f.numpy(), labels, f_test.numpy(), 100)
        scores[f"linear probe, {known:.0%} known"] = probe
    for name, score in scores.items():
        print(f"{name}: mAP {common.average_precision(score, y_test).mean():.1f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    here = Path(__file__).resolve().parent
    make_trunk(here / "toy_trunk.pt")
    make_clip(here / "toy_clip")
    report(f"local-dir:{here / 'toy_clip'}")
