# SPDX-License-Identifier: MIT
"""Structured Semantic Transfer (SST): multi-label recognition when single labels are missing.

Chen, Pu, Wu, Xie, Lin: Structured Semantic Transfer for Multi-Label Recognition with Partial
Labels, AAAI 2022. Each class attends to its own place in the image and gets its own feature. Two
modules guess unknown labels: IST looks inside the image, where a learned co-occurrence lets known
positives vouch for others; CST looks across images, where a feature close to those of a class's
known positives gets the class. The known labels and both completed sets train the classifier.

Run:  python sst.py                                                toy world, 10 % known
      python sst.py --no-ist --no-cst                              the baseline, SSGRL
      python sst.py --data coco --root DIR --known 0.5             the paper's recipe
      python tests/ablations.py sst                                the table of the README

Measured: toy world, three seeds, mAP of the last epoch: 78.4 ± 0.1 at 10 % known, 83.5 ± 0.5 at
30 %, 85.7 ± 0.5 at 50 %; SSGRL 74.9 ± 1.6, 82.0 ± 0.5, 84.6 ± 0.4. About 110 s on 2 CPU cores.

Differs from the paper:
 1. Eq. 2 averages over the known positives (--intra-reduce sum for the letter): five times 0.2
    would pass any threshold.
 2. Eq. 4 gets its minus sign and max(p - m, 0). Its negatives are pairs with both labels known
    (--pairs either, all for others): any other choice sees negatives oftener than positives the
    fewer labels are known, and no p passes the threshold.
 3. Eq. 6 keeps the mean unit feature of a class from the last epoch, which is the mean of cosines.
 4. Eq. 7-8 average (+,+) pairs and the rest apart, over a batch; the rare (+,+) would drown.
 5. Every loss is a mean, so the toy recipe has its own lambdas.
 6. The trunk keeps its batch statistics and all its stages but the last (the authors' code does;
    --train-trunk all); SSGRL's two linear maps after the tanh are one;
    the graph's cell is a GRU cell; the first layer of phi_intra takes 2D numbers.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import common
from common import InputError

RECIPES = {  # "real" is the paper's, its lambdas too, though every loss here is a mean
    "real": dict(
        arch="resnet101", size=448, width=1024, hidden=(512, 1024), crops=(512, 448, 384, 320, 256),
        epochs=20, batch_size=32, lr=1e-5, lr_step=10, weight_decay=5e-4, workers=4,
        lambda_1=10.0, lambda_2=0.05,
    ),
    "toy": dict(
        arch="toy", size=64, width=64, hidden=(128, 128), crops=(512, 448),
        epochs=16, batch_size=32, lr=1e-3, lr_step=12, weight_decay=1e-4, workers=0,
        lambda_1=3.0, lambda_2=0.2,
    ),
}  # fmt: skip
# the model hangs on these: --eval and --predict take them from the checkpoint
MODEL_ARGS = "arch train_trunk size width hidden sarl no_ist stat_cooc".split()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--data", default="toy")
    first.error = common.refuse
    data = first.parse_known_args(argv)[0].data  # it decides the defaults, which --help shows
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.error = common.refuse
    add = parser.add_argument_group("task").add_argument
    add("--data", default="toy", help=f"one of {', '.join(common.DATASETS)}")
    add("--root", help="folder of the data set")
    add("--download", action="store_true", help="fetch voc2007, voc2012 or coco into --root first")
    known = 1.0 if data == "folder" else 0.1  # one's own: what is unknown, nobody knows
    add("--known", type=float, default=known, help="proportion of label ENTRIES kept, in (0, 1]")
    add("--mask-seed", type=int, default=0, help="which labels are hidden; 0 is the benchmark's")
    add("--limit", type=int, help="use the first LIMIT images of each split")
    add("--eval", action="store_true", help="only evaluate the checkpoint of --resume PATH")
    add("--predict", nargs="+", metavar="IMAGE", help="only predict these, with --resume PATH")
    add = parser.add_argument_group("method").add_argument
    add("--arch", help="toy, or a torchvision classifier with a spatial trunk")
    add("--weights", default="default", help="default (ImageNet V1), none, or a state dict")
    add("--train-trunk", choices=("last", "all", "none"), default="last", help="stages trained")
    add("--size", type=int, help="side of the square input in pixels")
    add("--width", type=int, help="D, width of the class features")
    add("--hidden", type=int, nargs=2, help="widths of the hidden layers of phi_intra")
    add("--sarl", choices=("sd", "sam"), default="sd", help="semantic decoupling or attention")
    add("--glove", help="GloVe text file, 300-d; without it word vectors are learned")
    add("--no-ist", action="store_true", help="no intra-image transfer")
    add("--no-cst", action="store_true", help="no cross-image transfer")
    add("--no-ist-loss", action="store_true", help="drop L_ist, keep its pseudo-labels")
    add("--no-cst-loss", action="store_true", help="drop L_cst, keep its pseudo-labels")
    add("--stat-cooc", action="store_true", help="Eq. 2 with the co-occurrence of the data set")
    add("--intra-reduce", choices=("mean", "sum"), default="mean", help="Eq. 2 over known labels")
    add("--pairs", choices=("both", "either", "all"), default="both", help="see pair_targets()")
    add("--lambda-1", type=float, help="weight of L_ist")
    add("--lambda-2", type=float, help="weight of L_cst")
    add("--theta-intra", type=float, default=0.75, help="lowest threshold of Eq. 2")
    add("--theta-cross", type=float, default=0.75, help="lowest threshold of Eq. 6")
    add = parser.add_argument_group("run").add_argument
    add("--epochs", type=int, help="length of the schedule")
    add("--stop-after", type=int, metavar="E", help="end this run after epoch E of its schedule")
    add("--batch-size", type=int, help="images a step")
    add("--lr", type=float, help="learning rate")
    add("--workers", type=int, help="processes that decode images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--seed", type=int, default=0, help="initial weights, order and augmentation")
    add("--out", help="for log.jsonl, last.pt, samples.png; default runs/sst-DATA-N")
    add("--resume", metavar="{auto,PATH}", help="continue OUT/last.pt if it is there, or PATH")
    add("--dry-run", action="store_true", help="a few steps on a few images, nothing written")
    parser.set_defaults(**RECIPES["toy" if data == "toy" else "real"])
    args = common.check_args(parser.parse_args(argv), "width", "lambda_1 lambda_2")
    if min(args.hidden) < 1:
        raise InputError(f"--hidden {args.hidden} must be two widths above 0")
    return args


# ------------------------------------------------------------------------------------------- model


def build_trunk(arch: str, weights: str) -> tuple[nn.Sequential, nn.Sequential, int]:
    """Return (early stages, last stage, channels of the feature map) of a classifier less its head.

    The last stage starts at the last layer that shrinks the map, `layer4` of a ResNet. weights:
    "default" (ImageNet V1; the toy trunk's own pretraining), "none" or the path of a state dict.
    """
    if arch == "toy":
        net = layers = common.toy_layers()
        if weights == "default":
            weights = common.cached_weights("toy-trunk", common.pretrained_toy_layers)
    else:
        default = "IMAGENET1K_V1" if weights == "default" else None
        try:
            net = torchvision.models.get_model(arch, weights=default)
        except ValueError as error:
            raise InputError(f"--arch {arch}: {error}; try resnet101 or mobilenet_v2") from None
        except (OSError, RuntimeError) as error:
            hint = "they are fetched once: go online, or give a file of --weights, or none"
            raise InputError(f"--arch {arch}: ImageNet weights: {error}; {hint}") from None
        layers = [*net.children()][:-2] if hasattr(net, "layer4") else getattr(net, "features", [])
    if weights not in ("default", "none"):
        common.load_weights(net, weights)
    x, sides = torch.zeros(1, 3, 224, 224), []
    with torch.no_grad():
        for layer in nn.Sequential(*layers).eval():
            sides.append(x.shape[-1])
            x = layer(x)
    if not sides:
        raise InputError(f"--arch {arch} has no spatial trunk; choose resnet101 or mobilenet_v2")
    last = max(k for k, side in enumerate(sides) if side > [*sides, x.shape[-1]][k + 1])
    return nn.Sequential(*layers[:last]), nn.Sequential(*layers[last:]), x.shape[1]


def read_glove(path: str, classes: list[str]) -> Tensor:
    """Word vectors (C, 300) of a GloVe text file: the mean over the words of each class name."""
    names = [name.lower().split() for name in classes]
    wanted, found = {word for name in names for word in name}, {}
    try:
        with open(path, encoding="utf-8") as file:
            for word, *numbers in (line.rstrip().split(" ") for line in file):
                if word in wanted and len(numbers) == 300:
                    found[word] = torch.tensor([float(n) for n in numbers])
    except (OSError, ValueError) as error:
        raise InputError(f"--glove {path}: {error}") from None
    if missing := sorted(wanted - set(found)):
        raise InputError(f"--glove {path} has no 300-d vector for: {', '.join(missing)}")
    return torch.stack([torch.stack([found[word] for word in name]).mean(0) for name in names])


class SemanticDecoupling(nn.Module):
    """Class features by low-rank bilinear attention (SSGRL, ICCV 2019): (B, N, D) -> (B, C, D)."""

    def __init__(self, num_classes: int, width: int, words: Tensor | None) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.randn(num_classes, 300) if words is None else words)
        self.words.requires_grad = words is None
        self.image = nn.Linear(width, width, bias=False)
        self.word = nn.Linear(300, width, bias=False)
        self.attention = nn.Linear(width, 1)

    def scores(self, u: Tensor, v: Tensor) -> Tensor:
        joint = (u[:, :, None] * v).tanh_()  # (B, N, part of C, D)
        return self.attention(joint).squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.image(x), self.word(self.words)  # (B, N, D), (C, D)
        # 20 classes at a time, computed again in backward: (B, N, C, D) would be the largest tensor
        parts = [checkpoint(self.scores, u, part, use_reentrant=False) for part in v.split(20)]
        weight = torch.cat(parts, dim=2).softmax(dim=1)  # (B, N, C)
        return weight.transpose(1, 2) @ x  # (B, C, D)


class SemanticAttention(nn.Module):
    """The paper's "w/ SAM" (ADD-GCN, ECCV 2020): a sigmoid map per class, (B, N, D) -> (B, C, D).

    The weighted sum is divided by N: its scale does not hang on the size of the image.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.maps = nn.Linear(width, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.maps(x)).transpose(1, 2) @ x / x.shape[1]  # (B, C, D)


class GatedGraph(nn.Module):
    """Gated graph network (Li et al., 2016) over classes: (B, C, D) -> (B, C, D) in (-1, 1)."""

    def __init__(self, adjacency: Tensor, width: int, steps: int = 3) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency)  # (C, C), row i holds P(j|i)
        self.cell, self.output = nn.GRUCell(2 * width, width), nn.Linear(2 * width, width)
        self.steps = steps

    def step(self, h: Tensor) -> Tensor:
        message = torch.cat((self.adjacency @ h, self.adjacency.T @ h), dim=-1)  # (B, C, 2D)
        return self.cell(message.flatten(0, 1), h.flatten(0, 1)).view_as(h)

    def forward(self, f: Tensor) -> Tensor:
        h = f
        for _ in range(self.steps):  # computed again in backward: a step has ten (B, C, D) tensors
            h = checkpoint(self.step, h, use_reentrant=False)
        return torch.tanh(self.output(torch.cat((h, f), dim=-1)))


