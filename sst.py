# SPDX-License-Identifier: MIT
"""Structured Semantic Transfer (SST): multi-label recognition when single labels are missing.

Chen, Pu, Wu, Xie, Lin: Structured Semantic Transfer for Multi-Label Recognition with Partial
Labels, AAAI 2022. Each class attends to its own place in the image and gets its own feature. Two
modules guess unknown labels, on which the classifier trains too. Intra-image transfer (IST) reads
them off a learned co-occurrence with the known positives of the image. Cross-image transfer (CST)
compares the feature of a class with those of its known positives in other images.

Run:  python sst.py                          toy world, 10 % of the labels known
      python sst.py --no-ist --no-cst        without both: SSGRL (Chen et al., ICCV 2019)
      python sst.py --data coco --root DIR --known 0.5
Measured at 10 % known, mAP: toy world 77.9 ± 0.8, SSGRL 75.2 ± 1.3 (three seeds). 8,000
photographs, frozen trunk: 20.7 ± 0.2, SSGRL 19.9 ± 0.3 (two seeds), a linear probe 30.8 ± 0.5.
Main differences from the paper, and from the authors' code ("theirs", HCPLab-SYSU/HCP-MLR-PL):
 1. Only the last stage of the trunk learns, and 14 x 14 positions are averaged to 7 x 7, as theirs.
    GloVe vectors of 50 numbers are shipped; theirs have 300 (--glove FILE).
 2. Graph: P(j|i) is over images that know j, and 0 for j = i. Theirs is over all images with i (at
    10 % known a tenth of ours), and 1 for j = i.
 3. Eq. 1: the first layer maps both features, 2,048 numbers, to 512; the paper prints 1,024. p_ji
    is p_ij, as theirs. Theirs maps each feature by itself, and has a last layer for each pair.
 4. Eq. 2: a mean over the known positives, as theirs. With a sum, five at 0.2 each would pass.
 5. Eq. 4: with a minus sign, and max(p - m, 0) also in the logarithm, as theirs. Negatives are
    pairs with both labels known. With --pairs all they are all that is not positive, as theirs.
 6. Eq. 6: a mean over all positives of the last epoch. Theirs keeps the last 100 of a class.
 7. Eq. 7-8: different images of a batch, known labels only, as theirs; a mean over the rare (+,+)
    pairs and one over the rest. Theirs is one, with at most six of the rest for each (+,+) pair.
 8. Eq. 9-10: with a minus sign, and a mean over images; theirs is one over all known entries. Known
    labels enter three times, as printed; theirs once for five epochs, while its L_ist and L_cst
    grow from 0 within the first epoch. Its batch is 8, not 32.
"""

from argparse import BooleanOptionalAction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model

import common

GLOVE = f"{Path(__file__).parent}/tests/glove.6B.50d.names.txt"  # of toy, COCO and VOC
REAL = dict(  # the paper's, and where it does not say, its authors'
    known=0.1,
    arch="resnet101",
    size=448,  # pixels
    pool=2,  # positions of the map that become one, a side
    glove="none",
    width=1024,  # D
    hidden=(512, 1024),  # widths inside phi_intra
    lambdas=(10, 0.05),  # weights of L_ist and L_cst; the paper's, whose losses are sums
    theta=(0.75, 0.75),  # lowest thresholds of Eq. 2 and of Eq. 6
    epochs=20,
    lr=1e-5,
    lr_step=10,  # epochs after which the rate falls to a tenth
    weight_decay=5e-4,
    crops=(512, 448, 384, 320, 256),  # sides of the random crops, of an image of 512
    workers=4,
)
NAMED = REAL | dict(glove=GLOVE)
TOY = REAL | dict(
    arch="toy",
    size=64,
    pool=1,
    width=64,
    hidden=(128, 128),
    lambdas=(3, 0.2),
    epochs=16,
    lr=1e-3,
    lr_step=12,
    weight_decay=1e-4,
    crops=(512, 448),
    workers=0,
    frozen_bn=True,  # batch norms of the trunk use their stored mean and variance
)
OWN = REAL | dict(known=1.0)  # one's own labels: none is hidden
RECIPES = dict(real=REAL, coco=NAMED, voc2007=NAMED, voc2012=NAMED, folder=OWN, toy=TOY)

