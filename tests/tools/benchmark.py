# SPDX-License-Identifier: MIT
"""Times each method against the bare cost of its backbone, and equations against a literal reading.

    python tests/benchmark.py [--device cpu|cuda] [--json] [--only NAME ...] [--images DIR]

Run by hand. A line is the median of a over the median of b, taken in turn in one process. A step
is what the script does with a batch of a 10 % known data set, from the uint8 images to the changed
weights; the backbone's is forward and backward of the same trained stages with a linear head, on
the same views. Peak memory is that of a process of its own, above what the imports take.
"""

import argparse
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cbsa  # noqa: E402
import common  # noqa: E402
import scinet  # noqa: E402
import sst  # noqa: E402
from tests import toy  # noqa: E402
from tests.ablations import markdown_table  # noqa: E402

cuda = False  # the device, and with it the size of everything


def place(x):
    if isinstance(x, nn.Module):
        return x.to("cuda" if cuda else "cpu", memory_format=torch.channels_last)
    return x.to("cuda" if cuda else "cpu")


def partial_labels(rows: int, C: int, known: float = 0.1) -> torch.Tensor:
    y = torch.where(torch.rand(rows, C) < 2.9 / 80, 1, -1)  # as many as in COCO
    return torch.where(torch.rand(rows, C) < known, y, 0).to(torch.int8)


def classes_of(C: int) -> list[str]:
    return [f"class {k}" for k in range(C)]


def bare(frozen: nn.Module, trained: nn.Module, images: torch.Tensor, width: int, C: int):
    """Forward and backward of a backbone, its frozen stages without gradient, and a linear head."""
    head, trained, frozen = place(nn.Linear(width, C)), place(trained), place(frozen)
    frozen.eval().requires_grad_(False)
    trained.eval().requires_grad_(True)

    def step():
        with torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, enabled=cuda):
            with torch.no_grad():
                z = frozen(common.normalise(place(images)))
            head(trained(z).flatten(2).mean(2)).float().mean().backward()
        for p in (*head.parameters(), *trained.parameters()):
            p.grad = None

    return step


def sst_step(C: int = 80, trunk: str = "all", known: float = 0.1, arch: str = ""):
    size, width, B = (448, 1024, 32) if cuda else (224, 256, 8)
    arch = arch or ("resnet101" if cuda else "resnet18")
    if arch == "resnet101":
        size, width, B = 448, 1024, B if cuda else 2
    flags = f"--data coco --arch {arch} --weights none --size {size} --width {width} --glove none"
    flags += f" --train-trunk {trunk} --precision {'bf16' if cuda else 'fp32'}"
    args, y = sst.parse_args(flags.split())[0], partial_labels(B, C, known)
    words = torch.randn(C, 300)
    net = place(sst.build(args, words, sst.cooccurrence(partial_labels(2000, C, known))))
    optimizer = torch.optim.Adam(net.parameters(), args.lr, fused=True)
    images, index = torch.randint(256, (B, 3, size, size), dtype=torch.uint8), torch.arange(B)
    net.prototypes, truth = place(torch.randn(C, width)), place(partial_labels(B, C, 1))

    def step():  # epoch 20: both thresholds let pseudo-labels through
        batches = [(images, y, index)]
        sst.train_one_epoch(net, batches, optimizer, truth, 20, args)

    def floor():
        frozen, trained = sst.split_trunk(sst.load_trunk(arch, "none"), trunk)
        channels = net.project[0].in_channels
        return bare(frozen, trained, images, channels, C)

    return step, floor


def clip_flags(arch: str) -> str:
    arch = arch or ("RN101-quickgelu" if cuda else "local-dir:tests/toy_clip")
    precision = "bf16" if cuda else "fp32"
    return f"--data coco --arch {arch} --weights none --size 224 --precision {precision}"


def tower(visual: nn.Module, views: list, C: int, learns: bool):
    """Forward of a CLIP's image tower, backward of its last stage if that learns, a linear head."""
    visual, head = place(visual.requires_grad_(False)), place(nn.Linear(visual.output_dim, C))
    learned = cbsa.last_stage(visual) if learns else []
    for p in learned:
        p.requires_grad_(True)
    x = torch.cat(views)

    def step():
        with torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, enabled=cuda):
            head(visual(common.normalise(place(x)))).float().mean().backward()
        for p in (*head.parameters(), *learned):
            p.grad = None

    return step


