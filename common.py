# SPDX-License-Identifier: MIT
"""What the three scripts share: labels and their hiding, data sets, loading, CLIP, metrics, runs.

Labels, everywhere: an int8 array y (images, C); +1 known present, 0 unknown, -1 known absent.
Letters, everywhere: B images of a batch, C classes, D feature width, N positions of the feature
map. Bad input raises `InputError`, which `run_script` prints as one line.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import os
import platform
import sys
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import open_clip
import torch
from PIL import Image, ImageOps
from sklearn.metrics import precision_recall_curve
from torch import Tensor, distributed, nn
from torch.nn.functional import interpolate, normalize, scaled_dot_product_attention
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.datasets import VOCDetection
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import InterpolationMode, v2
from torchvision.utils import draw_bounding_boxes, save_image
from tqdm import tqdm

TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, PROCESSES = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))


class InputError(ValueError):
    """Something the user gave is wrong; the text is one line that names it and says what to do."""


def refuse(message: str) -> None:  # as argparse's `error` method: one line, no usage
    raise InputError(f"{message}; --help lists the arguments")


def need(condition: object, message: str) -> None:
    if not condition:
        raise InputError(message)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes an InputError that says `what`, and in brackets why."""
    try:
        yield
    except Exception as error:  # files of any content come here
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{what} ({kind}{' '.join(str(error).split())[:200]})") from None


def run_script(main: Callable[[], None]) -> None:
    """Call `main`; what a person can correct becomes one line on stderr and exit status 2, Ctrl-C
    a line and 130. Anything else is a mistake in the code and keeps its traceback."""
    logging.disable(logging.ERROR)  # open_clip warns of each tower without weights
    for words in (dict(module=r"torch\."), dict(message="Sparse")):  # of what torch does inside
        warnings.filterwarnings("ignore", **words)
    try:
        main()
        return distributed.destroy_process_group() if PROCESSES > 1 else None
    except InputError as error:
        # from a loader's worker the text comes wrapped in a traceback; its last line is the message
        status, message = 2, str(error).strip().splitlines()[-1].split("InputError: ")[-1]
    except OSError as error:  # a full disk, a folder that cannot be written
        status, message = 2, f"{error}; correct that and run again"
    except KeyboardInterrupt:
        status, message = 130, "interrupted; --out OUT --resume auto repeats the epoch and goes on"
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def pick_device(name: str) -> torch.device:
    """The device of --device; under torchrun, joins the other processes. Only the first prints."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with naming(f"--device {name} cannot be used; try cpu"):
        if name.startswith("cuda"):
            name = f"cuda:{TORCHRUN.get('LOCAL_RANK', name[5:] or 0)}"
            torch.cuda.set_device(name)
        device = torch.zeros(1, device=name).device
    if PROCESSES > 1:
        distributed.init_process_group(timeout=timedelta(hours=2))  # for downloads
    if RANK:
        sys.stdout = open(os.devnull, "w")
    return device


def parallel(net: nn.Module, device: torch.device, compiled: bool) -> nn.Module:
    """Under torchrun net's DistributedDataParallel, which shares its weights; otherwise net."""
    if compiled:
        net.compile()
    if PROCESSES == 1:
        return net
    if device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return nn.parallel.DistributedDataParallel(net)


# ------------------------------------------------------------------------------------------ labels


def hide_entries(y: np.ndarray, known: float, seed: int) -> np.ndarray:
    """Hide single labels: (i, c) stays iff RandomState(seed).random_sample(y.shape)[i, c] < known.

    y (images, C) in {1, 0, -1}, known in (0, 1] -> new int8 array, hidden entries 0. With seed 0
    and rows in the official order this is the mask the SST authors published (Chen et al., AAAI
    2022); masks of one seed are nested: what 10 % leave known, 50 % leave known.
    """
    keep = np.random.RandomState(seed).random_sample(y.shape) < known
    return np.where(keep, y, 0).astype(np.int8)


