# SPDX-License-Identifier: MIT
"""Times a step of each method against the bare cost of its backbone, and the loading of images.

    python tests/tools/benchmark.py [--device cpu|cuda] [--only NAME ...] [--images DIR]

Run by hand, beside nothing else. A line is the median of a over the median of b, taken in turn in
one process. A step is what the script does with a batch, from the uint8 images to the changed
weights; the backbone's is forward and backward of the same trained stages with a linear head, on
the same views. Peak memory is that of a process of its own, above what the imports take. On CUDA:
ResNet-101 at 448 pixels and CLIP's ResNet-101 at 224, batches of 32, in bfloat16.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cbsa  # noqa: E402
import common  # noqa: E402
import scinet  # noqa: E402
import sst  # noqa: E402

cuda = False  # the device, and with it the size of everything


def place(x):
    if isinstance(x, nn.Module):
        return x.to("cuda" if cuda else "cpu", memory_format=torch.channels_last)
    return x.to("cuda" if cuda else "cpu")


def partial_labels(rows: int, C: int, known: float) -> torch.Tensor:
    y = torch.where(torch.rand(rows, C) < 2.9 / 80, 1, -1)  # as many as in COCO
    return torch.where(torch.rand(rows, C) < known, y, 0).to(torch.int8)


class Batches(list):
    """A loader of one batch."""

    def __init__(self, *batches):
        super().__init__(batches)
        self.dataset = range(len(batches[0][0]))


def backbone(stages: nn.Module, trained, views: torch.Tensor, width: int, C: int):
    """Forward of a network, backward of its trained parameters, and a linear head."""
    stages = place(stages.eval().requires_grad_(False))
    head = place(nn.Linear(width, C))
    for p in trained:
        p.requires_grad_(True)

    def step():
        with torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, enabled=cuda):
            f = stages(common.normalise(place(views)))
            head(f.flatten(2).mean(2) if f.ndim == 4 else f).float().mean().backward()
        for p in (*head.parameters(), *stages.parameters()):
            p.grad = None

    return step


def sst_step(C: int = 80, known: float = 0.1, arch: str = "", whole: bool = False):
    arch = arch or ("resnet101" if cuda else "resnet18")
    size, width, B = (448, 1024, 32) if cuda else (224, 256, 8)
    if arch == "resnet101" and not cuda:
        size, width, B = 448, 1024, 2
    flags = f"--data coco --arch {arch} --weights none --size {size} --width {width} --glove none"
    args, _ = sst.parse_args(f"{flags} --precision {'bf16' if cuda else 'fp32'}".split())
    classes = [f"{c} things" for c in range(C)]
    y = partial_labels(2000, C, known)
    net = place(sst.build(args, classes, y.numpy(), None))
    net.frozen.requires_grad_(whole)
    optimizer = torch.optim.Adam(net.parameters(), args.lr)
    net.prototypes.copy_(torch.randn(C, width))
    images = torch.randint(256, (B, 3, size, size), dtype=torch.uint8)
    batch = (images, y[:B], torch.arange(B), *sst.choose_pairs(y[:B]))
    loader = Batches(batch)

    def step():  # epoch 20: both thresholds let pseudo-labels through
        sst.train_one_epoch(net, net, loader, optimizer, 20, args)

    def floor():
        frozen, trained = sst.load_trunk(arch, "none")
        width = net.project.in_channels
        trunk = nn.Sequential(frozen, trained)
        parameters = (trunk if whole else trained).parameters()
        return backbone(trunk, parameters, images, width, C)

    return step, floor


def clip_args(script, arch: str, size: int):
    arch = arch or ("RN101-quickgelu" if cuda else "local-dir:tests/toy/clip")
    flags = f"--data coco --arch {arch} --weights none --size {size} --epochs 9"
    return script.parse_args(f"{flags} --precision {'bf16' if cuda else 'fp32'}".split())[0]


def cbsa_step(C: int = 80, arch: str = ""):
    B = 32 if cuda else 8
    args = clip_args(cbsa, arch, 224)
    classes = [f"{c} things" for c in range(C)]
    y = partial_labels(2000, C, 1)
    net = place(cbsa.build(args, classes, y, None))
    teacher = place(cbsa.build(args, classes, y, None))
    optimizer = torch.optim.AdamW(net.parameters(), args.lr)
    images = torch.randint(256, (B, 3, 224, 224), dtype=torch.uint8)
    own = (torch.arange(B) < B // 8)[:, None].to(torch.int8)
    labels = (y[:B], cbsa.context_labels(y[:B], net.member.cpu()), own)
    loader = Batches((images, torch.arange(B)))

    def step():
        cbsa.train_one_epoch(net, net, teacher, loader, optimizer, labels, 5, args)

    def floor():
        visual = cbsa.load_clip(args.arch, "none", 224)[0].visual
        width = visual.output_dim
        return backbone(visual, cbsa.last_stage(visual), images, width, C)

    return step, floor


def scinet_step(C: int = 80, arch: str = ""):
    B = 32 if cuda else 8
    args = clip_args(scinet, arch, 224)
    net = place(scinet.build(args, [f"{c} things" for c in range(C)], None, None))
    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, args.lr)
    views = [torch.randint(256, (B, 3, 224, 224), dtype=torch.uint8) for _ in range(3)]
    fused = np.random.default_rng(0).random((B, C), "float32")
    known = (partial_labels(B, C, 0.1).numpy(), fused, fused.mean(0))
    loader = Batches((*views, torch.arange(B)))

    def step():
        scinet.train_one_epoch(net, net, loader, optimizer, known, args)

    def floor():  # the tower is frozen: the head alone goes backward
        visual = scinet.load_clip(args.arch, "none", 224)[0].visual
        return backbone(visual, [], torch.cat(views), visual.output_dim, C)

    return step, floor


def load_images(size: int, images: str | None, number: int):
    """Loading and transforming photographs of a size in pixels for 448, by one core."""
    paths = sorted(Path(images).rglob("*.jpg"))[:number] if images else []
    if not paths:  # drawn ones
        folder = Path(tempfile.mkdtemp())
        scenes = common.load_data("toy", "", "train", number)[1]
        for k, scene in enumerate(scenes):
            paths.append(folder / f"{k}.jpg")
            Image.fromarray(scene).resize((size, 3 * size // 4)).save(paths[-1], quality=90)
    data = common.ImageDataset(paths, 448, 256)
    plain = common.make_view(448)

    def whole():  # decoded at its full size
        for path in paths:
            plain(Image.open(path).convert("RGB"))

    return lambda: [data[k] for k in range(len(paths))], whole, len(paths)


def timed(*calls, repeats: int = 7) -> list[float]:
    """Medians in milliseconds of each of `calls`, which take turns."""
    taken = [[] for _ in calls]
    for k in range(repeats + 1):
        for times, call in zip(taken, calls, strict=True):
            begin = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            if k:  # the first warms up
                times.append(1000 * (time.perf_counter() - begin))
    return [statistics.median(times) for times in taken]


def peak(name: str, C: int) -> float:
    """Peak memory in MB of building a step, or the backbone's alone, and doing it three times."""
    command = [sys.executable, __file__, "--device", "cuda" if cuda else "cpu"]
    command += ["--peak", name, str(C)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back at once what is freed
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return float(done.stdout.split()[-1])


def print_peak(name: str, C: int) -> None:
    def used() -> float:  # of this process alone; getrusage() inherits its parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024

    before = used()
    step, floor = sst_step(C, whole=name.startswith("whole"))
    call = floor() if name.endswith("backbone") else step
    for _ in range(3):
        call()
    print(torch.cuda.max_memory_allocated() / 2**20 if cuda else used() - before)


def measurements(images: str | None):
    """(name, function that gives the ratio and the parts)"""
    vit = "ViT-B-16-quickgelu"
    steps = dict(
        sst=sst_step,
        sst_whole_trunk=lambda: sst_step(whole=True),
        sst_resnet101=lambda: sst_step(arch="resnet101"),
        cbsa=cbsa_step,
        scinet=scinet_step,
        cbsa_vit=lambda: cbsa_step(arch=vit),
        scinet_vit=lambda: scinet_step(arch=vit),
    )
    for C in (20, 200):
        steps[f"sst_{C}_classes"] = lambda C=C: sst_step(C)
        steps[f"sst_{C}_classes_whole_trunk"] = lambda C=C: sst_step(C, whole=True)
    steps["sst_half_known"] = lambda: sst_step(known=0.5)
    for name, build in steps.items():

        def over(build=build):
            step, floor = build()
            return timed(step, floor())

        yield f"{name}: step over backbone", over
    for C in (80, 200):
        name = f"sst_memory, {C} classes: step over backbone, MB"
        yield name, lambda C=C: [peak("sst", C), peak("backbone", C)]
        name = f"sst_whole_trunk_memory, {C} classes: step over backbone, MB"
        yield name, lambda C=C: [peak("whole", C), peak("whole backbone", C)]
    for size in (640, 4000):

        def per_core(size=size):
            torch.set_num_threads(1)
            ours, whole, number = load_images(size, images, 32 if size == 640 else 8)
            return [1000 * number / taken for taken in timed(ours, whole, repeats=3)]

        yield f"images of {size} a second and core: training view, whole plain view", per_core


def main() -> None:
    global cuda
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", help="lines whose name begins so")
    parser.add_argument("--images", help="folder of JPEGs for the loader; default: drawn ones")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    torch.manual_seed(0)
    if args.peak:
        return print_peak(args.peak[0], int(args.peak[1]))
    print("| | ratio | a | b |\n| --- | --- | --- | --- |")
    for name, measure in measurements(args.images):
        if not args.only or name.startswith(tuple(args.only)):
            a, b = measure()
            print(f"| {name} | {a / b:.2f} | {a:.1f} | {b:.1f} |", flush=True)


if __name__ == "__main__":
    main()
