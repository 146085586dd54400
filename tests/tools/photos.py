# SPDX-License-Identifier: MIT
"""Runs a script on real photographs on a CPU: the frozen trunk sees each view of an image once.

    python tests/tools/photos.py CACHE [--images 3000] [--views 3] sst.py ARGUMENTS...
    python tests/tools/photos.py CACHE --probe 0.003 sst.py ARGUMENTS...
    python tests/tools/photos.py CACHE --zero-shot scinet.py ARGUMENTS...

The script runs as it is, on the first IMAGES training images of COCO, with one difference: what its
frozen trunk (of cbsa.py, the stages before the last) makes of an image is looked up in CACHE, where
VIEWS random views of every image, by the script's own transform, were put the first time they were
wanted. The test images are those of the data set or, to choose a setting, the last HELD_OUT
training images. sst.py takes a classifier of torchvision with `features`, such as mobilenet_v2.
--probe trains, in the place of the script's network, a logistic regression a class on the same
labels: of sst.py on the mean of the trunk's map, of the others on CLIP's image feature. It prints
the mAP for each C. --zero-shot tests the network before training.
"""

import hashlib
import importlib
import json
import os
import sys
from argparse import REMAINDER, ArgumentParser
from pathlib import Path
from types import MethodType
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import get_model
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
from tests.tools.variants import VARIANTS  # noqa: E402

RECIPES = dict(  # what two cores can do: a MobileNetV2's map of 5 x 5 positions, narrow heads
    sst="--arch mobilenet_v2 --width 64 --epochs 12 --lr 3e-3 --lr-step 9 --weight-decay 1e-5",
    cbsa="--epochs 10 --warm-up 2 --lr 1.5e-5 --ema 0.98",
    scinet="--epochs 5 --lr 5e-4",
)


class Views(Dataset):
    """As `common.ImageDataset`, with maps (channels, h, w) of a trunk in the place of views."""

    cache, number = Path(), 3  # set by main()
    trunk, name = None, ""  # set when the network is loaded

    def __init__(self, images, size, smallest_crop=0, strengths=((0, 0.0, 0.1),)):
        self.maps = [self.load(images, size, smallest_crop, strength) for strength in strengths]

    @classmethod
    def load(cls, images, *how) -> np.ndarray:
        """(images, views, channels, h, w) in half precision."""
        views = cls.number if how[1] else 1
        names = [Path(image).name for image in images]
        key = hashlib.sha256(repr((cls.name, names, how, views)).encode()).hexdigest()[:12]
        path = cls.cache / f"{key}.npy"
        if not path.exists():
            made = [cls.make(images, how, seed) for seed in range(views)]
            part = path.with_suffix(f".{os.getpid()}")  # another run may be making the same
            with open(part, "wb") as file:
                np.save(file, np.stack(made, axis=1))
            part.rename(path)
        return np.load(path, mmap_mode="r")

    @classmethod
    @torch.no_grad()
    def make(cls, images, how, seed: int) -> np.ndarray:
        state = torch.get_rng_state()
        torch.manual_seed(seed)  # what is random depends on it
        loader = DataLoader(common.ImageDataset(images, *how[:2], [how[2]]), 50, num_workers=1)
        maps = [cls.trunk(x).half().numpy() for x, _ in tqdm(loader, "views", disable=None)]
        torch.set_rng_state(state)
        return np.concatenate(maps)

    def __len__(self) -> int:
        return len(self.maps[0])

    def __getitem__(self, i: int) -> tuple:
        chosen = (maps[i, torch.randint(maps.shape[1], ()).item()] for maps in self.maps)
        return *(torch.tensor(x) for x in chosen), i


def split(load, images: int, held_out: int):
    """load_data, with the first `images` training images and perhaps other test images."""

    def load_data(name, root, part, limit=0, fetch=False) -> tuple:
        held = held_out and part == "test"
        classes, paths, y = load(name, root, "train" if held else part, limit, fetch)
        common.need(images + held_out <= len(paths) or part == "test", "--images are too many")
        chosen = slice(-held_out, None) if held else slice(images if part == "train" else None)
        return classes, paths[chosen], y[chosen]

    return load_data