def hide_images(y: np.ndarray, known: float, seed: int) -> np.ndarray:
    """As `hide_entries`, all labels of an image; RandomState(seed).permutation(n)[:int(known * n)]
    keep theirs. The semi-supervised protocol; the field's seed is 1."""
    kept = np.random.RandomState(seed).permutation(len(y))[: int(known * len(y))]
    return np.where(np.isin(np.arange(len(y)), kept)[:, None], y, 0).astype(np.int8)


def mask_hash(y: np.ndarray) -> str:
    """First 8 hex digits of the sha256 of which entries of y are known."""
    return hashlib.sha256(np.packbits(y != 0).tobytes()).hexdigest()[:8]


# --------------------------------------------------------------------------------------- data sets


def load_data(name: str, root: str | None, limit: int | None = None, fetch: bool = False) -> tuple:
    """The classes, and (images, y) of the training and of the test split of a data set. images:
    paths, or uint8 (images, height, width, 3); y (images, C) int8. `limit` keeps the first of each
    split, `fetch` downloads before. InputError on bad files; a warning on counts not official."""
    if name == "toy":
        from tests import toy  # only here: the methods need nothing of it

        classes, *splits = toy.load()
        return classes, *((images[:limit], y[:limit]) for images, y in splits)
    need(name in DATASETS, f"--data {name} is unknown; choose from toy, {', '.join(DATASETS)}")
    tree, load, counts, source = DATASETS[name]
    if fetch and RANK == 0:
        download(name, root, source)
    if fetch and PROCESSES > 1:
        distributed.barrier()
    try:
        classes, *parts = load(Path(root or "--root"))
    except Exception as error:  # files of any content come here
        why = f"--data {name} needs {tree} ({type(error).__name__}: {error})"
        raise InputError(f"{read.path} cannot be used; {why}") from None
    if counts not in (None, found := tuple(map(len, parts))):
        print(f"warning: {name} has {found} train and test images, not {counts}", file=sys.stderr)
    splits = []
    for rows in parts:  # path -> {class: 1, 0 or -1}; a class that is not there is known absent
        paths = [*rows][:limit]
        for path in tqdm(paths, "looking at images", leave=False, disable=None):
            open_image(path, decode=False)
            fits = {*rows[path]} <= {*classes} and {*rows[path].values()} <= {-1, 0, 1}
            need(fits, f"{path} has labels {rows[path]}, not 1, 0, -1 of its classes")
        need(paths, f"--root {root}: one of its two lists names no image; add some")
        y = [[rows[path].get(name, -1) for name in classes] for path in paths]
        splits.append((paths, np.array(y, np.int8)))
    return classes, *splits


HOST = "http://images.cocodataset.org"
COCO = {  # archive: md5
    f"{HOST}/zips/train2014.zip": "0da8c0bd3d6becc4dcb32757491aca88",
    f"{HOST}/zips/val2014.zip": "a3d79f5ed8d289b7a7554ce06a5782b3",
    f"{HOST}/annotations/annotations_trainval2014.zip": "0a379cfc70b0e71301e0f377548639bd",
}


def download(name: str, root: str | None, source: str) -> None:
    """Fetch VOC or COCO 2014 into root, by torchvision; of others an InputError says how."""
    need(not source, f"--download cannot fetch {name}; {source}; it needs {DATASETS[name][0]}")
    need(root, "--download needs --root, the folder that the data goes to")
    with naming(f"--download {name} failed; try again"):
        for part in VOC_PARTS.get(name, ()):
            VOCDetection(root, name[3:], part, download=True)
        for url, md5 in COCO.items() if name == "coco" else ():
            if not (done := Path(root, f"{Path(url).name}.done")).exists():
                download_and_extract_archive(url, root, md5=md5, remove_finished=True)
                done.touch()


def read(path: Path) -> str:
    read.path = path  # load_data names it when it cannot be used
    return path.read_text(encoding="utf-8-sig")  # Excel begins a csv with a BOM


def load_coco(root: Path) -> tuple:
    """COCO 2014. Any annotation counts, crowds too; images without annotation stay."""
    splits = []
    for part in ("train2014", "val2014"):
        spec = json.loads(read(root / "annotations" / f"instances_{part}.json"))
        names = {c["id"]: c["name"] for c in sorted(spec["categories"], key=lambda c: c["id"])}
        files = {image["id"]: f"{root / part}/{image['file_name']}" for image in spec["images"]}
        rows = {file: {} for file in files.values()}
        for a in spec["annotations"]:
            rows[files[a["image_id"]]][names[a["category_id"]]] = 1
        splits.append(rows)
    return [*names.values()], *splits


