# SPDX-License-Identifier: MIT
"""Structured Semantic Transfer (SST): multi-label recognition when single labels are missing.

Chen, Pu, Wu, Xie, Lin: Structured Semantic Transfer for Multi-Label Recognition with Partial
Labels, AAAI 2022. Each class attends to its own place in the image and gets a feature of its own.
Two modules guess unknown labels, on which the classifier trains too. Intra-image transfer (IST)
reads them off a learned co-occurrence with the known positives of the image. Cross-image transfer
(CST) compares the feature of a class with those of its known positives in other images.

Run:  python sst.py                                toy world, 10 % of the labels known
      python sst.py --data coco --known 0.5        COCO 2014 in data/
      python sst.py --no-ist --no-cst              without both modules: SSGRL (ICCV 2019)

Measured:  toy world mAP 77.0 +- 0.7 (SSGRL 74.3 +- 0.8); on 8,000 photographs no gain over SSGRL.
Where this differs. Their code is HCPLab-SYSU/HCP-MLR-PL; "-": not said; "=": as theirs.
what               paper               their code                        here
attention, Eq. -   -                   512 wide                          D wide, 1024
P(j|i) of graph    -                   n(i, j) / n(i), P(i|i) = 1        n(i, j) / n(i, j known), 0
Eq. 1, layers      1024-512-1024-1     2 x (1024-512)-1024-1024, one     2048-512-1024-1, two ReLU
                                       ReLU, a last layer for each pair
Eq. 2              sum                 mean                              =
Eq. 3              sum                 mean over all pairs               =
Eq. 4, negatives   not both present    not both known to be present      both known; --pairs all: =
Eq. 4, formula     log(1 - p)          -log(1 - max(p - m, 0))           =
Eq. 6              all positives       the last 100, of fewer some 0     all of the previous epoch
Eq. 7-8, pairs     all                 known, n < m; 6 others at most    known, n != m, a mean of
                                       a (+, +), if any; one mean        (+, +), one of the others
Eq. 9              mean over an image  mean over the batch               as the paper, with a minus
Eq. 10             three, sums         the first alone in epochs 1-5     three, means over images
L_ist and L_cst    constant weight     grow within the first epoch       constant weight
batch size         32                  8                                 32
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, default_collate
from torchvision.models import get_model
from torchvision.ops import MLP
from tqdm import tqdm

# isort: off
from common import ImageDataset, check_labels, class_text, describe, find_images, hide_entries
from common import load_data, metrics_table, multilabel_metrics, need, normalise, pseudo_metrics
from common import save_pictures, save_predictions

RANK = int(os.environ.get("RANK", 0))  # number of this process among those that torchrun starts
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many these are
progress = partial(tqdm, leave=False, disable=RANK > 0 or None)  # None: only in a terminal

# flag: default (on the toy world, and elsewhere if it is another there), meaning
RUN = dict(  # where and how a run is computed, which may change when it is resumed
    root=("data", "folder that holds the data set"),
    download=(False, "fetch coco, voc2007 or voc2012 into --root first"),
    workers=(0, 2, "processes that decode images; take as many as cores"),
    device=("auto", "auto, cpu or cuda"),
    compile=(False, "torch.compile the network"),
    weights=("default", "of the trunk: default (of ImageNet), none, or a file"),
    out=("", "folder for log, checkpoint and pictures; otherwise a new one in runs/"),
    resume=("", "checkpoint to continue or to use; auto: OUT/last.pt if it is there"),
    eval=(False, "only evaluate the checkpoint of --resume"),
    predict=([], "only predict these images and folders, by that checkpoint"),
)
METHOD = dict(  # what is computed
    data=("toy", "toy, coco, voc2007, voc2012, vg200, nuswide, cub, or folder: your own"),
    known=(0.1, 1.0, "proportion of the label entries that stay known"),
    mask_seed=(0, "which entries these are"),
    limit=(0, "use the first LIMIT images of each part; 0 for all"),
    arch=("toy", "resnet101", "toy, or a ResNet of torchvision"),
    size=(64, 448, "side of the square input in pixels"),
    epochs=(16, 20, "length of the schedule"),
    batch_size=(32, "images a step, over all processes"),
    lr=(1e-3, 1e-5, "learning rate of Adam"),
    precision=("fp32", "of the network: fp32 or bf16"),
    seed=(0, "of initial weights, order and augmentation"),
    lr_step=(12, 10, "epochs at that rate; then it is a tenth"),
    smallest_crop=(448, 256, "random crops of an image of 512 are 512, 448, ... or this"),
    weight_decay=(1e-4, 5e-4, "weight decay of Adam"),
    width=(64, 1024, "D, width of the features of a class"),
    glove=("none", "auto", "word vectors: a file, none: random, auto: GloVe's for COCO and VOC"),
    ist=(True, "intra-image transfer"),
    cst=(True, "cross-image transfer"),
    pairs=("both", "negative pairs of Eq. 4: both labels known, or all"),
    lambda_1=(10.0, "weight of L_ist in Eq. 11"),
    lambda_2=(0.2, 0.05, "weight of L_cst in Eq. 11"),
    theta=(0.75, "lowest threshold of Eq. 2 and Eq. 6"),
)
def parse_args(argv=None):
    """The settings, and the checkpoint of --resume or None. A setting that is not given is that of
    the checkpoint, or else the default."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS)
    special = {bool: dict(action=argparse.BooleanOptionalAction), list: dict(nargs="+")}
    for name, (default, *real, meaning) in (RUN | METHOD).items():
        kind = special.get(type(default), dict(type=type(default)))
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, help=f"{meaning} {[default, *real]}", **kind)
    given = vars(parser.parse_args(argv))
    checkpoint = load_checkpoint(given.get("resume"), given.get("out"))
    saved = checkpoint["args"] if checkpoint else {}
    for name in METHOD.keys() & given.keys() & saved.keys():
        need(saved[name] == given[name], f"--resume: {name} was {saved[name]}; leave it so")
    given = saved | given
    column = 0 if given.get("data", "toy") == "toy" else -2  # the last is the meaning
    new = f"runs/{Path(__file__).stem}-{time.strftime('%m%d-%H%M%S')}"
    defaults = {name: row[column] for name, row in (RUN | METHOD).items()} | dict(out=new)
    args = argparse.Namespace(**defaults | given)
    need(column or args.root == "data", "--root is for --data coco, folder, ...; add --data")
    numbers = [value for value in vars(args).values() if isinstance(value, int | float)]
    need(all(value >= 0 for value in numbers), "no setting may be negative, or nan")
    smallest = min(args.epochs, args.batch_size // WORLD_SIZE, args.lr)
    need(smallest > 0, "--epochs, --batch-size (of a process) and --lr must be above 0")
    need(0 < args.known <= 1, "--known is a proportion: above 0, at most 1")
    need(args.precision in ("fp32", "bf16"), "--precision is fp32 or bf16")
    need(not args.compile or shutil.which("g++"), "--compile needs the compiler g++; install it")
    if args.eval or args.predict:
        need(checkpoint, "--eval and --predict need --resume PATH")
        need(WORLD_SIZE == 1, "--eval and --predict run in one process, without torchrun")
    return args, checkpoint

def load_checkpoint(resume, out):
    """The checkpoint of --resume, or None."""
    path = f"{out}/last.pt" if resume == "auto" else resume
    if not resume or (resume == "auto" and not os.path.exists(path)):
        return None
    try:
        checkpoint = torch.load(path, "cpu", weights_only=True)
        assert checkpoint["args"].keys() == (RUN | METHOD).keys(), "it has other settings"
        return checkpoint
    except Exception as error:  # files of any content
        need(False, f"--resume {path} is no last.pt of a run of this script ({str(error)[:99]})")

# ------------------------------------------------------------------------------------------- model
class SemanticDecoupling(nn.Module):
    """Class features by bilinear attention (SSGRL) over the N positions of the map x (B, N, D):
    sum_n softmax_n(a . tanh(U x_n * V w_c)) x_n, (B, C, D). w: words (C, any width)."""

    def __init__(self, words, width):
        super().__init__()
        self.register_buffer("words", words)
        self.image = nn.Linear(width, width, bias=False)
        self.word = nn.Linear(words.shape[1], width, bias=False)
        self.attention = nn.Linear(width, 1)

    def forward(self, x):
        u = self.image(x)  # (B, N, D)
        v = self.word(self.words)  # (C, D)
        joint = torch.tanh(u[:, :, None] * v)  # (B, N, C, D)
        weight = self.attention(joint).squeeze(-1).softmax(1)  # (B, N, C)
        return weight.mT @ x  # (B, C, D)

class GatedGraph(nn.Module):
    """Gated graph network over classes (SSGRL, Eq. 3): f (B, C, D) -> (B, C, D) in (-1, 1).
    adjacency (C, C): row i holds P(j|i). Messages run along the edges, and against them."""

    def __init__(self, adjacency, width):
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.gates = nn.Linear(3 * width, 2 * width)
        self.candidate = nn.Linear(3 * width, width)
        self.output = nn.Linear(2 * width, width)

    def forward(self, f):
        h = f
        for _ in range(3):  # steps, as SSGRL
            message = torch.cat((self.adjacency @ h, self.adjacency.T @ h), -1)  # (B, C, 2D)
            gates = self.gates(torch.cat((message, h), -1)).sigmoid()
            z, r = gates.chunk(2, -1)  # update and reset gate, (B, C, D) each
            new = torch.tanh(self.candidate(torch.cat((message, r * h), -1)))
            h = (1 - z) * h + z * new  # (B, C, D)
        return torch.tanh(self.output(torch.cat((h, f), -1)))

class SST(nn.Module):
    """images (B, 3, H, W) uint8, pairs (2, P) of places among the B * C features -> logits (B, C),
    class features f (B, C, D), logits of the pairs (P,) or None. Of a trunk the last stage alone is
    trained. words (C, any width), adjacency (C, C), width D. bf16: products in bfloat16."""

    def __init__(self, frozen, trained, words, adjacency, width, bf16=False):
        super().__init__()
        self.bf16 = bf16
        self.frozen = frozen.requires_grad_(False)
        self.trained = trained
        self.project = nn.LazyConv2d(width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.sarl = SemanticDecoupling(words, width)
        self.graph = GatedGraph(adjacency, width)
        self.classifier = nn.Parameter(torch.randn(len(words), width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(len(words)))
        self.phi_intra = MLP(2 * width, [width // 2, width, 1])  # three layers, ReLU between
        self.register_buffer("prototypes", torch.zeros(len(words), width))  # of Eq. 6

    def forward(self, images, pairs=None):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.trained(self.frozen(normalise(images)))  # (B, channels, h, w)
            if x.shape[-1] > 8:  # positions a side; the authors' code pools too
                x = F.avg_pool2d(x, 2)
            x = self.norm(self.project(x))  # (B, D, h, w)
            f = self.sarl(x.flatten(2).mT)  # (B, N, D) -> (B, C, D)
            logits = (self.graph(f) * self.classifier).sum(-1) + self.bias  # (B, C)
            pair_logits = None
            if pairs is not None:
                # Eq. 1: p_ij = phi_intra([f_i, f_j]), before its sigmoid. Its first layer is
                # W [f_i, f_j] + b = W_i f_i + b + W_j f_j: a product for a feature, not for a pair
                first, *others = self.phi_intra
                w_i, w_j = first.weight.chunk(2, 1)  # (D/2, D) each
                flat = f.flatten(0, 1)  # (B * C, D)
                h_i = F.linear(flat, w_i, first.bias)
                h_j = flat @ w_j.T
                # index_select, since the gradient of indexing depends on the order of CPU threads
                h = h_i.index_select(0, pairs[0]) + h_j.index_select(0, pairs[1])  # (P, D/2)
                pair_logits = nn.Sequential(*others)(h).squeeze(-1).float()
            return logits.float(), f.float(), pair_logits

def load_trunk(arch, weights):
    """The trunk of the toy world, which has its own weights, or a ResNet of torchvision; weights:
    default (of ImageNet), none, or a file. Returns all stages but the last, and the last."""
    try:
        if arch == "toy":
            from tests.toy import world  # only here: the method needs nothing from it
            net = world.load_trunk()
        else:
            net = get_model(arch, weights="IMAGENET1K_V1" if weights == "default" else None)
            if weights not in ("default", "none"):
                net.load_state_dict(torch.load(weights, "cpu"))
        *stages, last, _, _ = net.children()  # pooling and head are left out
        assert last is net.layer4
        return nn.Sequential(*stages), last
    except Exception as error:  # no network, files of any content
        cache = f"remove a damaged file from {torch.hub.get_dir()}, or give --weights FILE"
        need(False, f"--arch {arch} --weights {weights} cannot be loaded ({error}); {cache}")

def read_words(path, data, classes):
    """Word vectors (C, width): rows of an array file, or of a text file of GloVe the mean over the
    words of a class. path: also "auto", the shipped ones (2012: as 2007), and "none", random."""
    if path == "auto":
        path = f"{Path(__file__).parent}/tests/toy/glove.840B.300d.{data.replace('12', '07')}.npy"
        path = path if os.path.exists(path) else "none"
    if path == "none":
        return torch.randn(len(classes), 300)
    names = [class_text(name).split() for name in classes]
    wanted = sum(names, [])
    try:
        if path.endswith(".npy"):
            vectors = np.load(path)
        else:
            lines = (line.split() for line in open(path, encoding="utf-8"))
            found = {word: np.array(row, float) for word, *row in lines if word in wanted}
            vectors = np.array([np.mean([found[word] for word in name], 0) for name in names])
        assert vectors[:, 0].size == len(classes), f"{vectors.shape} for {len(classes)} classes"
        return torch.tensor(vectors).float()
    except Exception as error:  # files of any content
        need(False, f"--glove {path} has no vector for, or is not fit: {error}; none is random")

def build(args, classes, y, checkpoint):
    """The network of a run: a new one for known labels y (images, C), or that of a checkpoint."""
    if checkpoint:
        words = checkpoint["model"]["sarl.words"]
        adjacency = checkpoint["model"]["graph.adjacency"]
    else:
        words = read_words(args.glove, args.data, classes)
        adjacency = cooccurrence(torch.tensor(y))
    trunk = load_trunk(args.arch, "none" if checkpoint else args.weights)
    net = SST(*trunk, words, adjacency, args.width, args.precision == "bf16")
    net.phi_intra.requires_grad_(args.ist)  # DistributedDataParallel wants all to be used
    net.eval()(torch.zeros(1, 3, 64, 64))  # a small image shows how many channels the map has
    if WORLD_SIZE > 1 and torch.cuda.is_available() and args.device != "cpu":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if checkpoint:
        net.load_state_dict(checkpoint["model"])
    return net

# ----------------------------------------------------------------------- losses and pseudo-labels
def ist_loss(logits, target, B, C, gamma_1=1, gamma_2=2, m=0.05):
    """L_ist, Eq. 3-4: logits (P,), target (P,) in {1, 0, -1} -> scalar, a mean over all pairs of C
    classes in B images, of which a pair without target adds 0. Minus and m as in their code."""
    p = logits.sigmoid()
    p_m = F.relu(p - m)
    # Eq. 4: -(1 - p)^gamma_1 log p if the pair co-occurs, -p_m^gamma_2 log(1 - p_m) if not
    loss_positive = -((1 - p) ** gamma_1) * F.logsigmoid(logits)
    loss_negative = -(p_m**gamma_2) * torch.log1p(-p_m)
    loss = loss_positive * (target > 0) + loss_negative * (target < 0)
    return loss.sum() / max(1, B * C * (C - 1) / 2)  # Eq. 3, as a mean

def cst_loss(u, y):
    """L_cst, Eq. 7-8: unit u (B, C, D), y (B, C) -> scalar. A mean over pairs of images with c
    known present in both, plus one over the others with c known in both; 0 without a pair."""
    s = torch.einsum("ncd,mcd->nmc", u, u)  # Eq. 5: s_c^{n,m} = cosine(f_c^n, f_c^m)
    known = y != 0
    present = y == 1
    different = torch.eye(len(y), device=y.device)[..., None] == 0  # n != m
    attract = present[:, None] & present & different  # (B, B, C)
    repel = known[:, None] & known & different & ~attract
    # Eq. 8: 1 - s where c is present in both, 1 + s otherwise; Eq. 7, as a mean over either kind
    loss_attract = ((1 - s) * attract).sum() / attract.sum().clamp(min=1)
    loss_repel = ((1 + s) * repel).sum() / repel.sum().clamp(min=1)
    return loss_attract + loss_repel

def partial_bce(logits, y):
    """Eq. 9 with a minus sign: logits (B, C), y (B, C) in {1, 0, -1} -> scalar, a mean over images,
    each of which averages over its known entries; one with nothing known contributes 0."""
    # Eq. 9: log p where y = 1 and log(1 - p) where y = -1; both are log sigmoid(y * logit)
    known = y.abs()
    loss = -F.logsigmoid(y * logits) * known  # (B, C)
    return (loss.sum(1) / known.sum(1).clamp(min=1)).mean()

def cooccurrence(y):
    """Row i: P(j|i) = n(i and j present) / n(i present, j known), or 0. y (images, C) -> (C, C).
    It does not tell on how many images a value rests: a pair seen once may have 1."""
    present = (y == 1).float()
    known = (y != 0).float()
    p = present.T @ present / (present.T @ known).clamp(min=1)
    return p.fill_diagonal_(0)

def threshold(epoch, lowest):
    """theta of Eq. 2 and 6: none in epochs 1 to 5, 0.95 in the 6th, then 0.025 less an epoch."""
    return torch.inf if epoch <= 5 else max(lowest, 0.95 - 0.025 * (epoch - 6))

def choose_pairs(y):
    """Pairs i < j that the labels y (B, C) ask for: (2, P), places among the B * C features, and
    targets (P,) of Eq. 4: 1 both present, -1 both known, not both present, 0 for Eq. 2 alone."""
    y_i = y[..., None]
    y_j = y[:, None]
    known = (y_i * y_j).abs()  # (B, C, C), 1 where both are
    target = torch.minimum(y_i, y_j) * known
    wanted = known | (y_i + y_j == 1)  # or one present, one unknown
    n, i, j = wanted.triu(1).nonzero().T
    return torch.stack((i, j)) + n * y.shape[1], target[n, i, j]

@torch.no_grad()
def intra_pseudo_labels(p, pairs, y, theta):
    """Eq. 2, a mean: y (B, C) with unknown labels set to 1 where known positives vouch for them.
    p (P,) in [0, 1]: co-occurrence of pairs (2, P), among them all of a known positive."""
    i, j = pairs
    present = (y == 1).flatten().float()  # (B * C,)
    # Eq. 2: y_i = 1[mean of p_ij over known positives j >= theta]
    score = torch.zeros_like(present).index_add(0, i, p * present[j])
    score = score.index_add(0, j, p * present[i]).view_as(y)
    score = score / (y == 1).sum(1, keepdim=True).clamp(min=1)
    return torch.where((y == 0) & (score >= theta), 1, y)

@torch.no_grad()
def cross_pseudo_labels(u, y, prototypes, theta):
    """Eq. 6: y (B, C) with unknown labels set to 1 where unit u (B, C, D) is like known positives.
    prototypes (C, D): the mean of their unit features, 0 for a class without."""
    # Eq. 6: the mean of cosines over D_c is one product with the mean unit vector
    s = (u * prototypes).sum(-1)  # (B, C)
    return torch.where((y == 0) & (s >= theta), 1, y)

# ------------------------------------------------------------------------- training and evaluation
def collate(batch, y, unknown):
    """Images, labels, indices, pairs and their targets, all made on the CPU. unknown: what pairs
    take an unknown label for, 0 or, with --pairs all, -1."""
    images, index = default_collate(batch)
    y = y[index]
    return images, y, index, *choose_pairs(torch.where(y == 0, unknown, y))

def gather(x):
    """x (B, ...) of all processes, one after the other. DistributedDataParallel averages gradients,
    but each process has that of its own part alone: it counts WORLD_SIZE times here."""
    if WORLD_SIZE == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD_SIZE)]
    distributed.all_gather(parts, x)
    parts[RANK] = x + (WORLD_SIZE - 1) * (x - x.detach())
    return torch.cat(parts)

def train_one_epoch(model, net, loader, optimizer, epoch, args):
    """One pass over the training images; leaves the prototypes for the next one in net. model: net
    or its DistributedDataParallel. Returns the mean losses and the completed labels (images, C)."""
    start = time.time()
    model.train()
    net.frozen.eval()  # its batch norms keep their statistics
    device = net.bias.device
    theta = threshold(epoch, args.theta)
    # what an epoch adds up is read at its end: no step waits for the device
    losses = torch.zeros(4, device=device)
    features = torch.zeros_like(net.prototypes)  # (C, D), sums over known positives
    positives = torch.zeros_like(net.bias)  # (C,)
    pseudo = torch.zeros(len(loader.dataset), len(net.bias), dtype=torch.int8, device=device)
    for batch in progress(loader):
        images, y, index, pairs, target = (x.to(device, non_blocking=True) for x in batch)
        logits, f, pair_logits = model(images, pairs if args.ist else None)
        u = F.normalize(f, dim=-1)
        completed = [y]  # known labels, and what each module makes of them
        loss_ist = loss_cst = logits.new_zeros(())
        if args.ist:
            completed.append(intra_pseudo_labels(pair_logits.sigmoid(), pairs, y, theta))
            loss_ist = ist_loss(pair_logits, target, *y.shape)
        if args.cst:
            completed.append(cross_pseudo_labels(u, y, net.prototypes, theta))
            loss_cst = cst_loss(gather(u), gather(y))  # of the images of all processes
            present = (y == 1).float()
            features += torch.einsum("bc,bcd->cd", present, u.detach())
            positives += present.sum(0)
        # Eq. 10: L_cls sums a loss on the known labels and one on each completed set
        loss_cls = sum(partial_bce(logits, labels) for labels in completed)
        # Eq. 11: L = L_cls + lambda_1 L_ist + lambda_2 L_cst
        loss = loss_cls + args.lambda_1 * loss_ist + args.lambda_2 * loss_cst
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += torch.stack((loss, loss_cls, loss_ist, loss_cst)).detach()
        pseudo[index] = torch.stack(completed).amax(0)
    if WORLD_SIZE > 1:
        for x in (losses, features, positives, pseudo):  # each process has seen other images
            distributed.all_reduce(x)
    net.prototypes.copy_(features / positives.clamp(min=1)[:, None])  # Eq. 6
    means = (losses / len(loader) / WORLD_SIZE).tolist()
    entry = dict(zip("loss loss_cls loss_ist loss_cst".split(), means, strict=True))
    entry["seconds"] = time.time() - start  # of training alone
    entry["images_per_second"] = len(loader.dataset) / entry["seconds"]
    entry["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return entry, pseudo.cpu().numpy()

@torch.no_grad()
def evaluate(net, images, args):
    """Logits (images, C), a float32 array."""
    net.eval()
    device = net.bias.device
    logits = torch.zeros(len(images), len(net.bias), device=device)
    data = ImageDataset(images, args.size)
    for batch in progress(make_loader(data, args, range(RANK, len(data), WORLD_SIZE))):
        views, index = (x.to(device, non_blocking=True) for x in batch)
        logits[index] = net(views)[0]
    if WORLD_SIZE > 1:  # each process has filled its own rows
        distributed.all_reduce(logits)
    return logits.cpu().numpy()

def make_loader(data, args, sampler, **options):
    """Batches of this process. Its workers start anew with each epoch, as of a resumed run."""
    size = min(args.batch_size // WORLD_SIZE, len(sampler)) or 1
    options |= dict(num_workers=args.workers, pin_memory=torch.cuda.is_available())
    return DataLoader(data, size, sampler=sampler, **options)

# ------------------------------------------------------------------------------------------- main
def start_device(name):
    """The device of --device; "auto" is CUDA if that can be used. Joins torchrun's processes."""
    if RANK > 0:  # one process prints and warns
        sys.stdout = open(os.devnull, "w")
        logging.disable()
    try:
        if torch.cuda.is_available():
            name = name.replace("auto", "cuda")
            torch.cuda.set_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
            torch.set_float32_matmul_precision("high")  # TF32
            torch.backends.cudnn.benchmark = True  # nearly all batches are of one size
        device = torch.zeros(1, device=name.replace("auto", "cpu")).device
    except (RuntimeError, AssertionError) as error:
        need(False, f"--device {name} cannot be used: {error}")
    if WORLD_SIZE > 1:
        distributed.init_process_group()  # nccl, on CPU gloo
    print("device:", device)
    return device

def use(args, checkpoint):
    """--eval and --predict: the network of a checkpoint on other images."""
    device = start_device(args.device)
    classes = checkpoint["classes"]
    net = build(args, classes, None, checkpoint).to(device)
    if args.predict:
        os.makedirs(args.out, exist_ok=True)
        images = find_images(args.predict)
        return save_predictions(args.out, images, evaluate(net, images, args), classes)
    found, images, y = load_data(args.data, args.root, "test", args.limit, args.download)
    need(found == classes, "--resume: the run has other classes")
    metrics = multilabel_metrics(evaluate(net, images, args), y, classes)
    print(metrics_table([metrics]))
    print(describe(metrics["AP"], classes))

def main(args, checkpoint):
    # processes and device
    need(args.pairs in ("both", "all"), "--pairs is both or all")
    device = start_device(args.device)
    torch.manual_seed(args.seed)

    # data
    load = partial(load_data, args.data, args.root, limit=args.limit)
    classes, *test = load("test", fetch=args.download)  # images and labels
    _, images, truth = load("train")
    args.download = False  # a resumed run has the data
    y = hide_entries(truth, args.known, args.mask_seed)
    labels = dict(classes=classes, hash=check_labels(classes, y, test[1]))

    # network
    net = build(args, classes, y, checkpoint).to(device, memory_format=torch.channels_last)
    fit(net, (images, y, truth), test, labels, args, checkpoint)

def fit(net, train, test, labels, args, checkpoint):
    """Train net on train (images, known labels, truth), and evaluate it on test (images, labels).
    labels: classes and hash, which a resumed run must share with its checkpoint."""
    images, y, truth = train
    data = ImageDataset(images, args.size, args.smallest_crop)
    sampler = DistributedSampler(data, WORLD_SIZE, RANK, drop_last=True)
    pairs = partial(collate, y=torch.tensor(y), unknown=-1 if args.pairs == "all" else 0)
    loader = make_loader(data, args, sampler, drop_last=True, collate_fn=pairs)

    # optimizer
    optimizer = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay)

    # resume
    run = dict(labels, command=sys.argv, args=vars(args), device=str(net.bias.device))
    log = [dict(run=run | dict(torch=torch.version.__version__))]
    if checkpoint:
        need(labels.items() <= checkpoint.items(), "--resume: the run has other classes or labels")
        optimizer.load_state_dict(checkpoint["optimizer"])
        log = checkpoint["log"]
    if RANK == 0:
        os.makedirs(args.out, exist_ok=args.resume in ("auto", f"{args.out}/last.pt"))

    # several processes, and compile
    model = nn.parallel.DistributedDataParallel(net) if WORLD_SIZE > 1 else net
    if args.compile:
        model.compile()

    # loop
    for epoch in range(len(log), args.epochs + 1):  # the first entry of the log is the run
        seed = 1000 * args.seed + epoch  # a resumed run repeats its epoch
        torch.manual_seed(seed * WORLD_SIZE + RANK)  # each process augments in its own way
        sampler.set_epoch(seed)
        lr = args.lr if epoch <= args.lr_step else args.lr / 10
        optimizer.param_groups[0]["lr"] = lr
        losses, pseudo = train_one_epoch(model, net, loader, optimizer, epoch, args)
        logits = evaluate(net, test[0], args)
        entry = dict(epoch=epoch, lr=lr, **losses)
        entry |= multilabel_metrics(logits, test[1], labels["classes"])
        entry |= pseudo_metrics(pseudo, y, truth)
        log.append(entry)
        print(describe(entry), flush=True)
        if RANK == 0:
            state = dict(labels, log=log, model=net.state_dict(), optimizer=optimizer.state_dict())
            save(args, state)
            save_pictures(args.out, *test, logits, labels["classes"])

    # table
    print(metrics_table(log[1:]))

def save(args, state):
    """Write the log and the checkpoint, this under another name first: last.pt is always whole."""
    log = "\n".join(map(json.dumps, state["log"]))
    Path(args.out, "log.jsonl").write_text(f"{log}\n")
    torch.save(state | dict(args=vars(args)), f"{args.out}/last.tmp")
    os.replace(f"{args.out}/last.tmp", f"{args.out}/last.pt")

if __name__ == "__main__":
    args, checkpoint = parse_args()
    try:
        (use if args.eval or args.predict else main)(args, checkpoint)
    except (OSError, KeyboardInterrupt) as error:  # of a loader's worker the last line says it
        reason = str(error).strip().split("\n")[-1] or "stopped"
        need(False, f"{reason}; to go on with training: --out {args.out} --resume auto")
