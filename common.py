# SPDX-License-Identifier: MIT
"""What the three scripts share: flags, hiding labels, data sets, loading, CLIP, metrics, runs.

Labels are int8 arrays y (images, C): +1 known present, 0 unknown, -1 known absent. B is the number
of images of a batch, C of classes, N of positions of a map; D is the width of a feature.
"""

import csv
import hashlib
import json
import logging
import os
import sys
import time
import unicodedata
import warnings
import weakref
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import open_clip
import torch
from PIL import Image, ImageDraw, ImageOps
from sklearn.metrics import precision_recall_curve
from timm.layers import convert_sync_batchnorm, resample_abs_pos_embed
from torch import distributed, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets import VOCDetection
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))

class InputError(ValueError):
    """Something the user gave is wrong; the text is one line that names it and says what to do."""

def need(condition, message):
    if not condition:
        raise InputError(message)

def warn(message):
    print(f"warning: {message}", file=sys.stderr)

@contextmanager
def naming(what):
    """Whatever goes wrong inside becomes an InputError that says `what`, and in brackets why."""
    try:
        yield
    except Exception as error:  # files of any content come here
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{what} ({kind}{reason})") from None

def run_script(main):
    """Call `main`. What a person can correct becomes one line on stderr and exit status 2, Ctrl-C
    a line and status 130. Anything else is a mistake in the code and keeps its traceback."""
    logging.disable(logging.ERROR)  # open_clip warns of each tower without weights
    warnings.simplefilter("ignore")  # of what libraries do inside; ours are printed
    with suppress(AttributeError):  # of a notebook, or where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does
    status = 2
    try:
        main()
        return distributed.destroy_process_group() if PROCESSES > 1 else None
    except InputError as error:
        # from a loader's worker the text comes wrapped in a traceback; its last line is the message
        message = str(error).strip().splitlines()[-1].split("InputError: ")[-1]
    except OSError as error:  # a full disk, a folder that cannot be written
        message = f"{error}; correct that and run again"
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        message = "shared memory is full; add --workers 0, or docker run --shm-size 1g"
    except KeyboardInterrupt:
        status = 130
        message = "interrupted; --out OUT --resume auto repeats the epoch and goes on"
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)

def progress(items, text):
    """The items, with a bar that is shown in a terminal only."""
    return tqdm(items, text, leave=False, disable=None)

# ------------------------------------------------------------------------------------------- flags

def number(kind, low, high=2**32 - 1):
    """A type for argparse: an int or a float in [low, high]."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise ArgumentTypeError(f"{text} must be at least {low:g} and at most {high:g}")
        return value

    convert.__name__ = kind.__name__  # for argparse's own message
    return convert

NATURAL = number(int, 0)
POSITIVE = number(int, 1)
WEIGHT = number(float, 0)
RATE = number(float, 1e-12)
SHARE = number(float, 0, 1)

def arguments(doc, known, mask_seed, batch_size):
    """A parser with the flags of all scripts. doc: the script's docstring, whose first line --help
    shows. known: what --known is a proportion of. mask_seed and batch_size: their defaults."""
    parser = ArgumentParser(add_help=False, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.description = doc.split("\n")[0]
    parser.error = lambda message: need(False, f"{message}; --help lists the arguments")
    known = f"proportion of {known} that keep their labels, in (0, 1]"
    add = parser.add_argument_group("task").add_argument
    add("--data", default="toy", help=f"toy, {', '.join(DATASETS)}")
    add("--root", help="folder of the data set")
    add("--download", action="store_true", help="fetch voc2007, voc2012 or coco into --root first")
    add("--known", type=number(float, 1e-12, 1), help=known)
    add("--complete", action="store_true", help="a line of train.csv leaves out what is absent")
    add("--mask-seed", type=NATURAL, default=mask_seed, help="which labels are hidden")
    add("--limit", type=POSITIVE, help="use the first LIMIT images of each split")
    add("--eval", action="store_true", help="only evaluate the checkpoint of --resume PATH")
    add("--predict", nargs="+", metavar="IMAGE", help="only predict these, with --resume PATH")
    add = parser.add_argument_group("run").add_argument
    add("--size", type=POSITIVE, help="side of the square input in pixels")
    add("--epochs", type=POSITIVE, help="length of the schedule")
    add("--batch-size", type=POSITIVE, default=batch_size, help="images a step, of all processes")
    add("--lr", type=RATE, help="highest learning rate")
    add("--workers", type=NATURAL, help="processes that decode images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--seed", type=NATURAL, default=0, help="initial weights, order and augmentation")
    add("--out", help="for log.jsonl, last.pt, samples.png; default runs/METHOD-DATA-N")
    add("--resume", metavar="{auto,PATH}", help="continue OUT/last.pt if it is there, or PATH")
    add("--dry-run", action="store_true", help="train a few steps on a few images, write nothing")
    return parser

def parse(parser, recipes, method, argv):
    """The arguments, and the checkpoint of --resume or None. Defaults are the arguments of that
    checkpoint; without one, the recipe of --data, or "real" where it has no own."""
    first, _ = parser.parse_known_args(argv)
    state = load_checkpoint(first, method)
    recipe = recipes.get(first.data, recipes["real"])
    parser.set_defaults(**(state["args"] if state else recipe))
    parser.add_argument("-h", "--help", action="help", help="show this and exit")
    args = parser.parse_args(argv)
    if args.eval or args.predict:
        need(args.resume not in (None, "auto"), "--eval and --predict need --resume PATH")
        Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.dry_run:
        args.limit = max(64, 2 * args.batch_size)
        args.epochs = 1
    return args, state

def load_checkpoint(args, method):
    """The checkpoint of --resume, or None. Weights come from it, no more from --weights."""
    path = args.resume
    if path == "auto":
        need(args.out, "--resume auto needs --out, the folder of the run")
        path = f"{args.out}/last.pt"
    if path is None or (args.resume == "auto" and not os.path.exists(path)):
        return None
    with naming(f"--resume {path} is not the last.pt of a run of this script"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        need(state["method"] == method, f"it was written by {state['method']}.py")
        place = dict(resume=args.resume, out=os.path.dirname(path) or ".")
        state["args"] |= place | dict(weights="none", download=False)
    return state

# -------------------------------------------------------------------------- devices and processes

def pick_device(name):
    """The device of --device; under torchrun, joins the other processes. Only the first prints."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with naming(f"--device {name} cannot be used; try cpu"):
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        device = torch.zeros(1, device=name).device
    if PROCESSES > 1:
        distributed.init_process_group()
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device