VOC_PARTS = {"voc2007": ("trainval", "test"), "voc2012": ("train", "val")}
VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()


def load_voc(root: Path, name: str) -> tuple:
    """Objects marked difficult do not make a class present."""
    base, splits = root / "VOCdevkit" / name.upper(), []
    for part in VOC_PARTS[name]:
        rows = {}
        for i in read(base / "ImageSets" / "Main" / f"{part}.txt").split():
            objects = ElementTree.fromstring(read(base / "Annotations" / f"{i}.xml")).iter("object")
            sure = (o for o in objects if o.findtext("difficult", "0").strip() != "1")
            rows[f"{base}/JPEGImages/{i}.jpg"] = {o.findtext("name", "").strip(): 1 for o in sure}
        splits.append(rows)
    return VOC_CLASSES, *splits


def load_nuswide(root: Path) -> tuple:
    """NUS-WIDE: the concepts in the order of their label files, that is, of the alphabet."""
    base, splits = root / "Groundtruth" / "TrainTestLabels", []
    classes = sorted(path.name[7:-10] for path in base.glob("Labels_*_Train.txt"))
    for part in ("Train", "Test"):
        lines = read(root / "ImageList" / f"{part}Imagelist.txt").replace("\\", "/").split()
        columns = [read(base / f"Labels_{name}_{part}.txt").split() for name in classes]
        signs = ([2 * int(v) - 1 for v in row] for row in zip(*columns, strict=True))
        rows = {f"{root}/Flickr/{line}": row for line, row in zip(lines, signs, strict=True)}
        splits.append({path: dict(zip(classes, row, strict=True)) for path, row in rows.items()})
    return classes, *splits


def load_folder(root: Path) -> tuple:
    """The user's own: lines `path,label;label;-label` in train.csv and test.csv, classes.txt.
    `-label` is known absent. What a line leaves out is unknown in train.csv, absent in test.csv."""
    classes, splits = [*filter(None, map(str.strip, read(root / "classes.txt").splitlines()))], []
    twice = [name for name, times in Counter(classes).items() if times > 1]
    need(not twice, f"class {twice} is there twice")
    for part, left_out in (("train", dict.fromkeys(classes, 0)), ("test", {})):
        lines, rows = csv.reader(read(root / f"{part}.csv").splitlines()), {}
        for number, line in ((number, line) for number, line in enumerate(lines, 1) if line):
            path, labels = str(root / line[0]), filter(None, map(str.strip, line[-1].split(";")))
            signs = [(x.removeprefix("-"), -1 if x[0] == "-" else 1) for x in labels]
            rows[path], again = left_out | dict(signs), path in rows
            odd = [name for name, sign in signs if name not in classes or rows[path][name] != sign]
            rule = "is not path,label;label;-label, a new path and labels of classes.txt"
            need(len(line) == 2 and not odd and not again, f"line {number} {rule}: {odd or line}")
        splits.append(rows)
    return classes, *splits


VOC = "VOCdevkit/VOC20{07,12}/{Annotations,ImageSets/Main,JPEGImages}"
DATASETS = {  # name: tree under --root; root -> classes, train, test rows; official counts; source
    "coco": ("annotations/instances_{train,val}2014.json, train2014/, val2014/", load_coco,
             (82783, 40504), ""),
    "voc2007": (VOC, lambda root: load_voc(root, "voc2007"), (5011, 4952), ""),
    "voc2012": (VOC, lambda root: load_voc(root, "voc2012"), (5717, 5823), ""),
    "nuswide": ("ImageList/, Groundtruth/TrainTestLabels/, Flickr/*/*.jpg", load_nuswide,
                (161789, 107859), "ask at lms.comp.nus.edu.sg/wp-content/uploads/2019, 30 GB"),
    "folder": ("train.csv, test.csv, classes.txt, images", load_folder, None, "it is your own"),
}  # fmt: skip


