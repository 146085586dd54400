# SPDX-License-Identifier: MIT
"""What the three scripts share: labels and their hiding, data sets, loading, CLIP, metrics, runs.

Everywhere labels are an int8 array y (images, C): +1 known present, 0 unknown, -1 known absent; B
images of a batch, C classes, D feature width, N positions of a map. Bad input is an `InputError`.
"""

import csv
import hashlib
import json
import logging
import math
import os
import sys
import time
import unicodedata
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, dropwhile
from pathlib import Path
from xml.etree import ElementTree
from zipfile import ZipFile, is_zipfile

import numpy as np
import open_clip
import torch
from PIL import Image, ImageDraw, ImageOps
from sklearn.metrics import precision_recall_curve
from timm.layers import resample_abs_pos_embed
from torch import Tensor, distributed, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets import VOCDetection
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import InterpolationMode, v2
from torchvision.utils import save_image
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
    warnings.simplefilter("ignore")  # of what libraries do inside; ours are printed
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does
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
    name = name.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    with naming(f"--device {name} cannot be used; try cpu"):
        if name.startswith("cuda"):
            name = f"cuda:{TORCHRUN.get('LOCAL_RANK', name[5:] or 0)}"
            torch.cuda.set_device(name)
        device = torch.zeros(1, device=name).device
    if PROCESSES > 1:
        distributed.init_process_group()
    if RANK:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def parallel(net: nn.Module, compiled: bool) -> nn.Module:
    """Under torchrun net's DistributedDataParallel, which shares its weights; otherwise net."""
    if compiled:
        net.compile()
    return nn.parallel.DistributedDataParallel(net) if PROCESSES > 1 else net


# ---------------------------------------------------------------------- labels, data sets, loading


def hide_entries(y: np.ndarray, known: float, seed: int) -> np.ndarray:
    """Hide single labels: (i, c) stays iff RandomState(seed).random_sample(y.shape)[i, c] < known.
    y (images, C) in {1, 0, -1}, known in (0, 1] -> new int8 array, hidden entries 0. Seed 0 on rows
    in the official order gives the masks that SST's authors published; those of a seed are nested.
    """
    keep = np.random.RandomState(seed).random_sample(y.shape) < known
    return np.where(keep, y, 0).astype(np.int8)


def hide_images(y: np.ndarray, known: float, seed: int) -> np.ndarray:
    """As `hide_entries`, all labels of an image; RandomState(seed).permutation(n)[:int(known * n)]
    keep theirs. The semi-supervised protocol; the field's seed is 1."""
    kept = np.random.RandomState(seed).permutation(len(y))[: int(known * len(y))]
    return np.where(np.isin(np.arange(len(y)), kept)[:, None], y, 0).astype(np.int8)


def load_data(name: str, root: str | None, limit: int | None = None, fetch: bool = False) -> tuple:
    """Classes, and (images, y) of the training and the test split, of each the first `limit`.
    images: paths or uint8 (images, height, width, 3); y (images, C). InputError on bad files."""
    if name == "toy":
        from tests import toy  # only here: the methods need nothing of it

        return toy.load(limit)
    need(name in DATASETS, f"--data {name} is unknown; choose from toy, {', '.join(DATASETS)}")
    tree, load, parts = DATASETS[name]
    if fetch:
        download(name, root)
    with naming(f"--data {name} needs {tree} in --root"):
        (classes, train), (_, test) = (load(Path(root or "--root"), part) for part in parts)
    splits = []
    for rows in (train, test):  # path -> {class: 1, 0 or -1}; what is not there is known absent
        paths = [*rows][:limit]
        for path in tqdm(paths, "looking at images", leave=False, disable=None):
            open_image(path, decode=False)
            fits = {*rows[path]} <= {*classes} and {*rows[path].values()} <= {-1, 0, 1}
            need(fits, f"{path} has labels {rows[path]}, not 1, 0, -1 of its classes")
        need(paths, f"--root {root}: one of its two lists names no image; add some")
        y = [[rows[path].get(name, -1) for name in classes] for path in paths]
        splits.append((paths, np.array(y, np.int8)))
    if both := {*splits[0][0]} & {*splits[1][0]}:
        print(f"warning: {len(both)} images are in both lists: {min(both)}", file=sys.stderr)
    return classes, *splits