def parse_args(argv=None):
    """The arguments, and the checkpoint of --resume or None."""
    parser = common.arguments(__doc__, known="label ENTRIES", mask_seed=0, batch_size=32)
    add = parser.add_argument_group("method").add_argument
    add("--arch", help="toy, or a torchvision classifier with a spatial trunk")
    add("--weights", default="default", help="default (ImageNet V1), none, or a state dict")
    add("--train-trunk", choices=("last", "all", "none"), default="last", help="stages trained")
    add(
        "--frozen-bn",
        action=BooleanOptionalAction,
        help="batch norms of the trunk use stored means",
    )
    add("--pool", type=common.POSITIVE, help="side of averaged squares, if four fit the map's")
    add("--width", type=common.POSITIVE, help="D, width of the class features")
    add("--glove", help="word vectors: text of GloVe, .npy (C, width), or none: they are learned")
    add("--no-ist", action="store_true", help="no intra-image transfer")
    add("--no-cst", action="store_true", help="no cross-image transfer")
    add("--stat-cooc", action="store_true", help="Eq. 2 with the co-occurrence of the data set")
    add("--pairs", choices=("both", "all"), default="both", help="see pair_targets()")
    add("--lambdas", type=common.WEIGHT, nargs=2, help="weights of L_ist and L_cst")
    add("--theta", type=common.SHARE, nargs=2, help="lowest thresholds of Eq. 2 and of Eq. 6")
    return common.parse(parser, RECIPES, "sst", argv)

# ------------------------------------------------------------------------------------------- model

def split_trunk(net, learns="last"):
    """The frozen and the trained stages, two nn.Sequential, of a torchvision classifier. learns:
    "all", "none", or "last": of a ResNet `layer4`, of others the last quarter of the layers.
    ValueError where the classifier has no spatial trunk."""
    if hasattr(net, "layer4"):
        layers = list(net.children())[:-2]  # without pooling and head
        last = len(layers) - 1
    else:
        layers = list(getattr(net, "features", ()))
        last = 3 * len(layers) // 4
    if not layers or hasattr(net, "permute"):  # that of a Swin has its channels last
        raise ValueError("no spatial trunk; choose resnet101 or mobilenet_v2")
    first = dict(all=0, last=last, none=len(layers))[learns]
    return nn.Sequential(*layers[:first]), nn.Sequential(*layers[first:])

def read_words(path, classes):
    """Word vectors (C, width) of an array file, or of a text file of GloVe: the mean over the words
    of each class name. ValueError where an array is not (C, width), or words are missing."""
    if path.endswith(".npy"):
        vectors = torch.tensor(np.load(path)).float()
        if vectors.shape[:-1] != (len(classes),):
            raise ValueError(f"an array of {[*vectors.shape]}, not ({len(classes)}, width)")
        return vectors
    joined = dict(diningtable="dining table", pottedplant="potted plant", tvmonitor="tv monitor")
    names = [joined.get(name, name).lower().replace("_", " ").split() for name in classes]
    wanted = {word for name in names for word in name}
    found = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            word, *numbers = line.rstrip().split(" ")
            if word in wanted:
                found[word] = torch.tensor([*map(float, numbers)])
    missing = ", ".join(sorted(wanted - found.keys()))
    if missing:
        raise ValueError(f"it has no vector for: {missing}; --glove none learns them")
    return torch.stack([torch.stack([found[word] for word in name]).mean(0) for name in names])

class SemanticDecoupling(nn.Module):
    """Class features by low-rank bilinear attention (SSGRL) over the N = h w positions of the map:
    x (B, N, D) -> (B, C, D). words (C, any width)."""

    def __init__(self, words, width, learned=True):
        super().__init__()
        self.words = nn.Parameter(words, requires_grad=learned)
        self.image = nn.Linear(width, width, bias=False)
        self.word = nn.Linear(words.shape[1], width, bias=False)
        self.attention = nn.Linear(width, 1)

    def forward(self, x):
        u = self.image(x)  # (B, N, D)
        v = self.word(self.words)  # (C, D)
        joint = torch.tanh(u[:, :, None] * v)  # (B, N, C, D)
        weight = self.attention(joint).squeeze(-1).softmax(1)  # (B, N, C)
        return weight.transpose(1, 2) @ x  # (B, C, D)