class PairNet(nn.Module):
    """phi_intra of Eq. 1: f (B, C, D) -> logits (B, pairs) that classes i < j are both present.

    `wanted` (m,), flat indices into (B, pairs), leaves the logits of all others at 0, uncomputed.
    """

    def __init__(self, num_classes: int, width: int, hidden: tuple[int, int]) -> None:
        super().__init__()
        self.first = nn.Linear(2 * width, hidden[0])
        relu = nn.ReLU(inplace=True)
        self.rest = nn.Sequential(relu, nn.Linear(*hidden), relu, nn.Linear(hidden[1], 1))
        i, j = torch.triu_indices(num_classes, num_classes, offset=1)
        self.register_buffer("i", i, persistent=False)
        self.register_buffer("j", j, persistent=False)

    def forward(self, f: Tensor, wanted: Tensor | None = None) -> Tensor:
        # W [f_i, f_j] = W_left f_i + W_right f_j: two products per class, not one per pair
        left, right = self.first.weight.chunk(2, dim=1)
        a, b = F.linear(f, left, self.first.bias), F.linear(f, right)  # (B, C, hidden)
        # Eq. 1: p_ij = phi_intra([f_i, f_j]); the sigmoid is taken where p is needed
        if wanted is None:
            wanted = torch.arange(len(f) * len(self.i), device=f.device)
        row, pair = wanted // len(self.i) * f.shape[1], wanted % len(self.i)
        # not a[...]: on a CPU, its gradient is added up in the order in which threads come
        a = F.embedding(row + self.i[pair], a.flatten(0, 1))
        b = F.embedding(row + self.j[pair], b.flatten(0, 1))
        p = self.rest(a + b).squeeze(-1)  # (m,)
        return p.new_zeros(len(f) * len(self.i)).index_copy(0, wanted, p).view(len(f), -1)

    def matrix(self, logits: Tensor, num_classes: int) -> Tensor:
        """Pair logits (B, pairs) -> P (B, C, C): probabilities, symmetric, zero diagonal.

        Pairs not `wanted` have 1/2 there; Eq. 2 never reads them.
        """
        p = logits.new_zeros(len(logits), num_classes, num_classes)
        p[:, self.i, self.j] = p[:, self.j, self.i] = torch.sigmoid(logits)
        return p