HOST = "http://images.cocodataset.org"
COCO = {  # archive: md5
    f"{HOST}/zips/train2014.zip": "0da8c0bd3d6becc4dcb32757491aca88",
    f"{HOST}/zips/val2014.zip": "a3d79f5ed8d289b7a7554ce06a5782b3",
    f"{HOST}/annotations/annotations_trainval2014.zip": "0a379cfc70b0e71301e0f377548639bd",
}


def download(name: str, root: str | None) -> None:
    """Fetch VOC or COCO 2014 into root, by torchvision."""
    need(name != "folder", "--download cannot fetch folder: it is your own")
    need(root and PROCESSES == 1, "--download needs --root, where it goes to, and no torchrun")
    with naming(f"--download {name} failed; try again"):
        for part in DATASETS[name][2] if name != "coco" else ():
            VOCDetection(root, *part.split(), download=True)
        for url, md5 in COCO.items() if name == "coco" else ():
            if not (done := Path(root, f"{Path(url).name}.done")).exists():
                download_and_extract_archive(url, root, md5=md5, remove_finished=True)
                done.touch()


def read(path: Path, parse: Callable = str):
    with naming(f"{path} cannot be used"):
        return parse(path.read_text(encoding="utf-8-sig"))  # Excel begins a csv with a BOM


def load_coco(root: Path, part: str) -> tuple:
    """COCO 2014. Any annotation counts, crowds too; images without annotation stay."""
    with naming(path := f"{root}/annotations/instances_{part}.json"):
        spec = read(Path(path), json.loads)
        names = {c["id"]: c["name"] for c in sorted(spec["categories"], key=lambda c: c["id"])}
        files = {image["id"]: f"{root / part}/{image['file_name']}" for image in spec["images"]}
        rows = {file: {} for file in files.values()}
        for a in spec["annotations"]:
            rows[files[a["image_id"]]][names[a["category_id"]]] = 1
        return [*names.values()], rows


VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()


def load_voc(root: Path, part: str) -> tuple:
    """Objects marked difficult do not make a class present."""
    year, part = part.split()
    base, rows = root / "VOCdevkit" / f"VOC{year}", {}
    for i in read(base / "ImageSets" / "Main" / f"{part}.txt").split():
        objects = read(base / "Annotations" / f"{i}.xml", ElementTree.fromstring).iter("object")
        sure = (o for o in objects if o.findtext("difficult", "0").strip() != "1")
        rows[f"{base}/JPEGImages/{i}.jpg"] = {o.findtext("name", "").strip(): 1 for o in sure}
    return VOC_CLASSES, rows


def load_folder(root: Path, part: str) -> tuple:
    """The user's own: lines `path,label;label;-label`; `-label` is known absent. What a line leaves
    out is unknown; in a test.csv without any `-label` it is absent."""
    names = unicodedata.normalize("NFC", read(root / "classes.txt")).splitlines()
    classes, rows, at = [*filter(None, map(str.strip, names))], {}, {}
    need(len({*classes}) == len(classes), f"classes.txt names a class twice: {classes}")
    lines = csv.reader(read(root / f"{part}.csv").splitlines())
    for line in filter(None, lines):
        path = os.path.normpath(root / line[0].replace("\\", "/"))
        labels = map(str.strip, unicodedata.normalize("NFC", line[-1]).split(";"))
        signs = [(x.removeprefix("-"), -1 if x[0] == "-" else 1) for x in labels if x]
        rows[path], n = dict(signs), lines.line_num
        odd = [name for name, sign in signs if name not in classes or rows[path][name] != sign]
        here, rule = f"{part}.csv line {n}", "path,label;label;-label with labels of classes.txt"
        need(len(line) == 2 and not odd, f"{here} is not {rule}: {odd or line}")
        need(at.setdefault(path, n) == n, f"{here} is of the image of line {at[path]}, {path}")
    if part == "train" or any(-1 in row.values() for row in rows.values()):
        rows = {path: dict.fromkeys(classes, 0) | row for path, row in rows.items()}
    return classes, rows


VOC = "VOCdevkit/VOC20{07,12}/{Annotations,ImageSets/Main,JPEGImages}"
DATASETS = {  # name: tree under --root; what loads a part: root, part -> classes, rows; parts
    "coco": ("annotations/, train2014/, val2014/", load_coco, ("train2014", "val2014")),
    "voc2007": (VOC, load_voc, ("2007 trainval", "2007 test")),
    "voc2012": (VOC, load_voc, ("2012 train", "2012 val")),
    "folder": ("train.csv, test.csv, classes.txt", load_folder, ("train", "test")),
}