class GatedGraph(nn.Module):
    """Gated graph network over classes (Eq. 3 of the SSGRL paper): f (B, C, D) -> (B, C, D), its
    values in (-1, 1). adjacency (C, C): row i holds P(j|i)."""

    def __init__(self, adjacency, width):
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.update = nn.Linear(3 * width, width)
        self.reset = nn.Linear(3 * width, width)
        self.candidate = nn.Linear(3 * width, width)
        self.output = nn.Linear(2 * width, width)

    def forward(self, f):
        h = f
        for _ in range(3):  # steps, as SSGRL
            message = torch.cat((self.adjacency @ h, self.adjacency.T @ h), dim=-1)  # (B, C, 2D)
            both = torch.cat((message, h), dim=-1)  # (B, C, 3D)
            z = torch.sigmoid(self.update(both))  # (B, C, D)
            r = torch.sigmoid(self.reset(both))  # (B, C, D)
            new = torch.tanh(self.candidate(torch.cat((message, r * h), dim=-1)))
            h = (1 - z) * h + z * new  # (B, C, D)
        return torch.tanh(self.output(torch.cat((h, f), dim=-1)))

class PairNet(nn.Module):
    """phi_intra of Eq. 1: f (B, C, D) -> symmetric logits (B, C, C) that i and j are both there.
    Only pairs that are asked for, (B, C, C) bool, by (i, j) or (j, i), are computed. The others are
    0 and mean nothing."""

    def __init__(self, width, hidden):
        super().__init__()
        self.first = nn.Linear(2 * width, hidden[0])
        self.second = nn.Linear(*hidden)
        self.last = nn.Linear(hidden[1], 1)

    def forward(self, f, asked):
        B, C, _ = f.shape
        # W [f_i, f_j] = W_left f_i + W_right f_j: two products per class, not one per pair
        left, right = self.first.weight.chunk(2, dim=1)
        a = F.linear(f, left, self.first.bias).flatten(0, 1)  # (B C, hidden[0])
        b = F.linear(f, right).flatten(0, 1)  # (B C, hidden[0])
        asked = (asked | asked.transpose(1, 2)).triu(1)  # each pair once
        n, i, j = asked.nonzero(as_tuple=True)  # (pairs,) each
        # index_select, since the gradient of a[k] depends on the order of CPU threads
        x = a.index_select(0, n * C + i) + b.index_select(0, n * C + j)  # (pairs, hidden[0])
        # Eq. 1: p_ij = phi_intra([f_i, f_j]), before its sigmoid
        p = self.last(F.relu(self.second(F.relu(x)))).squeeze(-1)  # (pairs,)
        matrix = p.new_zeros(B, C, C)
        matrix[n, i, j] = p
        matrix[n, j, i] = p
        return matrix

class SST(nn.Module):
    """images (B, 3, H, W) uint8 -> class features f (B, C, D), logits (B, C) and pair logits
    (B, C, C), where pairs are asked for (B, C, C). Normalises images by `common.normalise`.

    frozen, trained: stages of a trunk. pairs: None without IST. The map is averaged over squares of
    `pool`, if four or more fit a side. frozen_bn: also norms that learn use their stored means.
    """

    def __init__(self, frozen, trained, sarl, graph, pairs=None, pool=1, frozen_bn=False):
        super().__init__()
        C = len(graph.adjacency)
        D = graph.output.out_features
        self.frozen = frozen.requires_grad_(False)
        self.trained = trained
        self.frozen_bn = frozen_bn
        self.pool = nn.AvgPool2d(pool)
        channels = trained.eval()(frozen.eval()(torch.zeros(1, 3, 64, 64))).shape[1]
        self.project = nn.Sequential(nn.Conv2d(channels, D, 1, bias=False), nn.BatchNorm2d(D))
        self.sarl = sarl
        self.graph = graph
        self.pairs = pairs
        self.classifier = nn.Parameter(torch.randn(C, D) * D**-0.5)  # one vector a class
        self.bias = nn.Parameter(torch.zeros(C))
        self.register_buffer("prototypes", torch.zeros(C, D))  # of Eq. 6

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        self.trained.train(mode and not self.frozen_bn)
        return self

    def forward(self, images, asked=None):
        x = self.trained(self.frozen(common.normalise(images)))  # (B, channels, h, w)
        if x.shape[-1] >= 4 * self.pool.kernel_size:
            x = self.pool(x)
        x = self.project(x)  # (B, D, h, w)
        f = self.sarl(x.flatten(2).transpose(1, 2))  # (B, N, D) -> (B, C, D)
        logits = (self.graph(f) * self.classifier).sum(-1) + self.bias  # (B, C)
        pairs = None
        if self.pairs and asked is not None:
            pairs = self.pairs(f, asked).float()  # (B, C, C)
        return f.float(), logits.float(), pairs