class SST(nn.Module):
    """images (B, 3, H, W) uint8 -> class features f (B, C, D), logits (B, C), pair logits or None.

    Pair logits (B, pairs) are there while training with learned co-occurrence; `wanted` as in
    PairNet. All in float32.
    """

    def __init__(self, args: argparse.Namespace, classes: list[str], adjacency: Tensor) -> None:
        super().__init__()
        C, D, self.bf16 = len(classes), args.width, args.precision == "bf16"
        early, last, channels = build_trunk(args.arch, args.weights)
        frozen = ("all", "last", "none").index(args.train_trunk)  # how many of the two parts
        self.frozen = nn.Sequential(*(early, last)[:frozen]).requires_grad_(False)
        self.trained = nn.Sequential(*(early, last)[frozen:])
        self.project = nn.Sequential(nn.Conv2d(channels, D, 1, bias=False), nn.BatchNorm2d(D))
        words = read_glove(args.glove, classes) if args.glove else None
        sam = args.sarl == "sam"
        self.sarl = SemanticAttention(C, D) if sam else SemanticDecoupling(C, D, words)
        self.graph = GatedGraph(adjacency, D)
        self.classifier = nn.Parameter(torch.randn(C, D) / math.sqrt(D))
        self.bias = nn.Parameter(torch.zeros(C))
        self.pairs = None if args.no_ist or args.stat_cooc else PairNet(C, D, args.hidden)

    def train(self, mode: bool = True) -> SST:
        super().train(mode)
        self.frozen.eval()
        self.trained.eval()  # small batches: the trunk keeps its pretraining's batch statistics
        return self

    def forward(self, images: Tensor, wanted: Tensor | None = None) -> tuple:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                x = self.frozen(common.normalise(images))
            x = self.project(self.trained(x))  # (B, D, h, w)
            f = self.sarl(x.flatten(2).transpose(1, 2))  # (B, N, D) -> (B, C, D)
            logits = (self.graph(f) * self.classifier).sum(-1) + self.bias  # (B, C)
            learning = self.training and self.pairs is not None  # no pairs at test time
            pair_logits = self.pairs(f, wanted).float() if learning else None
        return f.float(), logits.float(), pair_logits  # losses and thresholds in float32