def optimizing(net: nn.Module, lr: float):
    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr, fused=True)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1)


def cbsa_step(C: int = 80, arch: str = ""):
    B = 32 if cuda else 8
    args = cbsa.parse_args(clip_flags(arch).split())[0]
    net = place(cbsa.build(args, classes_of(C), torch.eye(10).repeat(C // 10, 1)))
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)
    teacher = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=decay)
    images, index = torch.randint(256, (B, 3, 224, 224), dtype=torch.uint8), torch.arange(B)
    y = partial_labels(B, C, 1)
    halves = [[(images[k : k + B // 2], y, index[k : k + B // 2])] for k in (0, B // 2)]
    more = *optimizing(net, args.lr), (y, y[:, :10].clone()), args

    def step():
        with patch.object(cbsa, "endless", iter):  # one batch, which is no loader's
            cbsa.train_one_epoch(net, teacher, halves, 1, *more)

    def floor():
        return tower(cbsa.build(args, classes_of(C), net.member).visual, [images], C, True)

    return step, floor


def scinet_step(C: int = 80, arch: str = ""):
    B = 32 if cuda else 8
    args = scinet.parse_args(clip_flags(arch).split())[0]
    net = place(scinet.build(args, classes_of(C)))
    views = [torch.randint(256, (B, 3, 224, 224), dtype=torch.uint8) for _ in range(3)]
    y, index, p = partial_labels(B, C), torch.arange(B), torch.rand(B, C)
    memory = scinet.Memory(p, torch.ones(B, 1), p.clone(), torch.eye(C), torch.full((C,), 0.6))
    more = *optimizing(net, args.lr), memory, 5, args

    def step():
        scinet.train_one_epoch(net, [(*views, y, index)], *more)

    def floor():  # the tower is frozen: the head alone goes backward
        return tower(scinet.build(args, classes_of(C)).visual, views, C, False)

    return step, floor


# ----------------------------------------------------------- equations against a literal reading


def ist(C: int = 80, B: int = 8, D: int = 1024, known: float = 0.1):
    """Eq. 1-4 and Eq. 2's labels, forward and backward: every ordered pair, as printed."""
    net, y = place(sst.PairNet(D, (512, 512))), place(partial_labels(B, C, known))
    f = place(torch.randn(B, C, D)).requires_grad_()

    def ours():
        target = sst.pair_targets(y)
        logits = net(f, (target != 0) | (y == 1)[:, None])
        loss = sst.ist_loss(logits, target)
        sst.intra_pseudo_labels(torch.sigmoid(logits.detach()), y, 0.75)
        loss.backward()

    def literal():
        a, b = f[:, :, None].expand(B, C, C, D), f[:, None].expand(B, C, C, D)
        x = torch.relu(net.first(torch.cat((a, b), dim=-1)))
        p = torch.sigmoid(net.last(torch.relu(net.second(x)))).squeeze(-1)
        one, two = y[:, :, None], y[:, None]
        present, known = (one == 1) & (two == 1), (one != 0) & (two != 0)
        p_m = (p - 0.05).clamp(min=0)
        loss = torch.where(present, -(1 - p) * torch.log(p), -(p_m**2) * torch.log(1 - p_m))
        ((loss * known).sum() / known.sum().clamp(min=1)).backward()
        score = (p.detach() * (two == 1)).sum(-1) / (two == 1).sum(-1).clamp(min=1)
        torch.where((y == 0) & (score >= 0.75), 1, y)

    return literal, ours


def ist_of_authors(C: int = 80, B: int = 8, D: int = 1024):
    """Eq. 1-4 of every unordered pair, concatenated, with an output vector for each, as SST's
    authors build them but for the width of the first layer; against ours with --pairs all."""
    net, y = place(sst.PairNet(D, (512, 1024))), place(partial_labels(B, C))
    f, (i, j) = place(torch.randn(B, C, D)).requires_grad_(), torch.triu_indices(C, C, 1)
    vector = place(nn.Linear(1024, len(i))).weight

    def ours():
        target = sst.pair_targets(y, "all")
        logits = net(f, target != 0)
        sst.intra_pseudo_labels(torch.sigmoid(logits.detach()), y, 0.75)
        sst.ist_loss(logits, target).backward()

    def theirs():
        pairs = torch.cat((f[:, i], f[:, j]), dim=-1)  # (B, pairs, 2D)
        hidden = torch.relu(net.second(torch.relu(net.first(pairs))))
        logits = (hidden * vector).sum(-1)
        matrix = logits.new_zeros(B, C, C)
        matrix[:, i, j] = matrix[:, j, i] = logits
        sst.intra_pseudo_labels(torch.sigmoid(matrix.detach()), y, 0.75)
        sst.ist_loss(matrix, sst.pair_targets(y, "all")).backward()

    return theirs, ours


def cst(C: int = 80, B: int = 8, D: int = 1024, stored: int = 100):
    """Eq. 5-8, forward and backward: cosines with every stored positive, and of every pair. SST's
    authors store 100 a class too."""
    bank = place(nn.functional.normalize(torch.randn(C, stored, D), dim=-1))
    f, y = place(torch.randn(B, C, D)).requires_grad_(), place(partial_labels(B, C, 0.5))
    prototype = bank.mean(1)

    def ours():
        sst.cross_pseudo_labels(f, y, prototype, 0.75)
        sst.cst_loss(f, y).backward()

    def literal():
        similarity = nn.functional.cosine_similarity(f[:, :, None], bank, dim=-1).mean(-1)
        torch.where((y == 0) & (similarity >= 0.75), 1, y)
        s = nn.functional.cosine_similarity(f[:, None], f[None], dim=-1)  # (B, B, C)
        different = ~torch.eye(B, dtype=torch.bool, device=y.device)[:, :, None]
        present = (y[:, None] == 1) & (y[None] == 1) & different
        rest = (y[:, None] != 0) & (y[None] != 0) & different & ~present
        attract = ((1 - s) * present).sum() / present.sum().clamp(min=1)
        (attract + ((1 + s) * rest).sum() / rest.sum().clamp(min=1)).backward()

    return literal, ours


# ------------------------------------------------------------------------------------ the rest


def fusion(n: int, C: int = 80, K: int = 10):
    """The steps of the fixed point, the neighbours given."""
    y, s = partial_labels(n, C), torch.rand(n, C)
    where = torch.stack((torch.arange(n).repeat_interleave(K), torch.randint(n, (n * K,))))
    a_n = torch.sparse_coo_tensor(where, torch.full((n * K,), 1 / K), (n, n)).to_sparse_csr()
    a_q = scinet.label_graph(torch.where(y == 0, s, (y == 1).float()), 5)
    return lambda: scinet.fuse(s, y, a_n, a_q, 1.0, 0.1)


def neighbours(n: int, D: int = 512):
    f = nn.functional.normalize(torch.randn(n, D), dim=-1)
    return lambda: scinet.instance_graph(f, 10, 0.3)


def metrics():
    logits = np.random.default_rng(0).standard_normal((40504, 80)).astype(np.float32)
    truth = partial_labels(40504, 80, 1).numpy()
    return lambda: common.multilabel_metrics(logits, truth)


def loader(images: str | None, number: int = 64):
    """Decoding and the paper's transforms at 448 px, one process, one thread."""
    paths = sorted(Path(images).rglob("*.jpg"))[:number] if images else []
    if not paths:  # scenes of the size of COCO's photographs
        folder = Path(tempfile.mkdtemp())
        for k, scene in enumerate(toy.scenes(number, 0)[0]):
            paths.append(folder / f"{k}.jpg")
            Image.fromarray(scene).resize((640, 480)).save(paths[-1], quality=90)
    views = common.make_transform(448, sst.RECIPES["real"]["crops"])
    data = common.ImageDataset(paths, np.zeros((len(paths), 1)), views)
    return lambda: [data[k] for k in range(len(paths))], len(paths)


# ------------------------------------------------------------------------------------ measuring


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


PEAKS = {  # name: call that builds what is measured, then runs
    "sst": lambda C: sst_step(C)[0],
    "backbone": lambda C: sst_step(C)[1](),
    "ist literal": lambda C: ist(C)[0],
    "ist": lambda C: ist(C)[1],
    "cst literal": lambda C: cst(C)[0],
    "cst": lambda C: cst(C)[1],
}


def peak(name: str, C: int) -> float:
    """Peak memory in MB of building and calling PEAKS[name] three times."""
    command = [sys.executable, __file__, "--device", "cuda" if cuda else "cpu"]
    command += ["--peak", name, str(C)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back at once what is freed
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return float(done.stdout)


def print_peak(name: str, C: int) -> None:
    def used():  # of this process alone; getrusage() inherits its parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024

    before, call = used(), PEAKS[name](C)
    for _ in range(3):
        call()
    print(torch.cuda.max_memory_allocated() / 2**20 if cuda else used() - before)


def measurements(images: str | None):
    """(name, call that gives the rest of the line)"""

    def over(step, floor):
        return timed(step, floor())

    steps = dict(sst=sst_step, sst_last=lambda: sst_step(trunk="last"), cbsa=cbsa_step)
    steps["scinet"] = scinet_step
    for name, step in (("cbsa_vit", cbsa_step), ("scinet_vit", scinet_step)):
        steps[name] = lambda step=step: step(arch="ViT-B-16-quickgelu")
    for name, build in steps.items():
        yield f"{name}_step_over_backbone", lambda build=build: over(*build())
    for C in (20, 80, 200):
        for known in (0.1, 0.5, 1.0):
            yield (
                f"sst_{C}_classes_{known:.0%}_known_step_over_backbone",
                lambda C=C, known=known: over(*sst_step(C, known=known)),
            )
    paper = lambda: over(*sst_step(trunk="last", arch="resnet101"))  # noqa: E731
    yield "sst_resnet101_step_over_backbone", paper
    for known in (0.1, 0.5):
        yield f"ist_{known:.0%}_known_vs_literal", lambda known=known: timed(*ist(known=known))
    yield "ist_vs_a_vector_per_pair", lambda: timed(*ist_of_authors())
    yield "cst_vs_literal", lambda: timed(*cst())
    for name in ("ist", "cst"):
        yield (
            f"{name}_memory_vs_literal",
            lambda name=name: [None, None, peak(f"{name} literal", 80), peak(name, 80)],
        )
    for C in (20, 80, 200):
        yield f"sst_step_{C}_classes_over_20", lambda C=C: timed(sst_step(C)[0], sst_step(20)[0])
    for C in (80, 200):
        yield (
            f"sst_memory_{C}_classes_over_backbone",
            lambda C=C: [None, None, peak("sst", C), peak("backbone", C)],
        )
    for n in (2000, 8000, 32000):
        yield f"fusion_{n}_images_over_2000", lambda n=n: timed(fusion(n), fusion(2000))
    for n in (2000, 8000):
        yield f"neighbours_{n}_images", lambda n=n: [*timed(neighbours(n), repeats=3), None]
    yield "metrics_40504x80", lambda: [*timed(metrics(), repeats=3), None]

    def per_core():
        torch.set_num_threads(1)
        call, number = loader(images)
        milliseconds = timed(call, repeats=3)[0]
        return [milliseconds / number, None, None, None, 1000 * number / milliseconds]

    yield "loader_images_per_second_per_core", per_core


def main() -> None:
    global cuda
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--only", nargs="+", help="lines whose name begins so")
    parser.add_argument("--images", help="folder of JPEGs for the loader; default: drawn ones")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    logging.disable(logging.WARNING)  # open_clip warns of each tower without weights
    warnings.filterwarnings("ignore", "Sparse")  # of torch
    torch.manual_seed(0)
    if args.peak:
        return print_peak(args.peak[0], int(args.peak[1]))
    rows = []
    for name, measure in measurements(args.images):
        if args.only and not name.startswith(tuple(args.only)):
            continue
        a, b, peak_a, peak_b, ratio = [*measure(), None, None, None][:5]
        if ratio is None and (b or peak_b):
            ratio = a / b if b else peak_a / peak_b
        line = dict(name=name, ratio=ratio, a_ms=a, b_ms=b, peak_mb=peak_a)
        if args.json:
            rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}
            print(json.dumps(rounded), flush=True)
        else:
            values = (ratio, a, b, peak_a, peak_b)
            cells = ["" if v is None or math.isnan(v) else f"{v:.2f}" for v in values]
            rows.append([name, *cells])
            print(f"{name} {cells[0]}", file=sys.stderr, flush=True)
    if rows:
        header = ["", "ratio or value", "a, ms", "b, ms", "peak of a, MB", "peak of b, MB"]
        print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