# ------------------------------------------------------------------------------------------ losses

def pair_targets(y, negatives="both"):
    """Targets (B, C, C) of Eq. 4 from y (B, C): +1 both present, -1 negative, 0 no loss. Negative
    are pairs with both labels known or, with "all", whatever is not positive, as printed."""
    a = y[:, :, None]
    b = y[:, None]
    positive = (a == 1) & (b == 1)
    negative = (a * b != 0) | (negatives == "all")
    target = torch.where(positive, 1, -negative.long())
    target.diagonal(dim1=1, dim2=2).zero_()  # no pair of a class with itself
    return target

def ist_loss(logits, target, gamma=2, margin=0.05):
    """L_ist, Eq. 3-4 with the minus sign and max(p - m, 0), as a mean over pairs with a target.
    logits (B, C, C), target (B, C, C) in {1, 0, -1} -> scalar, 0 without targets."""
    p = torch.sigmoid(logits)
    p_m = (p - margin).clamp(min=0)
    # Eq. 4: -(1 - p)^1 log p if the pair co-occurs, -p_m^2 log(1 - p_m) if not
    loss_pos = (p - 1) * F.logsigmoid(logits)
    loss_neg = -(p_m**gamma) * torch.log1p(-p_m)
    # Eq. 3, as a mean
    total = (loss_pos * (target == 1) + loss_neg * (target == -1)).sum()
    return total / (target != 0).sum().clamp(min=1)

def sum_of_cosines(u, member):
    """Sum of u_nc . u_mc over classes c and ordered pairs of images n != m with member[n, c] and
    member[m, c], and the number of its terms. u (B, C, D), unit; member (B, C), bool. Costs O(BCD).

        for n, m, c in product(range(B), range(B), range(C)):
            if n != m and member[n, c] and member[m, c]:
                total += u[n, c] @ u[m, c]
                number += 1
    """
    member = member.to(u.dtype)
    # for each class: the products of all ordered pairs add up to |sum u|^2 - sum |u|^2
    square = torch.einsum("bc,bcd->cd", member, u).square().sum()
    total = square - (member * u.square().sum(-1)).sum()
    count = member.sum(0)  # (C,)
    return total, (count * (count - 1)).sum()

def cst_loss(f, y):
    """L_cst, Eq. 7-8 over pairs of different images: f (B, C, D), y (B, C) -> scalar. Mean of 1 - s
    over pairs with c known present in both, plus mean of 1 + s over the others with c known in
    both; either is 0 without a pair."""
    u = F.normalize(f, dim=-1)  # Eq. 5: s_c^{n,m} = u_n . u_m
    s_pos, n_pos = sum_of_cosines(u, y == 1)
    s_known, n_known = sum_of_cosines(u, y != 0)
    n_rest = n_known - n_pos
    # Eq. 8: 1 - s where both are present, 1 + s otherwise; Eq. 7, as a mean over either kind
    attract = torch.where(n_pos > 0, (n_pos - s_pos) / n_pos.clamp(min=1), 0.0)
    repel = torch.where(n_rest > 0, (n_rest + s_known - s_pos) / n_rest.clamp(min=1), 0.0)
    return attract + repel

def partial_bce(logits, y):
    """Eq. 9 with the minus sign: logits (B, C), y (B, C) in {1, 0, -1} -> scalar mean over images,
    each of which averages over its known entries; one with nothing known contributes 0."""
    # Eq. 9: log p where y = 1 and log(1 - p) where y = -1; both are log sigmoid(y * logit)
    loss = -F.logsigmoid(y * logits) * y.abs()  # (B, C)
    return (loss.sum(1) / y.abs().sum(1).clamp(min=1)).mean()

# ----------------------------------------------------------------------------------- pseudo-labels