# ------------------------------------------------------------------------------------------ losses


def pair_targets(y: Tensor, i: Tensor, j: Tensor, negatives: str = "both") -> Tensor:
    """Targets of Eq. 4 for pairs (i, j) from y (B, C): +1 both present, -1 negative, 0 no loss.

    `negatives` "both": of pairs with both labels known. "either": of pairs with a known absence;
    with a proportion k known, positives are then seen k^2 and negatives about 2k of the time, and
    p sinks with k. "all": every pair that is not positive, unknown ones too (the authors' code).
    Returns int64 (B, pairs).
    """
    a, b = y[:, i], y[:, j]
    either = (a == -1) | (b == -1)
    negative = dict(both=(a != 0) & (b != 0), either=either, all=torch.ones_like(either))[negatives]
    return torch.where((a == 1) & (b == 1), 1, -negative.long())


def needed_pairs(y: Tensor, i: Tensor, j: Tensor, negatives: str = "both") -> Tensor:
    """Flat indices (m,) into (B, pairs) of the pairs that matter, few where few labels are known.

    Eq. 3 reads pairs with a target, Eq. 2 those of a known positive and an unknown label.
    """
    a, b = y[:, i], y[:, j]
    asked = ((a == 1) & (b == 0)) | ((a == 0) & (b == 1))
    return (asked | (pair_targets(y, i, j, negatives) != 0)).flatten().nonzero().squeeze(1)