# -------------------------------------------------------------------------------------------- CLIP


def load_clip(arch: str, weights: str, size: int) -> tuple[nn.Module, Callable]:
    """open_clip's CLIP with a ResNet tower for images of `size` pixels, and its tokenizer. arch: a
    name of open_clip, hf-hub:ORG/NAME, or local-dir:FOLDER, looked for here and beside this file;
    weights: "default" (OpenAI's, or the folder's), "none" or a path."""
    scheme, colon, folder = arch.partition(":")
    if scheme == "local-dir" and not Path(folder).exists():
        arch = scheme + colon + str(Path(__file__).parent / folder)
    default, named = weights == "default", not colon
    hint = "try RN50-quickgelu or, offline, local-dir:tests/toy_clip with --size 128"
    with naming(f"--arch {arch} --weights {weights} --size {size} cannot be used; {hint}"):
        spec = open_clip.get_model_config(arch)
        need(spec, "it is unknown")
        need(isinstance(spec["vision_cfg"].get("layers"), list), "its tower is no CLIP ResNet")
        quick = spec.get("quick_gelu") or not (default and named)
        need(quick, "OpenAI's weights want another activation; add -quickgelu")
        need(size % 32 == 0, "a size is a multiple of 32, the stride of the tower")
        net = open_clip.create_model(arch, "openai" if default and named else None, default)
        if weights not in ("default", "none"):
            open_clip.load_checkpoint(net, weights)
    pool = net.visual.attnpool
    mean, grid = pool.positional_embedding.detach().split((1, len(pool.positional_embedding) - 1))
    grid = grid.unflatten(0, (math.isqrt(len(grid)), -1)).permute(2, 0, 1)[None]  # (1, D, h, w)
    grid = interpolate(grid, (size // 32, size // 32), mode="bicubic")[0].flatten(1)
    pool.positional_embedding = nn.Parameter(torch.cat((mean, grid.T)))  # of this size
    return net.eval(), open_clip.get_tokenizer(arch)


def clip_features(visual: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (B, 3, H, W) -> CLIP's image feature f (B, D) and local features u (B, N, D), unit.
    u_i is the value of position i by itself. f, the pool's attention, averages values by head; it
    has one query here, where open_clip's pool computes one more for every position."""
    x = normalise(images, visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"])
    x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(x)))))
    pool, x = visual.attnpool, x.flatten(2).transpose(1, 2)  # (B, N, D_in)
    x = torch.cat((x.mean(1, keepdim=True), x), dim=1) + pool.positional_embedding
    q, k, v = pool.q_proj(x[:, :1]), pool.k_proj(x), pool.v_proj(x)
    heads = (z.unflatten(2, (pool.num_heads, -1)).transpose(1, 2) for z in (q, k, v))
    whole = scaled_dot_product_attention(*heads)  # (B, heads, 1, D_in / heads)
    f, u = pool.c_proj(whole.flatten(1)), pool.c_proj(v[:, 1:])
    return normalize(f.float(), dim=-1), normalize(u.float(), dim=-1)


def last_stage(visual: nn.Module, projection_only: bool = False) -> list[nn.Parameter]:
    """The parameters of an image tower's last stage and of what follows, or of what ends it."""
    parts = [visual.attnpool.c_proj] if projection_only else [visual.layer4, visual.attnpool]
    return [p for part in parts for p in part.parameters()]


def prompt_tokens(tokenize: Callable, prompt: str, names: list[str]) -> Tensor:
    """Tokens (len(names), context length) of the prompt with each name in the place of {}."""
    need(all(map(str.strip, names)), f"a class has no name for CLIP to read: {names}")
    return tokenize([prompt.format(name.replace("_", " ")) for name in names])


# ----------------------------------------------------------------------------------------- loading