def threshold(epoch, lowest):
    """theta of Eq. 2 and 6: 1 in epochs 1 to 5 (no pseudo-label), 0.95 in the 6th, then -0.025."""
    return 1.0 if epoch <= 5 else max(lowest, 0.95 - 0.025 * (epoch - 6))

@torch.no_grad()
def cooccurrence(y):
    """Row i: P(j|i) = n(i and j present) / n(i present, j known) or 0. y (images, C) -> (C, C)."""
    present = (y == 1).double()
    known = (y != 0).double()
    p = present.T @ present / (present.T @ known).clamp(min=1)
    return p.fill_diagonal_(0).float()

@torch.no_grad()
def intra_pseudo_labels(p, y, theta):
    """Eq. 2, a mean: y (B, C) with unknown labels set to 1 where known positives vouch for them.
    p (B or 1, C, C): how far, in [0, 1], a present j speaks for i: by Eq. 1, or P(i|j). theta 1:
    no pseudo-label."""
    positive = (y == 1).to(p.dtype)
    # Eq. 2: y_i = 1[mean of p_ij over known positives j >= theta]
    score = (p @ positive[:, :, None]).squeeze(-1) / positive.sum(1, keepdim=True).clamp(min=1)
    return torch.where((y == 0) & (score >= theta) & (theta < 1), 1, y)

@torch.no_grad()
def cross_pseudo_labels(f, y, prototype, theta):
    """Eq. 6: y (B, C) with unknown labels set to 1 where f (B, C, D) is like known positives.
    prototype (C, D): the mean of their unit features, 0 for a class without; theta as in Eq. 2."""
    # Eq. 6: the mean of cosines over D_c is one product with the mean unit vector
    similarity = (F.normalize(f, dim=-1) * prototype).sum(-1)  # (B, C)
    return torch.where((y == 0) & (similarity >= theta) & (theta < 1), 1, y)

# ---------------------------------------------------------------------------------------- training

def train_one_epoch(model, loader, optimizer, truth, epoch, args):
    """One pass with the prototypes of the last epoch; leaves its own. Returns log entries.
    `truth` (images, C) serves the diagnostics of the pseudo-labels and nothing else."""
    model.train()
    net = getattr(model, "module", model)  # without DistributedDataParallel
    device = truth.device
    theta_intra = threshold(epoch, args.theta[0])
    theta_cross = threshold(epoch, args.theta[1])
    lambda_1, lambda_2 = args.lambdas
    totals = {}
    for images, y, index in common.progress(loader, f"epoch {epoch}"):
        images = images.to(device, non_blocking=True)
        y = y.to(device, non_blocking=True)
        target = pair_targets(y, args.pairs)  # (B, C, C)
        asked = (target != 0) | (y == 1)[:, None]  # by Eq. 4; by Eq. 2: column j known present
        with common.autocast(device, args.precision):
            f, logits, pair_logits = model(images, asked)  # (B, C, D), (B, C), (B, C, C)
        # Eq. 10: L_cls is a loss on the known labels, and one on each completed set, below
        loss_cls = partial_bce(logits, y)
        loss_ist = loss_cst = 0 * loss_cls
        y_intra = y_cross = y
        if not args.no_ist:
            p = net.graph.adjacency.T[None]  # for --stat-cooc: row i, column j holds P(i|j)
            if not args.stat_cooc:
                p = torch.sigmoid(pair_logits.detach())
                loss_ist = ist_loss(pair_logits, target)
            y_intra = intra_pseudo_labels(p, y, theta_intra)
            loss_cls = loss_cls + partial_bce(logits, y_intra)
        if not args.no_cst:
            y_cross = cross_pseudo_labels(f, y, net.prototypes, theta_cross)
            loss_cls = loss_cls + partial_bce(logits, y_cross)
            loss_cst = cst_loss(common.gather(f), common.gather(y))  # of all processes
            present = (y == 1).float()  # for Eq. 6 of the next epoch
            features = torch.einsum("bc,bcd->cd", present, F.normalize(f.detach(), dim=-1))
            common.add_up(totals, features=features, positives=present.sum(0)[:, None])
        # Eq. 11: L = L_cls + lambda_1 L_ist + lambda_2 L_cst
        loss = loss_cls + lambda_1 * loss_ist + lambda_2 * loss_cst
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        common.add_up(totals, loss=loss, loss_cls=loss_cls, loss_ist=loss_ist, loss_cst=loss_cst)
        pseudo = common.pseudo_counts(torch.maximum(y_intra, y_cross), y, truth[index.to(device)])
        common.add_up(totals, pseudo=pseudo)
    totals = common.over_processes(totals, net)
    if not args.no_cst:  # Eq. 6: the mean unit feature of each class's known positives
        net.prototypes = totals["features"] / totals["positives"].clamp(min=1)
    return common.epoch_entry(totals, len(loader))