def ist_loss(
    logits: Tensor, target: Tensor, gamma_1: float = 1, gamma_2: float = 2, margin: float = 0.05
) -> Tensor:
    """L_ist, Eq. 3-4 with the minus sign and max(p - m, 0), as a mean over pairs that have a loss.

    Args: logits (B, pairs), target (B, pairs) in {1, 0, -1}. Returns a scalar, 0 without targets.
    """
    p = torch.sigmoid(logits)
    p_m = (p - margin).clamp(min=0)
    # Eq. 4: -(1 - p)^gamma_1 log p if the pair co-occurs, -p_m^gamma_2 log(1 - p_m) if not
    loss_pos = -((1 - p) ** gamma_1) * F.logsigmoid(logits)
    loss_neg = -(p_m**gamma_2) * torch.log1p(-p_m)
    # Eq. 3, as a mean
    total = (loss_pos * (target == 1) + loss_neg * (target == -1)).sum()
    return total / (target != 0).sum().clamp(min=1)


def cst_loss(f: Tensor, y: Tensor) -> Tensor:
    """L_cst, Eq. 7-8 over pairs of different images in a batch: f (B, C, D), y (B, C) -> [0, 4].

    Mean of 1 - s over pairs with class c known present in both, plus mean of 1 + s over the other
    pairs with c known in both; either part is 0 without a pair. No pair is formed: the cosines of
    all pairs of n unit vectors add up to |sum u|^2 - n, which costs O(BCD).
    """
    u = F.normalize(f, dim=-1)  # Eq. 5: s_c^{n,m} = u_n . u_m

    def cosines(member: Tensor) -> tuple[Tensor, Tensor]:  # member (B, C) -> sum, number of pairs
        selves, n = (member * u.square().sum(-1)).sum(), member.sum(0)
        return torch.einsum("bc,bcd->cd", member, u).square().sum() - selves, (n * (n - 1)).sum()

    (s_pos, n_pos), (s_known, n_known) = (cosines(m.to(u.dtype)) for m in (y == 1, y != 0))
    n_rest = n_known - n_pos
    # Eq. 8: 1 - s where both are present, 1 + s otherwise; Eq. 7, as a mean over either kind
    attract = torch.where(n_pos > 0, (n_pos - s_pos) / n_pos.clamp(min=1), 0.0)
    repel = torch.where(n_rest > 0, (n_rest + s_known - s_pos) / n_rest.clamp(min=1), 0.0)
    return attract + repel


def partial_bce(logits: Tensor, y: Tensor) -> Tensor:
    """Eq. 9 with the minus sign: logits (B, C), y (B, C) in {1, 0, -1} -> scalar mean over images.

    Each image averages over its known entries; one with nothing known contributes 0.
    """
    y = y.to(logits.dtype)
    # Eq. 9: log p where y = 1 and log(1 - p) where y = -1; both are log sigmoid(y * logit)
    loss = -F.logsigmoid(y * logits) * y.abs()
    return (loss.sum(1) / y.abs().sum(1).clamp(min=1)).mean()


# ----------------------------------------------------------------------------------- pseudo-labels


def threshold(epoch: int, lowest: float) -> float:
    """theta of Eq. 2 and 6: 1 in epochs 1 to 5 (no pseudo-label), 0.95 in the 6th, then -0.025."""
    return 1.0 if epoch <= 5 else max(lowest, 0.95 - 0.025 * (epoch - 6))


@torch.no_grad()
def cooccurrence(y: Tensor) -> Tensor:
    """Row i: P(j|i) = n(i present, j present) / n(i present, j known); y (images, C) -> (C, C).

    Known labels only; zero diagonal; 0 where i was never seen present with j known.
    """
    present, known = (y == 1).double(), (y != 0).double()
    return (present.T @ present / (present.T @ known).clamp(min=1)).fill_diagonal_(0).float()


@torch.no_grad()
def intra_pseudo_labels(p: Tensor, y: Tensor, theta: float, reduce: str = "mean") -> Tensor:
    """Eq. 2: y (B, C) with unknown labels set to 1 where the image's known positives say so.

    Args: p (B or 1, C, C), p[n, i, j] in [0, 1] for i given j; theta, from 1 up gives none; reduce
    "mean" over the known positives or the printed "sum". No known positive: no pseudo-label.
    """
    positive = (y == 1).to(p.dtype)
    # Eq. 2: y_i = 1[sum of p_ij over known positives j >= theta]
    score = (p @ positive[:, :, None]).squeeze(-1)  # (B, C)
    if reduce == "mean":
        score = score / positive.sum(1, keepdim=True).clamp(min=1)
    return torch.where((y == 0) & (score >= theta) & (theta < 1), 1, y)