def parallel(net, compiled):
    """Under torchrun net's DistributedDataParallel, which shares its weights; otherwise net. On
    CUDA, batch norms that learn then use the statistics of all processes."""
    if compiled:
        net.compile()
    if PROCESSES == 1:
        return net
    if next(net.parameters()).is_cuda:
        net = convert_sync_batchnorm(net)  # also those of timm, which hold an activation
    return nn.parallel.DistributedDataParallel(net)

def gather(x):
    """x (B, ...) of all processes, one after the other, with the gradient of each."""
    return torch.cat(all_gather(x)) if PROCESSES > 1 else x

def autocast(device, precision):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

# ------------------------------------------------------------------------------ labels, data sets

def hide_entries(y, known, seed):
    """Hide single labels: (i, c) stays iff RandomState(seed).random_sample(y.shape)[i, c] < known.
    y (images, C) in {1, 0, -1}, known in (0, 1] -> new int8 array, hidden entries 0. Seed 0 on rows
    in the official order gives the masks that SST's authors use; those of a seed are nested."""
    keep = np.random.RandomState(seed).random_sample(y.shape) < known
    return np.where(keep, y, 0).astype(np.int8)

def hide_images(y, known, seed):
    """Hide all labels of an image, or none: the first int(known * n) images of
    RandomState(seed).permutation(n) keep theirs. The semi-supervised protocol; its seed is 1."""
    kept = np.random.RandomState(seed).permutation(len(y))[: int(known * len(y))]
    hidden = np.zeros_like(y, np.int8)
    hidden[kept] = y[kept]
    return hidden

def load_data(name, root, limit=None, fetch=False):
    """Classes, and (images, y) of the training and the test part, of each the first `limit`.
    images: paths or uint8 (images, height, width, 3); y (images, C). InputError on bad files."""
    if name == "toy":
        from tests import toy  # only here: the methods need nothing of it

        return toy.load(limit)
    need(name in DATASETS, f"--data {name} is unknown; choose from toy, {', '.join(DATASETS)}")
    tree, load, parts = DATASETS[name]
    if fetch:
        download(name, root)
    splits = []
    shown = False
    for part in parts:
        try:
            classes, paths, y = load(root or "--root", part)
        except FileNotFoundError as error:
            message = f"--data {name} needs {tree} in --root; {error.filename} is not there"
            raise InputError(message) from None
        need(paths, f"--root {root}: the list of {part} names no image; add some")
        shown = shown | (y == 1).any(0)
        splits.append((paths[:limit], y[:limit]))
    if not shown.all():
        warn(f"no image shows {', '.join(np.array(classes)[~shown])}")
    train, test = (paths for paths, _ in splits)
    both = {*train} & {*test}
    if both:
        warn(f"{len(both)} images are in both lists: {min(both)}")
    for path in progress(train + test, "looking at images"):
        open_image(path, decode=False)
    return classes, *splits