def open_image(item: str | np.ndarray, decode: bool = True) -> Image.Image:
    """An RGB image, upright and on white, of a file (unless decode: its header) or uint8 array."""
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    with naming(f"image {item} cannot be read; replace or remove it"), Image.open(item) as image:
        need(image.mode not in ("I", "F"), "32 bits a pixel have no known range; use 8 or 16")
        if not decode:
            return image
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits: convert() would clip them at 255
            image = Image.fromarray(np.uint8(np.asarray(image) >> 8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def make_transform(size: int, crops: Sequence[int] = ()) -> v2.Transform:
    """PIL image -> uint8 (3, size, size), bicubic, the aspect not kept. With `crops`: resize to
    512, random crop, resize to 448, flip (SST, "Implementation Details"), all times size / 448."""
    full, bicubic = round(512 * size / 448), InterpolationMode.BICUBIC
    steps = [v2.Resize((size, size), bicubic), v2.ToImage()]
    if crops:
        crop = v2.RandomChoice([v2.RandomCrop(min(full, round(c * size / 448))) for c in crops])
        steps[:1] = v2.Resize((full, full), bicubic), crop, steps[0], v2.RandomHorizontalFlip()
    return v2.Compose(steps)


def normalise(x: Tensor, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, on x's device: what travels there is a quarter the size."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (mean, std))
    return ((x / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


class ImageDataset(Dataset):
    """Items (*views, y (C,), index), one uint8 view by each of `transforms`."""

    def __init__(self, images: Sequence, y: np.ndarray, *transforms: v2.Transform) -> None:
        self.images, self.y, self.transforms = images, torch.as_tensor(y), transforms

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple:
        image = open_image(self.images[i])
        return *(transform(image) for transform in self.transforms), self.y[i], i


def make_loader(data: Dataset, args: Namespace, train: bool = False, size: int = 0) -> DataLoader:
    """Of training: shuffled, without a smaller last batch, since batch statistics want whole ones.
    Under torchrun each process has its part of a batch; test images come once over all."""
    size, sampler = size or args.batch_size, None
    need(size % PROCESSES == 0, f"{PROCESSES} processes cannot share {size} images")
    whole = train and len(data) >= size
    if PROCESSES > 1 and train:
        sampler = DistributedSampler(data, drop_last=whole)
    elif PROCESSES > 1:
        data = Subset(data, range(RANK, len(data), PROCESSES))
    more = dict(num_workers=args.workers, drop_last=whole, pin_memory=torch.cuda.is_available())
    return DataLoader(data, size // PROCESSES, train and not sampler, sampler, **more)


@torch.no_grad()
def outputs(forward: Callable, loader: DataLoader, device, bf16: bool = False) -> list[Tensor]:
    """The tensors (B, ...) of forward(images) of all batches and processes: (images, ...), CPU."""
    found = []
    for images, _, index in tqdm(loader, "scores", leave=False, disable=None):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found.append((index, *(x.cpu() for x in forward(images.to(device)))))
    everyone = [found] * PROCESSES
    if PROCESSES > 1:
        distributed.all_gather_object(everyone, found)
    index, *values = (torch.cat(v) for v in zip(*sum(everyone, []), strict=True))
    assert index.sort().values.equal(torch.arange(len(index))), "each image must come exactly once"
    return [v[index.argsort()] for v in values]


# ----------------------------------------------------------------------------------------- metrics


def average_precision(logits: np.ndarray, y: np.ndarray, interpolated: bool = False) -> np.ndarray:
    """AP in percent of each class (C,), NaN without a positive; entries of y that are 0 count not.
    Non-interpolated: sklearn's average_precision_score; interpolated: VOC2010's, at all points."""
    ap = np.full(y.shape[1], np.nan)
    for c in np.flatnonzero((y == 1).any(0)):
        known = y[:, c] != 0
        precision, recall, _ = precision_recall_curve(y[known, c] == 1, logits[known, c])
        if interpolated:  # the best precision at this recall or a higher one
            precision[:-1] = np.maximum.accumulate(precision[:-1])
        ap[c] = -100 * np.sum(np.diff(recall) * precision[:-1])
    return ap


def multilabel_metrics(logits: np.ndarray, y: np.ndarray) -> dict:
    """Percentages from logits (images, C), float32, and y in {1, 0, -1}; 0 counts nowhere.
    mAP non-interpolated, mAP_interp interpolated, over all but the empty_classes; OP OR OF1 over
    entries, CP CR CF1 over classes, at p >= 0.5, _top3 of an image's 3 highest scores only."""
    need(np.isfinite(logits).all(), "a score is not finite: training diverged; lower --lr")
    truth, shown, result = y == 1, (y == 1).any(0), {}
    for name, interpolated in (("mAP", False), ("mAP_interp", True)):
        ap = average_precision(logits, y, interpolated)[shown]
        result[name] = float(ap.mean()) if len(ap) else math.nan
    rank = (-logits).argsort(axis=1, kind="stable").argsort(axis=1)
    for suffix, number in (("", y.shape[1]), ("_top3", 3)):
        said = (logits >= 0) & (y != 0) & (rank < number)
        counts = np.stack([m[:, shown].sum(0) for m in (said & truth, said, truth)])
        false = said[:, ~shown].sum()  # of classes without a positive
        for letter, (right, *sizes) in (("O", counts.sum(1) + (0, false, 0)), ("C", counts)):
            p, r = (100 * np.mean(right / np.maximum(v, 1)) if shown.any() else 0 for v in sizes)
            for name, value in (("P", p), ("R", r), ("F1", 2 * p * r / max(p + r, 1e-12))):
                result[letter + name + suffix] = float(value)
    return result | dict(empty_classes=int((~shown).sum()))


def pseudo_counts(pseudo: Tensor, y: Tensor, truth: Tensor) -> Tensor:
    """(5,): pseudo positives, those with a truth, those right, hidden positives, images. A
    diagnostic: it sees the truth, which is 0 where nobody knows it."""
    guess, hidden = (pseudo == 1) & (y == 0), (y == 0) & (truth == 1)
    parts = guess, guess & (truth != 0), guess & hidden, hidden, torch.ones_like(y[:, 0])
    return torch.stack([part.sum() for part in parts])


def add_up(totals: dict[str, Tensor], **values: Tensor) -> None:
    """totals[name] += value, without its gradient; nothing waits for the device."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0) + value.detach()


def epoch_entry(totals: dict[str, Tensor], steps: int) -> dict:
    """Log entries from what an epoch added up, here made the total of all processes: the mean of
    each `loss...` over the steps; of `pseudo`, sums of `pseudo_counts`, number an image, precision
    and recall, None without a denominator."""
    for x in totals.values() if PROCESSES > 1 else ():
        distributed.all_reduce(x)
    means = {k: x.item() / steps / PROCESSES for k, x in totals.items() if k.startswith("loss")}
    guessed, judged, right, hidden, images = totals.get("pseudo", torch.zeros(5)).tolist()
    ratios = dict(per_image=(guessed, images), precision=(right, judged), recall=(right, hidden))
    return means | {f"pseudo_{k}": a / b if b else None for k, (a, b) in ratios.items()}


# -------------------------------------------------------------------------------------------- runs


def check_args(args: Namespace, above_zero: str = "") -> Namespace:
    """Returns args; no number may be negative, nor 0 where that makes no sense or in above_zero."""
    for name, value in vars(args).items():
        positive = name in f"known size epochs batch_size lr limit {above_zero}".split()
        high = 1 if name in ("known", "ema") else 2**32 - 1
        if isinstance(value, int | float):
            low, fits = "above" if positive else "at least", 0 <= value <= high
            rule = f"must be {low} 0 and at most {high}"
            need(fits and (value or not positive), f"--{name.replace('_', '-')} {value} {rule}")
    wanted = not (args.eval or args.predict) or args.resume not in (None, "auto")
    need(wanted, "--eval and --predict need --resume PATH, the last.pt of a run")
    if args.dry_run:
        args.limit, args.epochs = max(64, 2 * args.batch_size), 1
    return args


def load_checkpoint(args: Namespace, method: str) -> dict | None:
    """The checkpoint of --resume, whose `args` become the script's defaults; None without one."""
    need(args.resume != "auto" or args.out, "--resume auto needs --out, the folder of the run")
    path = Path(args.out, "last.pt") if args.resume == "auto" else args.resume
    if path is None or (args.resume == "auto" and not path.exists()):
        return None
    with naming(f"--resume {path} is not the last.pt of a run of this script"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        need(state["method"] == method, f"it was written by {state['method']}.py")
        once = dict(eval=False, predict=None, dry_run=False, download=False, weights="none")
        state["args"] = state["args"] | once | dict(resume=args.resume, out=str(Path(path).parent))
    return state


def load_weights(net: nn.Module, weights: str | dict) -> None:
    """Load a state dict, or that of a file, into net; InputError when it is none or misfits."""
    path = weights if isinstance(weights, str) else ""
    with naming(f"--weights {path} does not fit the network" if path else "--resume does not fit"):
        net.load_state_dict(torch.load(path, "cpu", weights_only=True) if path else weights)


def load_task(args: Namespace, state: dict | None, method: str, hide: Callable) -> tuple:
    """Classes, train and test (images, y), y with labels hidden, and what the run is about: a
    checkpoint `state` must be about the same or, to be evaluated, know the same classes."""
    classes, train, test = load_data(args.data, args.root, args.limit, args.download)
    y = hide(train[1], args.known, args.mask_seed)
    need(args.eval or y.any(), f"--known {args.known} leaves none of {y.size} labels known")
    about = dict(method=method, classes=classes, data=args.data, mask=mask_hash(y))
    about |= {name: getattr(args, name) for name in ("epochs", "lr", "batch_size")}
    for name in (["classes"] if args.eval else about) if state else ():
        was = f"--resume: {name} was {state[name]} and is {about[name]} now"
        need(state[name] == about[name], f"{was}; give what that run was started with, or nothing")
    return classes, train, test, y, about


class Run:
    """The folder OUT of a run: log.jsonl, last.pt, samples.png; a dry run writes nothing. `saved`:
    what has a state_dict, goes into checkpoints, and comes from that of --resume."""

    def __init__(self, args: Namespace, about: dict, state: dict | None, **saved) -> None:
        free = (f"runs/{about['method']}-{about['data']}-{n}" for n in count(1))
        self.out = Path(args.out or next(path for path in free if not Path(path).exists()))
        last, resume = self.out / "last.pt", args.resume
        free = not last.exists() or resume == "auto" or (resume and last.samefile(resume))
        need(free, f"--out {self.out} holds a run; add --resume auto, or choose another")
        self.args, self.about, self.saved = args, about, saved
        self.device = device = next(saved["model"].parameters()).device
        self.silent, self.start = args.dry_run or RANK > 0, state["epoch"] + 1 if state else 1
        for name, item in saved.items() if state else ():
            with naming(f"--resume: its {name} does not fit"):
                item.load_state_dict(state[name])
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        first = about | dict(torch=str(torch.__version__), device=name, seed=args.seed)
        first |= dict(command=sys.argv, args=vars(args))
        self.log = state["log"] if state else [{"run": first}]
        where = "nothing is written" if args.dry_run else f"log in {self.out}"
        print(f"{about['method']} on {about['data']}, mask {about['mask']}; {where}", flush=True)

    def begin(self, epoch: int, *loaders: DataLoader) -> None:
        """Seed order and augmentation with (seed, epoch): a resumed run repeats the epoch."""
        self.entry = dict(epoch=epoch, lr=self.saved["optimizer"].param_groups[0]["lr"])
        steps, size = max(map(len, loaders)), sum(loader.batch_size for loader in loaders)
        self.time, self.images = time.time(), steps * size * PROCESSES
        torch.manual_seed(hash((self.args.seed, epoch, RANK)) % 2**63)
        for loader in loaders if PROCESSES > 1 else ():
            loader.sampler.set_epoch(hash((self.args.seed, epoch)) % 2**31)

    def end(self, entry: dict, **more) -> None:
        """Print and log an epoch and save a checkpoint with `more` in it."""
        seconds, cuda = time.time() - self.time, self.device.type == "cuda"
        entry |= dict(seconds=seconds, images_per_second=self.images / seconds)
        entry["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        self.add(self.entry | entry)
        state = {name: item.state_dict() for name, item in self.saved.items()} | more | self.about
        state |= dict(epoch=self.entry["epoch"], args=vars(self.args), log=self.log)
        if not self.silent:
            content = io.BytesIO()
            torch.save(state, content)
            write_whole(self.out / "last.pt", content.getbuffer())

    def add(self, entry: dict) -> None:
        self.log.append({k: None if x != x else x for k, x in entry.items()})  # JSON knows no NaN
        shown = "epoch loss mAP mAP_interp OF1 CF1 pseudo_per_image pseudo_precision seconds"
        known = (name for name in shown.split() if self.log[-1].get(name) is not None)
        print("  ".join(f"{name} {entry[name]:.4g}" for name in known), flush=True)
        if not self.silent:
            self.out.mkdir(parents=True, exist_ok=True)
            lines = "".join(f"{json.dumps(line)}\n" for line in self.log)
            write_whole(self.out / "log.jsonl", lines.encode())

    def finish(self, cells: Sequence[tuple]) -> None:
        """Print the metrics of the last epoch and of the best one on test, and draw samples.png:
        cells of an image and lines of (text, colour), six in a row."""
        epochs = [entry for entry in self.log if entry.get("epoch")]
        best = max(epochs, key=lambda entry: entry["mAP"] or 0)
        print("| % | last epoch | best on test (what most papers report) |\n| --- | --- | --- |")
        for name in (name for name in best if name[0] in "OCm"):
            print(f"| {name} | {epochs[-1][name] or 0:.2f} | {best[name] or 0:.2f} |")
        drawn, style = [], dict(label_colors="white", fill_labels=True)
        for image, lines in cells if not self.silent else ():
            x = v2.functional.pil_to_tensor(image.resize((176, 176)))
            boxes = torch.tensor([[0, 12 * n, 1, 12 * n + 1] for n in range(len(lines))])
            text, colours = ([line[k] for line in lines] for k in (0, 1))
            x = draw_bounding_boxes(x, boxes, text, colours, **style) if lines else x
            drawn.append(x / 255)
        if drawn:
            save_image(drawn, self.out / "samples.png", nrow=6)
            print(f"images and likely labels, green if present, red if not: {self.out}/samples.png")


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, fsync, rename: whatever happens, `path` is whole."""
    temporary = path.with_suffix(".tmp")
    with naming(f"{path} cannot be written; the one before it is whole"):
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def likeliest(classes: Sequence[str], p: Tensor, y: np.ndarray | None = None) -> list[tuple]:
    """(label and probability, colour) of the 5 highest of p (C,): green in y (C,), red not."""
    colours = ["gray"] * len(p) if y is None else [("gray", "green", "red")[k] for k in y]
    return [(f"{classes[c]} {p[c]:.2f}", colours[c]) for c in p.topk(min(5, len(p))).indices]


def test_cells(classes: Sequence[str], test: tuple, logits: Tensor | None) -> list[tuple]:
    """For samples.png: the first test images (images, y) with their likeliest labels."""
    p = torch.sigmoid(logits) if logits is not None else []
    some = zip(test[0][:18], p, test[1], strict=False)
    return [(open_image(image), likeliest(classes, *more)) for image, *more in some]


def report(args: Namespace, classes: Sequence[str], y: np.ndarray, logits: Tensor) -> None:
    """--eval: print metrics and the AP of every class; predictions.npz goes beside last.pt."""
    by_class = zip(classes, average_precision(logits.numpy(), y), strict=True)
    for name, value in [*multilabel_metrics(logits.numpy(), y).items(), *by_class]:
        print(f"{name}: {value:.2f}")
    if RANK == 0:
        np.savez(Path(args.out) / "predictions.npz", logits=logits, labels=y, classes=classes)


@torch.no_grad()
def predict(score: Callable, net: nn.Module, args: Namespace, state: dict) -> None:
    """--predict: the five likeliest labels of each image; score: images -> logits, by net."""
    load_weights(net, state["model"])
    for path in args.predict:
        x = make_transform(args.size)(open_image(path))[None].to(next(net.parameters()).device)
        labels = likeliest(state["classes"], torch.sigmoid(score(x))[0].cpu())
        print(f"{path}:", ", ".join(text for text, _ in labels))