def open_image(item: str | np.ndarray, decode: bool = True) -> Image.Image:
    """An RGB image, upright and on white, of a file or uint8 array. Unless `decode`, a JPEG or PNG
    that ends as such files do is taken for whole and left."""
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    with naming(f"image {item} cannot be read; replace or remove it"), Image.open(item) as image:
        need(image.mode not in ("I", "F"), "32 bits a pixel have no known range; use 8 or 16")
        with open(item, "rb") as file:
            file.seek(-8, os.SEEK_END)
            if not decode and file.read().endswith((b"\xff\xd9", b"IEND\xaeB`\x82")):
                return image
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, of which cameras and scanners may use 12
            x = np.asarray(image)
            image = Image.fromarray(np.uint8(x >> max(0, int(x.max()).bit_length() - 8)))
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
    x = v2.functional.normalize(x / 255, mean, std)
    return x.contiguous(memory_format=torch.channels_last)


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
    size = size or args.batch_size
    need(size % PROCESSES == 0, f"{PROCESSES} processes cannot share {size} images")
    whole, sampler = train and len(data) >= size, None
    if PROCESSES > 1:
        rest = range(RANK, len(data), PROCESSES)
        sampler = DistributedSampler(data, drop_last=whole) if train else rest
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


# -------------------------------------------------------------------------------------------- CLIP