HOST = "http://images.cocodataset.org"
COCO = {  # archive: md5
    f"{HOST}/zips/train2014.zip": "0da8c0bd3d6becc4dcb32757491aca88",
    f"{HOST}/zips/val2014.zip": "a3d79f5ed8d289b7a7554ce06a5782b3",
    f"{HOST}/annotations/annotations_trainval2014.zip": "0a379cfc70b0e71301e0f377548639bd",
}

def download(name, root):
    """Fetch VOC or COCO 2014 into root, by torchvision."""
    need(name in ("coco", "voc2007", "voc2012"), f"--download cannot fetch {name}")
    need(root and PROCESSES == 1, "--download needs --root, where it goes to, and no torchrun")
    with naming(f"--download {name} failed; try again"):
        if name == "coco":
            for url, md5 in COCO.items():
                download_and_extract_archive(url, root, md5=md5)
        else:
            for part in DATASETS[name][2]:
                VOCDetection(root, *part.split(), download=True)

def read(path, parse=str):
    """What `parse` makes of the text of a file; FileNotFoundError where there is none."""
    content = Path(path).read_bytes()
    with naming(f"{path} cannot be used; a list is to be saved as CSV UTF-8"):
        return parse(content.decode("utf-8-sig"))  # Excel begins a csv with a BOM

def unique(keys, what, places):
    """key -> its position. InputError where one occurs twice; `places` says of what it is."""
    positions = {}
    for position, key in enumerate(keys):
        first = positions.setdefault(key, position)
        need(first == position, f"{what} {key} is twice there: {places[first]}, {places[position]}")
    return positions

def load_coco(root, part):
    """COCO 2014. Any annotation counts, crowds too; images without annotation stay."""
    path = f"{root}/annotations/instances_{part}.json"
    spec = read(path, json.loads)
    with naming(f"{path} cannot be used"):
        categories = sorted(spec["categories"], key=lambda category: category["id"])
        classes = [category["name"] for category in categories]
        ids = [category["id"] for category in categories]
        unique(classes, "category", ids)
        column = unique(ids, "category id", classes)
        names = [image["file_name"].replace("\\", "/") for image in spec["images"]]
        unique(names, "file", names)
        row = unique((image["id"] for image in spec["images"]), "image id", names)
        y = np.full((len(names), len(classes)), -1, np.int8)
        for annotation in spec["annotations"]:
            image = annotation["image_id"]
            need(image in row, f"annotation {annotation.get('id')} is of image {image}, not listed")
            y[row[image], column[annotation["category_id"]]] = 1
    return classes, [f"{root}/{part}/{name}" for name in names], y

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()

def load_voc(root, part):
    """Objects marked difficult do not make a class present."""
    year, part = part.split()
    base = f"{root}/VOCdevkit/VOC{year}"
    names = read(f"{base}/ImageSets/Main/{part}.txt").split()
    y = np.full((len(names), len(VOC_CLASSES)), -1, np.int8)
    for row, name in enumerate(names):
        path = f"{base}/Annotations/{name}.xml"
        for item in read(path, ElementTree.fromstring).iter("object"):
            label = item.findtext("name", "").strip()
            need(label in VOC_CLASSES, f"{path} shows {label}, which is no class of VOC")
            if item.findtext("difficult", "0").strip() != "1":
                y[row, VOC_CLASSES.index(label)] = 1
    return VOC_CLASSES, [f"{base}/JPEGImages/{name}.jpg" for name in names], y

def load_folder(root, part):
    """The user's own: lines `path,label;label;-label`; `-label` is known absent. What a line leaves
    out is unknown; in a test.csv without any `-label` it is absent."""
    text = unicodedata.normalize("NFC", read(f"{root}/classes.txt"))
    classes = [line.strip() for line in text.splitlines() if line.strip()]
    column = unique(classes, "classes.txt: class", range(len(classes)))
    paths, places, y = [], [], []
    reader = csv.reader(read(f"{root}/{part}.csv").splitlines())
    with naming(f"{part}.csv cannot be read; has a line an odd number of quotes?"):
        lines = [(f"{part}.csv line {reader.line_num}", cells) for cells in reader]
    for place, cells in lines:
        if any(map(str.strip, cells)):  # a spreadsheet may have blank rows
            need(len(cells) == 2, f"{place} is not path,label;label;-label: {cells}")
            paths.append(os.path.normpath(f"{root}/{cells[0]}".replace("\\", "/")))
            places.append(place)
            y.append(parse_labels(cells[1], column, place))
    unique(paths, "image", places)
    y = np.array(y, np.int8)
    if part == "test" and -1 not in y:
        y[y == 0] = -1
    return classes, paths, y

def parse_labels(text, column, place):
    """`label;label;-label` -> y (C,): 1, -1 for -label, 0 for what is left out."""
    y = np.zeros(len(column), np.int8)
    for label in filter(None, map(str.strip, unicodedata.normalize("NFC", text).split(";"))):
        name = label.removeprefix("-")
        sign = 1 if name == label else -1
        fits = name in column and y[column[name]] != -sign
        need(fits, f"{place}: {label} is no class of classes.txt, or there with both signs")
        y[column[name]] = sign
    return y

