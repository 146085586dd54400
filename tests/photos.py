# SPDX-License-Identifier: MIT
"""Runs a script on real photographs on a CPU: the frozen trunk sees each view of an image once.

    python tests/photos.py CACHE [--images 2000] [--held-out 1000] [--views 4] sst.py ARGUMENTS...
    python tests/photos.py CACHE --probe 0.001 sst.py ARGUMENTS...

The script runs as it is, on the first IMAGES training images, with one difference: what its frozen
trunk (by --train-trunk last of cbsa.py, its stages before the last) makes of an image is looked up
in CACHE, where VIEWS random views of every image, by the script's own transform, were put the first
time they were wanted. The test images are those of the data set or, to choose a setting, the last
HELD_OUT training images. --probe trains, in the place of sst.py's network, a logistic regression a
class on the mean of the map; its C is given. With --data toy it does so on the toy world.
"""

import hashlib
import importlib
import json
import math
import os
import sys
from argparse import REMAINDER, ArgumentParser
from functools import cached_property
from pathlib import Path
from types import MethodType
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from tests import toy  # noqa: E402

normalise = common.normalise
# what two cores can do: a MobileNetV2's map of 5 x 5 positions, narrow heads
RECIPES = dict(
    sst=dict(
        arch="mobilenet_v2", size=160, width=64, hidden=(64, 64), workers=0, train_trunk="none",
        lr=3e-3, weight_decay=1e-5, epochs=12, lr_step=9,
    ),
    cbsa=dict(
        size=160, workers=0, train_trunk="last", lr=3e-5, epochs=10, warm_up=2, ema=0.98,
    ),
    scinet=dict(size=160, workers=0, epochs=5, lr=5e-4),
)  # fmt: skip


class Views(Dataset):
    """As `common.ImageDataset`, with maps (channels, h, w) of a trunk in the place of views."""

    cache, number, trunk, frozen = Path(), 4, None, None  # set by main()

    def __init__(self, images, y: np.ndarray, *transforms) -> None:
        self.y, self.images, self.transforms = torch.as_tensor(y), images, transforms

    @cached_property
    def maps(self) -> list[np.ndarray]:  # of the first item: some data come before the network
        return [self.load(self.images, transform) for transform in self.transforms]

    @classmethod
    def load(cls, images, transform) -> np.ndarray:
        """(images, views, channels, h, w) in half precision."""
        views = cls.number if "Random" in repr(transform) else 1
        if isinstance(images, np.ndarray):  # the toy world
            names = hashlib.sha256(images).hexdigest()
        else:
            names = [Path(image).name for image in images]
        state = cls.frozen.state_dict().values()
        weights = hashlib.sha256(b"".join(x.numpy().tobytes() for x in state)).hexdigest()
        key = repr((weights, names, transform, views))
        path = cls.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
        if not path.exists():
            made = [cls.make(images, transform, seed) for seed in range(views)]
            part = path.with_suffix(f".{os.getpid()}")  # another run may be making the same
            with open(part, "wb") as file:
                np.save(file, np.stack(made, axis=1))
            part.rename(path)
        return np.load(path, mmap_mode="r")

    @classmethod
    @torch.no_grad()
    def make(cls, images, transform, seed: int) -> np.ndarray:
        data = Pictures(images, np.zeros(len(images)), transform)
        data.epoch = torch.tensor(seed)  # what is random hangs on it
        loader = DataLoader(data, 50, num_workers=1)
        return np.concatenate([cls.trunk(x).half().numpy() for x, *_ in tqdm(loader, "views")])

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple:
        chosen = (maps[i, torch.randint(maps.shape[1], ()).item()] for maps in self.maps)
        return *(torch.tensor(x) for x in chosen), self.y[i], i


Pictures = common.ImageDataset


def split(load, images: int, held_out: int):
    def load_data(*args) -> tuple:
        classes, (paths, y), test = load(*args)
        if held_out:
            fits = images + held_out <= len(paths)
            common.need(fits, f"--images and --held-out must share {len(paths)} images")
            test = paths[-held_out:], y[-held_out:]
        return classes, (paths[:images], y[:images]), test

    return load_data