def evaluate(net, task, precision):
    """Metrics and logits (images, C) of the test images, rows as in the data set."""
    net.eval()
    score = lambda images: net(images)[1:2]  # noqa: E731
    logits = common.outputs(score, task.test_loader, net.bias.device, precision)[0]
    return common.multilabel_metrics(logits.numpy(), task.test_y), logits

# -------------------------------------------------------------------------------------------- main

def load_trunk(arch, weights):
    """A classifier of torchvision, or the toy one, with its weights."""
    with common.naming(f"--arch {arch} --weights {weights} cannot be used; try resnet101"):
        if arch == "toy":
            from tests import toy  # only here: the method needs nothing of it

            net = toy.Trunk()
            weights = toy.TRUNK if weights == "default" else weights
        else:
            net = get_model(arch, weights="IMAGENET1K_V1" if weights == "default" else None)
        if weights not in ("default", "none"):
            common.load_weights(net, weights)
        return net

def build(args, words, adjacency):
    """The network of a run, for words (C, any width) and adjacency (C, C)."""
    D = args.width
    with common.naming(f"--arch {args.arch} cannot be used"):
        stages = split_trunk(load_trunk(args.arch, args.weights), args.train_trunk)
    sarl = SemanticDecoupling(words, D, args.glove == "none")
    pairs = None if args.no_ist or args.stat_cooc else PairNet(D, args.hidden)
    return SST(*stages, sarl, GatedGraph(adjacency, D), pairs, args.pool, args.frozen_bn)

def start(args, classes, y):
    """Word vectors (C, width) and adjacency (C, C) of a new run with known labels y (images, C)."""
    adjacency = cooccurrence(torch.tensor(y))
    if args.glove == "none":
        return torch.randn(len(classes), 300), adjacency
    with common.naming(f"--glove {args.glove} cannot be used"):
        return read_words(args.glove, classes), adjacency

def main():
    args, state = parse_args()
    device = common.pick_device(args.device)
    torch.manual_seed(args.seed)
    if state:
        weights = state["model"]
        net = build(args, weights["sarl.words"], weights["graph.adjacency"]).to(device)
    if args.predict:  # has a state, as --eval
        return common.predict(lambda images: net(images)[1], net, args, state)
    # data
    task = common.load_task(args, state, "sst", common.hide_entries)
    view = common.make_transform(args.size, args.crops)
    loader = common.make_loader(common.ImageDataset(task.images, task.y, view), args, train=True)
    # network
    if not state:
        net = build(args, *start(args, task.classes, task.y)).to(device)
    net.to(memory_format=torch.channels_last)
    if args.eval:
        common.load_weights(net, weights)
        return common.report(args, task, evaluate(net, task, args.precision)[1])
    model = common.parallel(net, args.compile)
    # optimizer
    words = net.sarl.words  # without decay, if they are learned
    rest = [p for p in net.parameters() if p is not words]
    groups = [dict(params=rest, weight_decay=args.weight_decay), dict(params=[words])]
    optimizer = torch.optim.Adam(groups, args.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_step, gamma=0.1)
    # loop
    run = common.Run(args, task.about, state, model=net, optimizer=optimizer, scheduler=scheduler)
    truth = torch.tensor(task.truth, device=device)
    # decodes each test image: a broken one ends the run now, not after an epoch
    logits = evaluate(net, task, args.precision)[1]
    for epoch in range(run.start, args.epochs + 1):
        run.begin(epoch, loader)
        entry = train_one_epoch(model, loader, optimizer, truth, epoch, args)
        metrics, logits = evaluate(net, task, args.precision)
        scheduler.step()
        run.end(entry | metrics)
    run.finish(task, logits)

if __name__ == "__main__":
    common.run_script(main)