@torch.no_grad()
def cross_pseudo_labels(f: Tensor, y: Tensor, prototype: Tensor, theta: float) -> Tensor:
    """Eq. 6: y (B, C) with unknown labels set to 1 where f is like the class's known positives.

    Args: f (B, C, D); prototype (C, D), the mean of their unit features, 0 for a class without;
    theta, from 1 up gives none.
    """
    # Eq. 6: the mean of cosines over D_c is one product with the mean unit vector
    similarity = (F.normalize(f, dim=-1) * prototype).sum(-1)  # (B, C)
    return torch.where((y == 0) & (similarity >= theta) & (theta < 1), 1, y)


# ---------------------------------------------------------------------------------------- training


def train_one_epoch(net, loader, optimizer, prototype, truth, epoch, args, tally=None):
    """One pass. Returns log entries and the prototypes (C, D) of this epoch, for the next one.

    `truth` (images, C) serves the diagnostics of the pseudo-labels and nothing else. `tally` holds
    what the epoch has added up: see `common.add_losses`.
    """
    net.train()
    tally = {} if tally is None else tally
    theta_intra, theta_cross = (threshold(epoch, t) for t in (args.theta_intra, args.theta_cross))
    device, zero = prototype.device, prototype.new_zeros(())
    begin, seen = time.time(), 0
    pairs = torch.triu_indices(len(prototype), len(prototype), offset=1)
    for images, y, index in common.progress(loader, f"epoch {epoch}"):
        # chosen before y leaves the CPU: to find them on the device, the step would have to wait
        wanted = None
        if net.pairs is not None:
            wanted = needed_pairs(y, *pairs, args.pairs).to(device, non_blocking=True)
        images, y = images.to(device, non_blocking=True), y.to(device, non_blocking=True)
        outputs = *net(images, wanted), y, index.to(device, non_blocking=True)
        f, logits, pair_logits, y, index = common.gather(*outputs)
        seen += len(index)
        intra, cross, loss_ist, loss_cst, loss_intra, loss_cross = y, y, zero, zero, zero, zero
        if not args.no_ist:
            p = net.graph.adjacency.T[None]  # for --stat-cooc: row i, column j holds P(i|j)
            if pair_logits is not None:
                p = net.pairs.matrix(pair_logits.detach(), y.shape[1])
                if not args.no_ist_loss:
                    target = pair_targets(y, net.pairs.i, net.pairs.j, args.pairs)
                    loss_ist = ist_loss(pair_logits, target)
            intra = intra_pseudo_labels(p, y, theta_intra, args.intra_reduce)
            loss_intra = partial_bce(logits, intra)
        if not args.no_cst:
            cross = cross_pseudo_labels(f, y, prototype, theta_cross)
            loss_cross = partial_bce(logits, cross)
            loss_cst = zero if args.no_cst_loss else cst_loss(f, y)
            positive = (y == 1).float()
            sums = torch.einsum("bc,bcd->cd", positive, F.normalize(f.detach(), dim=-1))
            common.add_up(tally, dict(sums=sums, count=positive.sum(0)[:, None]))
        # Eq. 10: L_cls is the loss on the known labels plus that on either completed set; as long
        # as there are no pseudo-labels, three times the same
        loss_known = partial_bce(logits, y)
        loss_cls = loss_known + loss_intra + loss_cross
        # Eq. 11: L = L_cls + lambda_1 L_ist + lambda_2 L_cst
        loss = loss_cls + args.lambda_1 * loss_ist + args.lambda_2 * loss_cst
        loss.backward()
        common.sum_gradients(net)
        optimizer.step()
        optimizer.zero_grad()  # here: the next forward does not hold them
        parts = dict(loss_known=loss_known, loss_intra=loss_intra, loss_cross=loss_cross)
        common.add_losses(tally, parts | dict(loss_ist=loss_ist, loss_cst=loss_cst, loss=loss))
        guesses = dict(pseudo=torch.maximum(intra, cross), ist=intra, cst=cross).items()
        counts = {name: common.pseudo_counts(guess, y, truth[index]) for name, guess in guesses}
        common.add_up(tally, counts)
    common.same_buffers(net)
    entry = common.mean_losses(tally, epoch)
    entry |= common.pseudo_quality({name: tally[name] for name in ("pseudo", "ist", "cst")})
    entry["images_per_second"] = seen / (time.time() - begin)
    return entry, prototype if args.no_cst else tally["sums"] / tally["count"].clamp(min=1)