def at_the_end(evaluate):
    """Before the first and after the last epoch only; it is a third of the time."""

    def sometimes(net, task, *more) -> tuple:
        run = Noting.run
        if run and run.entry["epoch"] < run.args.epochs:
            return dict(mAP=math.nan, mAP_interp=math.nan), None
        return evaluate(net, task, *more)

    return sometimes


class Noting(common.Run):
    run = None

    def finish(self, task, logits) -> None:
        print(self.log[-1])

    def begin(self, *given, **more) -> None:
        super().begin(*given, **more)
        Noting.run = self


def probe(args, c: float) -> None:
    """Print the test mAP of logistic regressions on the known entries; features have unit scale."""
    classes, train, test = common.load_data(args.data, args.root)
    y = common.hide_entries(train[1], args.known, args.mask_seed)
    plain = common.make_transform(args.size)
    x, x_test = (Views.load(part[0], plain)[:, 0].mean((2, 3), dtype="f") for part in (train, test))
    scale = x.std(0) + 1e-6
    scores = toy.linear_probe(x / scale, y, x_test / scale, c)
    mean = np.nanmean(common.average_precision(scores, test[1]))
    print(f"linear probe, {args.known:.0%} known, mask seed {args.mask_seed}: mAP {mean:.2f}")


class Known(nn.Module):
    """Images go through the trunk; its maps, which were looked up, stay what they are."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x) if x.shape[1] == 3 else x


def as_float(trunk: nn.Module, x: Tensor) -> Tensor:
    return x.float()


def last_stage(trunk: nn.Module, x: Tensor) -> Tensor:
    return trunk.bn2(trunk.conv_head(trunk.blocks[-1](x.float())))


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--held-out", type=int, default=0)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--probe", type=float, metavar="C")
    parser.add_argument("--recipe", default="{}", help="JSON, what else of the recipe changes")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=REMAINDER)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.cache.mkdir(parents=True, exist_ok=True)
    method = Path(args.script).stem
    script = importlib.import_module(method)
    Views.cache, Views.number = args.cache, args.views
    sys.argv = [args.script, "--data", "coco", *args.arguments]
    recipe = script.RECIPES.get("coco", script.RECIPES["real"]) | RECIPES[method]
    script.RECIPES["coco"] = recipe | json.loads(args.recipe)

    def look_up(net: nn.Module, learns: str) -> tuple:
        frozen, trained = split_trunk(net.eval(), learns)
        Views.frozen, Views.trunk = frozen, lambda x: frozen(normalise(x))
        return Known(frozen), trained

    def load_clip(*given) -> tuple:
        clip, tokenizer = of_clip(*given)
        trunk, numbers = clip.visual.trunk, clip.visual.preprocess_cfg
        frozen, rest = trunk.forward_features, as_float
        Views.frozen = trunk
        if getattr(script.parse_args(sys.argv[1:])[0], "train_trunk", "") == "last":
            frozen = nn.Sequential(trunk.conv_stem, trunk.bn1, *trunk.blocks[:-1])
            rest = last_stage
            Views.frozen = frozen
        # a method of this trunk: that of a copy, such as the teacher, is one of the copy
        trunk.forward_features = MethodType(rest, trunk)
        mean, std = numbers["mean"], numbers["std"]
        Views.trunk = lambda x: frozen(normalise(x, mean, std))
        return clip, tokenizer

    split_trunk = getattr(script, "split_trunk", None)
    of_clip = common.load_clip
    changes = dict(
        ImageDataset=Views, normalise=lambda x, *mean_and_std: x.float(), load_clip=load_clip,
        load_data=split(common.load_data, args.images, args.held_out), Run=Noting,
    )  # fmt: skip
    own = dict(evaluate=at_the_end(script.evaluate))
    if method == "sst":
        own["split_trunk"] = look_up
    with patch.multiple(common, **changes), patch.multiple(script, **own):
        if args.probe:
            given = script.parse_args(sys.argv[1:])[0]
            look_up(script.load_trunk(given.arch, given.weights), "none")
            return probe(given, args.probe)
        common.run_script(script.main)


if __name__ == "__main__":
    main()