def load_vg200(root, part):
    """The lists of SST's authors. They publish no names of the classes: numbers, or classes.txt."""
    names = read(f"{root}/{part}_list_500.txt").split()
    present = read(f"{root}/vg_category_200_labels_index.json", json.loads)
    given = f"{root}/classes.txt"
    classes = read(given).splitlines() if os.path.exists(given) else [*map(str, range(200))]
    y = np.full((len(names), len(classes)), -1, np.int8)
    with naming(f"vg_category_200_labels_index.json does not fit {part}_list_500.txt"):
        for row, name in enumerate(names):
            y[row, present[name]] = 1
    return classes, [f"{root}/VG_100K/{name}" for name in names], y

def load_arrays(root, part):
    """NUS-WIDE and CUB as this field passes them on: names of images, and labels 0/1 or 1/0/-1."""
    folder, part = part.split()
    classes = read(f"{root}/classes.txt").splitlines()
    with naming(f"--root {root} needs {ARRAYS}{folder}/, and not arrays of objects"):
        names = np.load(f"{root}/formatted_{part}_images.npy")
        y = np.load(f"{root}/formatted_{part}_labels.npy")
        fits = (names.ndim, names.dtype.kind, *y.shape) == (1, "U", len(names), len(classes))
        sizes = f"{names.shape} names, {y.shape} labels of 1, 0, -1, {len(classes)} classes"
        need(fits and {*np.unique(y)} <= {-1, 0, 1}, f"{part}: {sizes}")
    outside = [name for name in names if {"..", "/"} & {*Path(name).parts}]
    need(not outside, f"formatted_{part}_images.npy leaves --root: {outside[:1]}")
    paths = [f"{root}/{folder}/{name}" for name in names]
    return classes, paths, (y if -1 in y else 2 * y - 1).astype(np.int8)

VOC = "VOCdevkit/VOC20{07,12}/{Annotations,ImageSets/Main,JPEGImages}"
VG = "VG_100K/; of HCP-MLR-PL: {train,test}_list_500.txt, vg_category_200_labels_index.json"
ARRAYS = "formatted_{train,val}_{images,labels}.npy (single-positive-multi-label's), classes.txt, "
CUB = "CUB_200_2011/images"
DATASETS = {  # name: tree under --root; function of root and part -> classes, paths, y; parts
    "coco": ("annotations/, train2014/, val2014/", load_coco, ("train2014", "val2014")),
    "voc2007": (VOC, load_voc, ("2007 trainval", "2007 test")),
    "voc2012": (VOC, load_voc, ("2012 train", "2012 val")),
    "vg200": (VG, load_vg200, ("train", "test")),
    "nuswide": (ARRAYS + "Flickr/", load_arrays, ("Flickr train", "Flickr val")),
    "cub": (ARRAYS + CUB, load_arrays, (f"{CUB} train", f"{CUB} val")),
    "folder": ("train.csv, test.csv, classes.txt", load_folder, ("train", "test")),
}

def load_task(args, state, method, hide):
    """What a run is about: classes; images, paths or arrays; truth (images, C), all labels, for
    diagnostics; y, those that `hide`, a function above, leaves known; test_images, test_y,
    test_loader; and `about`, what a resumed run must share with its checkpoint `state`."""
    classes, train, test = load_data(args.data, args.root, args.limit, args.download)
    images, truth = train
    if args.complete:
        labelled = truth.any(1, keepdims=True)
        truth = np.where(labelled & (truth == 0), np.int8(-1), truth)
    y = hide(truth, args.known, args.mask_seed)
    if not args.eval:
        need(y.any(), f"--known {args.known} leaves none of {y.size} labels known")
        need(-1 in truth, "no training label is known absent; add -label entries, or --complete")
    mask = hashlib.sha256(np.packbits(y != 0).tobytes()).hexdigest()[:8]
    about = dict(method=method, classes=classes, data=args.data, mask=mask)
    about |= dict(epochs=args.epochs, lr=args.lr, batch_size=args.batch_size)
    if state:
        for name in ["classes"] if args.eval else about:
            change = f"{name} was {state[name]} and is {about[name]} now"
            need(state[name] == about[name], f"--resume: {change}; undo it, or take another --out")
    task = SimpleNamespace(classes=classes, images=images, truth=truth, y=y, about=about)
    task.test_images, task.test_y = test
    task.test_loader = make_loader(ImageDataset(*test, make_transform(args.size)), args)
    return task

# ----------------------------------------------------------------------------------------- loading