@torch.no_grad()
def evaluate(net, loader, y: np.ndarray) -> tuple[dict, np.ndarray]:
    """Metrics and logits (images, C), rows as in the data set; each image must come once."""
    net.eval()
    batches = common.progress(loader, "test")
    found = [(index, net(images.to(net.bias.device))[1]) for images, _, index in batches]
    logits = common.all_rows(found, len(y))[0].numpy()
    return common.multilabel_metrics(logits, y), logits


# -------------------------------------------------------------------------------------------- main


def main() -> None:
    args = parse_args()
    device = common.pick_device(args.device)
    torch.manual_seed(args.seed)
    state = common.load_checkpoint(args, "sst", MODEL_ARGS)
    if args.predict:
        net = SST(args, state["classes"], state["model"]["graph.adjacency"]).to(device).eval()
        net.load_state_dict(state["model"])
        return common.predict(lambda images: net(images)[1], args, state["classes"], device)

    data = common.load_data(args.data, args.root, args.limit, args.download)
    y = common.hide_entries(data.train.y, args.known, args.mask_seed)
    if not y.any():
        raise InputError(f"--known {args.known} of {y.size} labels leaves none known; raise it")
    run = dict(method="sst", data=args.data, classes=data.classes, mask=common.mask_hash(y))
    net = SST(args, data.classes, cooccurrence(torch.tensor(y)))
    if device.type == "cuda" and common.processes() > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(device, memory_format=torch.channels_last)
    views = [common.train_transform(args.size, args.crops)]
    sampler = common.EpochSampler(np.arange(len(y)), args.batch_size, args.seed)
    loader = common.make_loader(data.train.images, y, views, sampler, args)
    test_loader = common.test_loader(data, args)
    if state:
        common.check_same_run(state, run, args)
        net.load_state_dict(state["model"])
    if args.eval:
        metrics, logits = evaluate(net, test_loader, data.test.y)
        return common.report_test(data, metrics, logits, args)

    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, args.lr, weight_decay=args.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_step, gamma=0.1)
    prototype, start, best = torch.zeros(len(data.classes), args.width, device=device), 1, None
    metrics, logits, tally = None, None, {}
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        prototype, start, best = state["prototype"].to(device), state["epoch"] + 1, state["best"]
        metrics, tally = state["metrics"], common.to_device(state["tally"], device)
        common.set_generators(state["generators"], device)
    if args.compile:
        net.compile()
    log = common.RunLog(args, run, y, start if state else 0, device)
    truth = torch.tensor(data.train.y, device=device)

    def state_of(epoch: int, tally: dict) -> dict:
        state = dict(model=net.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch)
        state |= dict(scheduler=scheduler.state_dict(), prototype=prototype, tally=tally)
        return state | dict(metrics=metrics, best=best)

    for epoch in range(start, min(args.epochs, args.stop_after or args.epochs) + 1):
        sampler.epoch, sampler.skip, begin = epoch, tally.get("step", 0), time.time()
        entry = dict(epoch=epoch, lr=scheduler.get_last_lr()[0])
        try:
            parts, new = train_one_epoch(
                net, loader, optimizer, prototype, truth, epoch, args, tally
            )
            metrics, logits = evaluate(net, test_loader, data.test.y)
        except common.Interrupted:
            log.interrupt(epoch, state_of(epoch - 1, tally))
        scheduler.step()
        prototype, tally = new, {}
        del metrics["ap"]
        best = max(best or metrics, metrics, key=lambda m: m["mAP"])
        log.epoch(entry | parts | metrics, begin)
        log.checkpoint(state_of(epoch, tally))
        if epoch == args.stop_after:
            return print(f"stopped after epoch {epoch}; --out {log.out} --resume auto continues")
    columns = {"last epoch": metrics, "best on test (what most papers report)": best}
    print(common.metrics_table(columns))
    log.samples(data, logits)


if __name__ == "__main__":
    common.run_script(main)