class Known(nn.Module):
    """Maps were looked up, and stay what they are. An image shows how many channels they have."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.channels, 2, 2) if x.shape[1] == 3 else x


def name_of(module: nn.Module) -> str:
    state = module.state_dict().values()
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in state)).hexdigest()


def load_trunk(arch: str, weights: str) -> tuple:
    net = get_model(arch)
    if weights != "none":
        net.load_state_dict(torch.load(weights))
    trunk = net.eval().features
    Views.trunk = lambda x: trunk(common.normalise(x))
    Views.name = name_of(trunk)
    return Known(net.last_channel), nn.Identity()


def as_it_is(trunk: nn.Module, x: Tensor) -> Tensor:
    return x


def last_stage(trunk: nn.Module, x: Tensor) -> Tensor:
    return trunk.bn2(trunk.conv_head(trunk.blocks[-1](x)))


def looking_up(load_clip, tuned: bool):
    """load_clip, whose image tower takes maps. tuned: those before the last stage, which learns."""

    def load(*given) -> tuple:
        clip, *more = load_clip(*given)
        trunk = clip.visual.trunk
        frozen = trunk.forward_features
        rest = as_it_is
        Views.name = name_of(trunk)
        if tuned:
            frozen = nn.Sequential(trunk.conv_stem, trunk.bn1, *trunk.blocks[:-1])
            rest = last_stage
            Views.name = name_of(frozen)
        # a method of this trunk: that of a copy, such as the teacher, is one of the copy
        trunk.forward_features = MethodType(rest, trunk)
        numbers = clip.visual.preprocess_cfg
        Views.trunk = lambda x: frozen(common.normalise(x, numbers["mean"], numbers["std"]))
        return clip, *more

    return load


def logistic_regression(x: np.ndarray, y: np.ndarray, c: float) -> tuple[Tensor, Tensor]:
    """Weights (D, C) and biases (C,) of one regression a class, on the known entries of y (n, C) in
    {1, 0, -1}; the objective of scikit-learn's, all classes at once. x (n, D)."""
    x, y = torch.tensor(x), torch.tensor(y).float()
    w = torch.zeros(x.shape[1], y.shape[1], requires_grad=True)
    b = torch.zeros(y.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=300, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        fit = -(nn.functional.logsigmoid(y * (x @ w + b)) * y.abs()).sum()
        value = c * fit + (w**2).sum() / 2
        value.backward()
        return value

    optimizer.step(objective)
    return w.detach(), b.detach()


def write(args, mean: float, classes: int) -> None:
    """A log as that of a run."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    first = dict(run=dict(args=vars(args) | dict(epochs=1)))
    lines = first, dict(epoch=1, mAP=mean)
    Path(args.out, "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    print(f"mAP {mean:.2f} of {classes} classes, {args.known:.0%} known, seed {args.mask_seed}")


def probe(script, args, costs: list[float], load_data) -> None:
    (classes, *train), (_, *test) = (load_data(args.data, args.root, k) for k in ("train", "test"))
    hide = script.hide_images if script.__name__ == "cbsa" else script.hide_entries
    y = hide(train[1], args.known, args.mask_seed)
    if script.__name__ == "sst":
        load_trunk(args.arch, args.weights)
        size = args.size
        features = lambda maps: torch.tensor(maps.mean((2, 3), dtype="f"))  # noqa: E731
    else:
        clip, _, size = script.load_clip(args.arch, args.weights, args.size)
        features = lambda maps: script.clip_features(clip.visual, torch.tensor(maps))[0]  # noqa: E731
    with torch.no_grad():
        x, x_test = (features(Views(part[0], size).maps[0][:, 0]).numpy() for part in (train, test))
    scale = x.std(0) + 1e-6
    for c in costs:
        w, b = logistic_regression(x / scale, y, c)
        logits = torch.tensor(x_test / scale) @ w + b
        metrics = common.multilabel_metrics(logits.numpy(), test[1], classes)
        print(f"C {c:g}: ", end="")
        write(args, metrics["mAP"], len(metrics["AP"]))


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--held-out", type=int, default=0)
    parser.add_argument("--views", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--probe", metavar="C", help="one, or several with commas between them")
    parser.add_argument("--zero-shot", action="store_true")
    parser.add_argument("--whole-images", action="store_true", help="hide as cbsa.py does")
    parser.add_argument("--variant", choices=VARIANTS, action="append", default=[])
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=REMAINDER)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.cache.mkdir(parents=True, exist_ok=True)
    method = Path(options.script).stem
    script = importlib.import_module(method)
    Views.cache, Views.number = options.cache, options.views
    flags = f"--data coco --workers 0 {RECIPES[method]} {'--size 160' if method == 'sst' else ''}"
    given = [*flags.split(), *options.arguments]
    sys.argv = [options.script, *given]
    args, checkpoint = script.parse_args(given)
    changes = dict(
        ImageDataset=Views,
        load_data=split(common.load_data, options.images, options.held_out),
        normalise=lambda x, *mean_and_std: x.float(),
        save_pictures=lambda *given: None,
    )
    if method == "sst":
        # a resumed run asks for no weights, but this trunk is in no checkpoint
        changes["load_trunk"] = lambda arch, _: load_trunk(arch, args.weights)
    else:
        changes["load_clip"] = looking_up(script.load_clip, tuned=method == "cbsa")

    def before_training(net, train, test, *more) -> None:
        classes = more[-3]["classes"]
        logits = script.evaluate(net, test[0], args)[0]
        metrics = common.multilabel_metrics(logits, test[1], classes)
        write(args, metrics["mAP"], len(metrics["AP"]))

    if options.whole_images:
        changes["hide_entries"] = common.hide_images
    if options.zero_shot:
        changes["fit"] = before_training
    with patch.multiple(script, **changes):
        for variant in options.variant:
            VARIANTS[variant](script)
        if options.probe:
            costs = [float(c) for c in options.probe.split(",")]
            return probe(script, args, costs, changes["load_data"])
        script.main(args, checkpoint)


if __name__ == "__main__":
    main()