def open_image(item, decode=True):
    """An RGB image, upright and on white, of a file or uint8 array. Unless `decode`, a JPEG or PNG
    that ends as such files do is taken for whole and left."""
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    heic = str(item).lower().endswith((".heic", ".heif"))
    hint = "convert it to JPEG or PNG" if heic else "replace or remove it"
    with naming(f"image {item} cannot be read; {hint}"), Image.open(item) as image:
        need(image.mode not in ("I", "F"), "32 bits a pixel have no known range; use 8 or 16")
        with open(item, "rb") as file:
            file.seek(-8, os.SEEK_END)
            whole = file.read().endswith((b"\xff\xd9", b"IEND\xaeB`\x82"))
        return image if whole and not decode else as_seen(image)

def as_seen(image):
    """RGB, as a person would see it: upright, 16 bits scaled, transparency laid on white."""
    image.load()
    with suppress(Exception):  # in place: it turns the pixels before it meets a damaged tag
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits, of which cameras and scanners may use 12
        x = np.asarray(image)
        image = Image.fromarray(np.uint8(x >> max(0, int(x.max()).bit_length() - 8)))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")

def make_transform(size, crops=()):
    """PIL image -> uint8 (3, size, size), bicubic, the aspect not kept. With `crops`: resize to
    512, random crop, resize to 448, flip (SST, "Implementation Details"), all times size / 448."""
    bicubic = v2.InterpolationMode.BICUBIC
    resize = v2.Resize((size, size), bicubic)
    if not crops:
        return v2.Compose([resize, v2.ToImage()])
    full = round(512 * size / 448)
    enlarge = v2.Resize((full, full), bicubic)
    cuts = [v2.RandomCrop(min(full, round(side * size / 448))) for side in crops]
    flip = v2.RandomHorizontalFlip()
    return v2.Compose([enlarge, v2.RandomChoice(cuts), resize, flip, v2.ToImage()])