def load_clip(arch: str, weights: str, size: int) -> tuple[nn.Module, Callable]:
    """open_clip's CLIP for images of `size` pixels, and its tokenizer. arch: its name, hf-hub:NAME,
    or local-dir:FOLDER, looked for here and beside this file. weights: "default" (OpenAI's, the
    folder's), "none", a tag of open_clip, or a file, also OpenAI's (TorchScript)."""
    scheme, colon, folder = arch.partition(":")
    if scheme == "local-dir" and not Path(folder).exists():
        arch = scheme + colon + str(Path(__file__).parent / folder)
    tag = {"default": "openai", "none": ""}.get(weights, weights)
    hint = "try RN50-quickgelu or, offline, local-dir:tests/toy_clip with --size 128"
    with naming(f"--arch {arch} --weights {weights} --size {size} cannot be used; {hint}"):
        spec = open_clip.get_model_config(arch)
        need(spec, "it is unknown")
        odd = {*spec["text_cfg"]} - {*"context_length vocab_size width heads layers".split()}
        odd |= {"custom_text"} & {*spec}
        need(not odd, f"its text tower is not as CLIP's and takes no prompts {sorted(odd)}")
        script = is_zipfile(weights) and "/constants.pkl" in str(ZipFile(weights).namelist())
        quick = script or open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu")
        need(spec.get("quick_gelu") or not quick, "OpenAI's weights need QuickGELU: -quickgelu")
        own = not colon or weights == "default"
        net = open_clip.create_model(arch, tag, load_weights=own, weights_only=not script).eval()
        if not own and weights != "none":
            open_clip.load_checkpoint(net, weights, weights_only=not script)
        visual, trunk = net.visual, getattr(net.visual, "trunk", None)
        side = getattr(visual, "patch_size", [32])[0]  # of a ViT; or the stride of a CLIP ResNet
        side = trunk.feature_info[-1]["reduction"] if trunk else side
        need(size % side == 0, f"a size is a multiple of {side}, the stride of the tower")
        if trunk:
            visual.set_input_size(size)
        else:
            table = getattr(visual, "attnpool", visual).positional_embedding
            table.data = resample_abs_pos_embed(table.data[None], [size // side] * 2)[0]
        with naming("its tower pools neither as OpenAI's do nor by a mean over a map"):
            f, u = clip_features(visual, torch.zeros(1, 3, size, size, dtype=torch.uint8))
            fits = f.ndim == 2 and u.shape[1] == (size // side) ** 2
            need(fits, f"its features are {[*f.shape]} and {[*u.shape]}")
        return net, open_clip.get_tokenizer(arch)


def clip_features(visual: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (B, 3, H, W) -> CLIP's image feature f (B, D) and local features u (B, N, D), unit, N
    by rows. u_i is what the end of the tower makes of position i alone: a ResNet's attention pool,
    a ViT's last block (the value path of MaskCLIP, ECCV 2022), the head of a tower of timm."""
    x = normalise(images, visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"])
    if trunk := getattr(visual, "trunk", None):
        x = trunk.forward_features(x)
        last = x.ndim == 3 or getattr(trunk, "output_fmt", "") == "NHWC"  # the channels
        f, axis = visual.head(trunk.forward_head(x)), -1 if last else 1
        x = x.movedim(axis, -1).flatten(1, -2)  # (B, N, D_in)
        maps = x.flatten(0, 1)[:, None, None].movedim(-1, axis)  # each of one position
        u = visual.head(trunk.forward_head(maps)).view(*x.shape[:2], -1)
    else:
        pool = getattr(visual, "attnpool", None)
        out = visual.forward_intermediates(x, indices=1 if pool else 2)
        f, x = out["image_features"], out["image_intermediates"][0].flatten(2).transpose(1, 2)
        if pool:
            u = pool.c_proj(pool.v_proj(x + pool.positional_embedding[1:]))
        else:  # x is what enters the last block
            x = visual.transformer.resblocks[-1](x.flatten(0, 1)[:, None]).view_as(x)
            u = visual.ln_post(x) @ visual.proj
    return normalize(f.float(), dim=-1), normalize(u.float(), dim=-1)


def last_stage(visual: nn.Module, projection_only: bool = False) -> list[nn.Parameter]:
    """Parameters of an image tower's last stage and of all after it, or of its projection only."""
    if projection_only:
        ends = ("proj", "head.", "attnpool.c_proj.")
        return [p for name, p in visual.named_parameters() if name.startswith(ends)]
    if trunk := getattr(visual, "trunk", None):
        stage = trunk.get_submodule(trunk.feature_info[-1]["module"])
    else:
        stage = getattr(visual, "layer4", None) or visual.transformer.resblocks[-1]
    first, own = next(stage.parameters()), [visual.proj] if hasattr(visual, "proj") else []
    return [*dropwhile(lambda p: p is not first, visual.parameters()), *own]


def prompt_tokens(tokenize: Callable, prompt: str, names: list[str]) -> Tensor:
    """Tokens (len(names), context length) of the prompt with each name in the place of {}."""
    need(all(map(str.strip, names)), f"a class has no name for CLIP to read: {names}")
    return tokenize([prompt.format(name.replace("_", " ")) for name in names])


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
    rank = np.where(y, -logits, np.inf).argsort(axis=1, kind="stable").argsort(axis=1)
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
    """Log entries from the totals of an epoch, over all processes: of each `loss...` the mean over
    steps; of `pseudo_counts` the number an image, precision and recall, None where none is."""
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
            rule = f"must be {'above' if positive else 'at least'} 0 and at most {high}"
            fits = 0 <= value <= high and (value or not positive)
            need(fits, f"--{name.replace('_', '-')} {value} {rule}")
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
    """Load a state dict, or that of a file, into net; InputError when it is none or misfits. A file
    may be of DataParallel; net keeps its own classification head, which no script uses."""
    path = weights if isinstance(weights, str) else ""
    with naming(f"--weights {path} does not fit the network" if path else "--resume does not fit"):
        if path:
            weights, own = torch.load(path, "cpu", weights_only=True), net.state_dict()
            weights = {name.removeprefix("module."): x for name, x in weights.items()}
            weights |= {k: x for k, x in own.items() if k.startswith(("fc.", "classifier."))}
        net.load_state_dict(weights)


def load_task(args: Namespace, state: dict | None, method: str, hide: Callable) -> tuple:
    """Classes, train and test (images, y), y with labels hidden, and what the run is about: a
    checkpoint `state` must be about the same or, to be evaluated, know the same classes."""
    classes, (images, truth), test = load_data(args.data, args.root, args.limit, args.download)
    if args.complete:
        truth = np.where((truth == 0) & truth.any(1, keepdims=True), np.int8(-1), truth)
    y = hide(truth, args.known, args.mask_seed)
    need(args.eval or y.any(), f"--known {args.known} leaves none of {y.size} labels known")
    todo = "add -label entries, or --complete if what a line leaves out is absent"
    need(args.eval or -1 in truth, f"no label of the training images is known absent; {todo}")
    mask = hashlib.sha256(np.packbits(y != 0).tobytes()).hexdigest()[:8]
    about = dict(method=method, classes=classes, data=args.data, mask=mask)
    about |= {name: getattr(args, name) for name in ("epochs", "lr", "batch_size")}
    for name in (["classes"] if args.eval else about) if state else ():
        was = f"--resume: {name} was {state[name]} and is {about[name]} now"
        need(state[name] == about[name], f"{was}; give what that run had, or start another --out")
    return classes, (images, truth), test, y, about


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
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        first = dict(torch=str(torch.__version__), device=name, command=sys.argv, args=vars(args))
        self.log = state["log"] if state else [{"run": about | first}]
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
            last = self.out / "last.pt"  # under another name first: whatever happens, it is whole
            with naming(f"{last} cannot be written; the one before it is whole"):
                with open(last.with_suffix(".tmp"), "wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(file.name, last)

    def add(self, entry: dict) -> None:
        self.log.append({k: None if x != x else x for k, x in entry.items()})  # JSON knows no NaN
        shown = "epoch loss mAP mAP_interp OF1 CF1 pseudo_per_image pseudo_precision seconds"
        known = (name for name in shown.split() if self.log[-1].get(name) is not None)
        print("  ".join(f"{name} {entry[name]:.4g}" for name in known), flush=True)
        if not self.silent:
            self.out.mkdir(parents=True, exist_ok=True)
            lines = "".join(f"{json.dumps(line)}\n" for line in self.log)
            (self.out / "log.jsonl").write_text(lines)

    def finish(self, cells: Sequence[tuple]) -> None:
        """Print the last and the best epoch. Draw cells: (image, lines as of `likeliest`)."""
        epochs = [entry for entry in self.log if entry.get("epoch")]
        best = max(epochs, key=lambda entry: entry["mAP"] or 0)
        print("| % | last epoch | best on test (what most papers report) |\n| --- | --- | --- |")
        for name in (name for name in best if name[0] in "OCm"):
            print(f"| {name} | {epochs[-1][name] or 0:.2f} | {best[name] or 0:.2f} |")
        drawn, classes = [], self.about["classes"]
        for image, lines in cells if not self.silent else ():
            draw = ImageDraw.Draw(image := image.resize((176, 176)))
            for n, (c, p, colour) in enumerate(lines):  # the font may lack other letters
                text = f"{classes[c] if classes[c].isascii() else f'#{c + 1}'} {p:.2f}"
                draw.text((3, 13 * n), text, "white", stroke_width=2, stroke_fill=colour)
            drawn.append(v2.functional.pil_to_tensor(image) / 255)
        if drawn:
            save_image(drawn, self.out / "samples.png", nrow=6)
            print(f"likely labels, green if there, by number if not ASCII: {self.out}/samples.png")


def likeliest(p: Tensor, y: Sequence[int]) -> list[tuple]:
    """(c, p[c], colour) of the 5 highest of p (C,): green where y (C,) is 1, red where it is -1."""
    return [(c, p[c], ("gray", "green", "red")[y[c]]) for c in p.topk(min(5, len(p))).indices]


def test_cells(test: tuple, logits: Tensor) -> list[tuple]:
    """For samples.png: the first test images (images, y) with their likeliest labels."""
    some = zip(test[0][:18], torch.sigmoid(logits), test[1], strict=False)
    return [(open_image(image), likeliest(*more)) for image, *more in some]


def report(args: Namespace, classes: Sequence[str], y: np.ndarray, logits: Tensor) -> None:
    """--eval: print metrics and the AP of every class; predictions.npz goes beside last.pt."""
    by_class = zip(classes, average_precision(logits.numpy(), y), strict=True)
    for name, value in [*multilabel_metrics(logits.numpy(), y).items(), *by_class]:
        print(f"{name}: {value:.2f}")
    if RANK == 0:
        np.savez(Path(args.out) / "predictions.npz", logits=logits, labels=y, classes=classes)


@torch.no_grad()
def predict(score: Callable, net: nn.Module, args: Namespace, state: dict) -> None:
    """--predict: the five likeliest labels of each image, also of those in folders; all go into
    predictions.csv beside last.pt. score: images -> logits, by net."""
    load_weights(net, state["model"])
    view, device = make_transform(args.size), next(net.parameters()).device
    classes, failed, paths = state["classes"], [], []
    for path in args.predict:
        paths += sorted(x for x in Path(path).rglob("[!.]*") if x.is_file()) or [path]
    with open(Path(args.out, "predictions.csv"), "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", *classes])
        for path in paths:
            try:
                p = torch.sigmoid(score(view(open_image(path))[None].to(device)))[0].cpu()
            except InputError as error:
                failed.append(str(error))
            else:
                table.writerow([path, *p.tolist()])
                best = likeliest(p, [0] * len(p))
                print(f"{path}:", ", ".join(f"{classes[c]} {x:.2f}" for c, x, _ in best))
    need(not failed, "; ".join(failed))