def normalise(x, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """uint8 (B, 3, H, W) -> float32, on x's device: what travels there is a quarter the size."""
    x = v2.functional.normalize(x / 255, mean, std)
    return x.contiguous(memory_format=torch.channels_last)

EPOCH = torch.tensor(0).share_memory_()  # which workers see change, see Run.begin

class ImageDataset(Dataset):
    """Items (*views, y (C,), index), one uint8 view by each of `transforms`. What is random in them
    hangs on epoch and index alone, so on no number of workers, and a resumed run repeats it."""

    def __init__(self, images, y, *transforms):
        self.images = images
        self.y = torch.as_tensor(y)
        self.transforms = transforms
        self.epoch = EPOCH

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        image = open_image(self.images[i])
        torch.default_generator.manual_seed(hash((self.epoch.item(), int(i))) % 2**63)
        return *(transform(image) for transform in self.transforms), self.y[i], i

def make_loader(data, args, train=False, size=0):
    """Batches of `size` or --batch-size, shared by the processes of torchrun. For training they are
    shuffled, and all whole, since batch statistics want whole ones."""
    size = size or args.batch_size
    need(size % PROCESSES == 0, f"{PROCESSES} processes cannot share {size} images")
    whole = train and len(data) >= size
    sampler = range(RANK, len(data), PROCESSES)
    if train:
        sampler = DistributedSampler(data, PROCESSES, RANK, drop_last=whole)
    style = dict(drop_last=whole, num_workers=args.workers, persistent_workers=args.workers > 0)
    pin = torch.cuda.is_available()
    return DataLoader(data, size // PROCESSES, sampler=sampler, pin_memory=pin, **style)

@torch.no_grad()
def outputs(forward, loader, device, precision="fp32"):
    """The tensors (B, ...) of forward(images) of all batches and processes: (images, ...), CPU."""
    found = []
    for images, _, index in progress(loader, "scores"):
        with autocast(device, precision):
            values = forward(images.to(device))
        # a copy: what comes from a worker holds one of the process's file descriptors
        found.append((index.clone(), *(value.cpu() for value in values)))
    everyone = [found] * PROCESSES
    if PROCESSES > 1:
        distributed.all_gather_object(everyone, found)
    index, *values = map(torch.cat, zip(*sum(everyone, []), strict=True))
    order = index.argsort()
    assert index[order].equal(torch.arange(len(index))), "each image must come exactly once"
    return [value[order] for value in values]

# -------------------------------------------------------------------------------------------- CLIP

def load_clip(arch, weights, size):
    """open_clip's CLIP for images of `size` pixels, and its tokenizer. arch: its name, hf-hub:NAME,
    or local-dir:FOLDER, looked for here and beside this file. weights: "default" (OpenAI's, the
    folder's), "none", a tag of open_clip, or a state dict."""
    scheme, colon, folder = arch.partition(":")
    if scheme == "local-dir" and not Path(folder).exists():
        arch = f"local-dir:{Path(__file__).parent / folder}"
    hint = "try RN50-quickgelu or, offline, local-dir:tests/toy_clip with --size 128; "
    hint += "a TorchScript file of OpenAI: save the state_dict of open_clip.load_openai_model"
    with naming(f"--arch {arch} --weights {weights} --size {size} cannot be used; {hint}"):
        spec = open_clip.get_model_config(arch)
        need(spec, "it is unknown")
        usual = {*"context_length vocab_size width heads layers".split()}
        odd = ({*spec["text_cfg"]} - usual) | ({"custom_text"} & {*spec})
        need(not odd, f"its text tower is not as CLIP's and takes no prompts {sorted(odd)}")
        tag = {"default": "openai", "none": ""}.get(weights, weights)
        quick = open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu")
        need(spec.get("quick_gelu") or not quick, "OpenAI's weights need QuickGELU: -quickgelu")
        own = not colon or weights == "default"
        clip = open_clip.create_model(arch, tag, load_weights=own).eval()
        if not own and weights != "none":
            open_clip.load_checkpoint(clip, weights)
        set_size(clip.visual, size)
        return clip, open_clip.get_tokenizer(arch)

def set_size(visual, size):
    """Make an image tower take `size` pixels; InputError where its features are no square map."""
    side = getattr(visual, "patch_size", [32])[0]  # of a ViT; or the stride of a CLIP ResNet
    table = getattr(getattr(visual, "attnpool", visual), "positional_embedding", None)
    if table is not None:  # open_clip does not resize that of an attention pool
        need(size % side == 0, f"a size is a multiple of {side}, the stride of the tower")
        table.data = resample_abs_pos_embed(table.data[None], [size // side] * 2)[0]
    with naming("its tower pools neither as OpenAI's do nor by a mean over a map"):
        f, u = clip_features(visual, torch.zeros(1, 3, size, size, dtype=torch.uint8))
        fits = f.ndim == 2 and (u.shape[1] ** 0.5).is_integer()
        need(fits, f"its features are {[*f.shape]} and {[*u.shape]}")

def clip_features(visual, images):
    """CLIP's image feature f (B, D) and local features u (B, N, D), unit, N by rows, of an image
    tower of open_clip and images uint8 (B, 3, H, W). u_i is what the end of the tower makes of
    position i alone: a ResNet's attention pool, a ViT's last block (the value path of MaskCLIP,
    ECCV 2022), the head of a convolutional tower of timm."""
    x = normalise(images, visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"])
    pool = getattr(visual, "attnpool", None)
    if hasattr(visual, "trunk"):
        x = visual.trunk.forward_features(x)  # (B, D_in, h, w)
        f = visual.head(visual.trunk.forward_head(x))
        maps = x.flatten(2).transpose(1, 2).flatten(0, 1)[:, :, None, None]  # (B * N, D_in, 1, 1)
        u = visual.head(visual.trunk.forward_head(maps)).unflatten(0, (len(x), -1))
    else:
        out = visual.forward_intermediates(x, indices=1 if pool else 2)
        f = out["image_features"]
        x = out["image_intermediates"][0].flatten(2).transpose(1, 2)  # (B, N, D_in)
        if pool:
            u = pool.c_proj(pool.v_proj(x + pool.positional_embedding[1:]))
        else:  # x enters the last block, in which a position by itself can only read itself
            x = visual.transformer.resblocks[-1](x.flatten(0, 1)[:, None]).view_as(x)
            u = visual.ln_post(x) @ visual.proj
    return normalize(f.float(), dim=-1), normalize(u.float(), dim=-1)

def prompt_tokens(tokenize, prompt, names):
    """Tokens (len(names), context length) of the prompt with each name in the place of {}."""
    need(all(map(str.strip, names)), f"a class has no name for CLIP to read: {names}")
    texts = [prompt.format(name.replace("_", " ")) for name in names]
    tokens = tokenize(texts)
    unique(map(tuple, tokens.tolist()), "CLIP reads one text in two classes, tokens", names)
    return tokens

# ----------------------------------------------------------------------------------------- metrics

def average_precision(logits, y, interpolated=False):
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

def multilabel_metrics(logits, y):
    """Percentages from logits (images, C), float32, and y in {1, 0, -1}; 0 counts nowhere. mAP
    non-interpolated, mAP_interp interpolated, over all but the empty_classes, else NaN. OP OR OF1
    over entries, CP CR CF1 as means over classes, at p >= 0.5; _top3: of an image's 3 highest."""
    need(np.isfinite(logits).all(), "a score is not finite: training diverged; lower --lr")
    ap = average_precision(logits, y)
    result = dict(empty_classes=int(np.isnan(ap).sum()), mAP=float(np.nanmean(ap)))
    result["mAP_interp"] = float(np.nanmean(average_precision(logits, y, interpolated=True)))
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

def pseudo_counts(pseudo, y, truth):
    """(5,): pseudo positives, those with a truth, those right, hidden positives, images. A
    diagnostic: it sees the truth, which is 0 where nobody knows it."""
    guess = (pseudo == 1) & (y == 0)
    hidden = (truth == 1) & (y == 0)
    parts = (guess, guess & (truth != 0), guess & hidden, hidden, torch.ones_like(y[:, 0]))
    return torch.stack([part.sum() for part in parts])

def add_up(totals, **values):
    """totals[name] += value, without its gradient; nothing waits for the device."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0) + value.detach()

def over_processes(totals, net):
    """The totals, each summed over all processes. The buffers of net, as batch statistics, become
    those of the first process."""
    if PROCESSES > 1:
        for value in totals.values():
            distributed.all_reduce(value)
        for buffer in net.buffers():
            distributed.broadcast(buffer, 0)
    return totals

def epoch_entry(totals, steps):
    """Log entries from the totals of an epoch, of all processes: of each `loss...` the mean over
    steps; of `pseudo` (`pseudo_counts`) the number an image, precision and recall or None."""
    entry = {k: x.item() / steps / PROCESSES for k, x in totals.items() if k.startswith("loss")}
    guessed, judged, right, hidden, images = totals.get("pseudo", torch.zeros(5)).tolist()
    entry["pseudo_per_image"] = guessed / images if images else None
    entry["pseudo_precision"] = right / judged if judged else None
    entry["pseudo_recall"] = right / hidden if hidden else None
    return entry

# -------------------------------------------------------------------------------------------- runs

def load_weights(net, weights):
    """Load a state dict, or that of a file, into net; also of DataParallel or of an average. Of a
    file, net keeps its own classification head, which no script uses."""
    path = weights if isinstance(weights, str) else ""
    with naming(f"--weights {path} does not fit the network" if path else "--resume does not fit"):
        state = torch.load(path, "cpu", weights_only=True) if path else weights
        state = {name.removeprefix("module."): x for name, x in state.items()}
        state.pop("n_averaged", None)
        if path:
            own = net.state_dict().items()
            state |= {name: x for name, x in own if name.startswith(("fc.", "classifier."))}
        net.load_state_dict(state)

def remove_if_empty(folder):
    with suppress(OSError):  # it holds a run
        folder.rmdir()

class Run:
    """The folder OUT of a run: log.jsonl, last.pt, samples.png; a dry run writes nothing. `saved`:
    what has a state_dict, goes into checkpoints, and comes from that of --resume."""

    def __init__(self, args, about, state, **saved):
        self.args = args
        self.about = about
        self.saved = saved
        self.device = next(saved["model"].parameters()).device
        self.silent = args.dry_run or RANK > 0
        self.out = None if self.silent else self.folder()
        self.cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if self.cuda else "cpu"
        first = dict(torch=str(torch.__version__), device=name, command=sys.argv, args=vars(args))
        EPOCH.zero_()
        self.log = [{"run": about | first}]
        self.start = 1
        if state:
            self.log = state["log"]
            self.start = state["epoch"] + 1
            for name, item in saved.items():
                with naming(f"--resume: its {name} does not fit"):
                    item.load_state_dict(state[name])
        where = f"log in {self.out}" if self.out else "nothing is written"
        print(f"{about['method']} on {about['data']}, mask {about['mask']}; {where}", flush=True)

    def folder(self):
        """That of the run that is resumed, or a new one, which goes if nothing is written there. Of
        two runs that begin at once, only one can make a folder."""
        out, resume = self.args.out, self.args.resume
        if resume and Path(out).exists():
            if resume == "auto" or Path(resume).parent.samefile(out):
                return Path(out)
        for k in count(1):
            folder = Path(out or f"runs/{self.about['method']}-{self.about['data']}-{k}")
            try:
                folder.mkdir(parents=True)
                weakref.finalize(self, remove_if_empty, folder)
                return folder
            except FileExistsError:
                need(not out, f"--out {out} is there; add --resume auto, or choose another")

    def begin(self, epoch, *loaders, steps=0):
        """Seed order and augmentation with (seed, epoch). steps: if they are not one pass."""
        self.entry = dict(epoch=epoch, lr=self.saved["optimizer"].param_groups[0]["lr"])
        batch = PROCESSES * sum(loader.batch_size for loader in loaders)
        self.images = batch * (steps or len(loaders[0]))
        self.time = time.time()
        seed = hash((self.args.seed, epoch)) % 2**31
        torch.manual_seed(seed)
        EPOCH.fill_(seed)
        for loader in loaders:
            loader.sampler.set_epoch(seed)

    def end(self, entry, **more):
        """Print and log an epoch and save a checkpoint with `more` in it."""
        seconds = time.time() - self.time
        memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else None
        speed = dict(seconds=seconds, images_per_second=self.images / seconds)
        self.add(self.entry | entry | speed | dict(peak_memory_gb=memory))
        if self.silent:
            return
        state = {name: item.state_dict() for name, item in self.saved.items()} | more | self.about
        state |= dict(epoch=self.entry["epoch"], args=vars(self.args), log=self.log)
        last = self.out / "last.pt"  # under another name first: whatever happens, it is whole
        with naming(f"{last} cannot be written; the one before it is whole"):
            with open(last.with_suffix(".tmp"), "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, last)

    def add(self, entry):
        """Print and log an entry; NaN, which JSON does not know, becomes None."""
        entry = {name: None if x != x else x for name, x in entry.items()}
        self.log.append(entry)
        shown = "epoch loss mAP mAP_interp OF1 CF1 pseudo_per_image pseudo_precision seconds"
        there = [name for name in shown.split() if entry.get(name) is not None]
        print("  ".join(f"{name} {entry[name]:.4g}" for name in there), flush=True)
        if not self.silent:
            lines = "".join(f"{json.dumps(line)}\n" for line in self.log)
            (self.out / "log.jsonl").write_text(lines, encoding="utf-8")

    def finish(self, task, logits):
        """Print where the run started, if that was logged, and the last and the best epoch. Draw
        the first test images, logits (images, C)."""
        epochs = [entry for entry in self.log if entry.get("epoch")]
        last = epochs[-1]
        best = max(epochs, key=lambda entry: entry["mAP"] or 0)
        if self.log[1] not in epochs:
            print("before training: mAP", percent(self.log[1]["mAP"]))
        print("| % | last epoch | best on test (what most papers report) |\n| --- | --- | --- |")
        for name in last:
            if name[0] in "OCm":
                print(f"| {name} | {percent(last[name])} | {percent(best[name])} |")
        if self.out:
            some = zip(task.test_images[:18], torch.sigmoid(logits), task.test_y, strict=False)
            drawn = [draw(open_image(image), p, y, task.classes) for image, p, y in some]
            save_image(drawn, self.out / "samples.png", nrow=6)
            print(f"likely labels, green if there, by number if not ASCII: {self.out}/samples.png")

def percent(value):  # None and NaN are what no image can tell
    return "none" if value is None or value != value else f"{value:.2f}"

def draw(image, p, y, classes):
    """(3, 176, 176) in [0, 1]: the image, its likeliest classes by p (C,), coloured by y (C,)."""
    image = image.resize((176, 176))
    for row, c in enumerate(p.topk(min(5, len(p))).indices):
        name = classes[c] if classes[c].isascii() else f"#{c + 1}"  # the font lacks other letters
        style = dict(stroke_width=2, stroke_fill=("gray", "green", "red")[y[c]])
        ImageDraw.Draw(image).text((3, 13 * row), f"{name} {p[c]:.2f}", "white", **style)
    return v2.functional.pil_to_tensor(image) / 255

def report(args, task, logits):
    """--eval: print metrics and the AP of every class; predictions.npz goes to --out."""
    logits = logits.numpy()
    by_class = zip(task.classes, average_precision(logits, task.test_y), strict=True)
    for name, value in [*multilabel_metrics(logits, task.test_y).items(), *by_class]:
        print(f"{name}: {percent(value)}")
    if RANK == 0:
        path = f"{args.out}/predictions.npz"
        np.savez(path, logits=logits, labels=task.test_y, classes=task.classes)

def files_in(path, entered):
    """The path or, of a folder, the files in and below it. Links are followed, but no real folder
    is entered twice; what is hidden is left out, and printed."""
    files = [] if os.path.isdir(path) else [path]
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        left = [name for name in folders + names if name.startswith(".") or real in entered]
        if left:
            print(f"not predicted, hidden or a second time: {', '.join(left)} in {folder}")
        entered.add(real)
        folders[:] = sorted({*folders} - {*left})
        files += [os.path.join(folder, name) for name in sorted({*names} - {*left})]
    return files

@torch.no_grad()
def predict(score, net, args, state):
    """--predict: the five likeliest labels of each image, also of those in folders; all go into
    predictions.csv in --out. score: images -> logits, by net."""
    load_weights(net.eval(), state["model"])
    view = make_transform(args.size)
    device = next(net.parameters()).device
    classes = state["classes"]
    failed = []
    entered = set()
    items = [item for path in args.predict for item in files_in(path, entered)]
    need(items, f"--predict: no file in {args.predict}")
    path = Path(args.out, "predictions.csv")
    # a BOM tells Excel what it is; a name that is not UTF-8 keeps its bytes
    with open(path, "w", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", *classes])
        for item in items:
            try:
                images = view(open_image(item))[None]
            except InputError as error:
                failed.append(str(error))
                continue
            p = torch.sigmoid(score(images.to(device)))[0].cpu()
            table.writerow([item, *p.tolist()])
            best = p.topk(min(5, len(p))).indices
            print(f"{item}:", ", ".join(f"{classes[c]} {p[c]:.2f}" for c in best))
    need(not failed, "; ".join(failed))
