# SPDX-License-Identifier: MIT
"""Structured Semantic Transfer (SST): multi-label recognition when single labels are missing.

Chen, Pu, Wu, Xie, Lin: Structured Semantic Transfer for Multi-Label Recognition with Partial
Labels, AAAI 2022. Each class attends to its own place in the image and gets its own feature. Two
modules guess unknown labels, which then train the classifier too: IST by a learned co-occurrence
with the image's known positives, CST by likeness to the class's known positives elsewhere.

Run:  python sst.py                            toy world, 10 % known
      python sst.py --no-ist --no-cst          the baseline, SSGRL
      python sst.py --data coco --root DIR --known 0.5 --glove glove.6B.300d.txt

Measured at 10 % known, three seeds, mAP of the last epoch: toy world 78.1 ± 1.0, SSGRL 76.1 ± 1;
2,000 photographs, a frozen MobileNetV2: 16.2 ± 0.4, SSGRL 12.7 ± 0.6.

Differs from the paper (and from the authors' code: "theirs"):
 1. Eq. 2 is a mean over the known positives, as theirs: of a sum, five times 0.2 would pass.
 2. Eq. 4 has its minus sign, and max(p - m, 0) also in the logarithm. Its negatives are pairs
    with both labels known; --pairs all takes all that are not positive, as printed and as theirs.
 3. Eq. 6 is a product with the last epoch's mean unit feature, no bank of 100; --shrink is ours.
 4. Eq. 7-8 take known labels only; (+,+) pairs and the rest have a mean each, or the rare (+,+)
    would drown: 2.0 where theirs is 1.2, with 3 to 4 times the gradient. Every loss is a mean.
 5. Eq. 9 is a mean per image, as printed (0.16 where theirs, over the batch, is 0.80); by Eq. 10
    known labels count three times from the first epoch on, as theirs.
 6. phi_intra has one output layer, theirs one a pair; P(j|i) is over images that know j, theirs
    over all (at 10 % known a tenth); SSGRL's gates are a GRU cell. No "w/ SAM", no VG-200.
"""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, BooleanOptionalAction, Namespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model
from tqdm import tqdm

import common

RECIPES = {  # "real" is the paper's, its lambdas too, though every loss here is a mean
    "real": dict(
        arch="resnet101", size=448, pool=2, width=1024, hidden=(512, 1024), epochs=20, workers=4,
        lr=1e-5, lr_step=10, weight_decay=5e-4, lambdas=(10, 0.05), crops=(512, 448, 384, 320, 256),
    ),
    "toy": dict(
        arch="toy", size=64, pool=1, width=64, hidden=(128, 128), epochs=16, lr=1e-3, lr_step=12,
        weight_decay=1e-4, lambdas=(3, 0.2), workers=0, crops=(512, 448), frozen_bn=True,
    ),
}  # fmt: skip
RECIPES["folder"] = RECIPES["real"] | dict(known=1.0)  # one's own: what is unknown, nobody knows


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, dict | None]:
    """The arguments and the checkpoint of --resume, from which they start; None without one."""
    parser = ArgumentParser(add_help=False, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.description, parser.error = __doc__.split("\n")[0], common.refuse
    add = parser.add_argument_group("task").add_argument
    add("--data", default="toy", help=f"toy, {', '.join(common.DATASETS)}")
    add("--root", help="folder of the data set")
    add("--download", action="store_true", help="fetch voc2007, voc2012 or coco into --root first")
    add("--known", type=float, default=0.1, help="proportion of label ENTRIES kept, in (0, 1]")
    add("--complete", action="store_true", help="a line of train.csv leaves out what is absent")
    add("--mask-seed", type=int, default=0, help="which labels are hidden; 0 is the benchmark's")
    add("--limit", type=int, help="use the first LIMIT images of each split")
    add("--eval", action="store_true", help="only evaluate the checkpoint of --resume PATH")
    add("--predict", nargs="+", metavar="IMAGE", help="only predict these, with --resume PATH")
    add = parser.add_argument_group("method").add_argument
    add("--arch", help="toy, or a torchvision classifier with a spatial trunk")
    add("--weights", default="default", help="default (ImageNet V1), none, or a state dict")
    add("--train-trunk", choices=("last", "all", "none"), default="last", help="stages trained")
    add("--frozen-bn", action=BooleanOptionalAction, help="trunk's batch norms keep statistics")
    add("--size", type=int, help="side of the square input in pixels")
    add("--pool", type=int, help="side of the squares of the map that are averaged")
    add("--width", type=int, help="D, width of the class features")
    add("--glove", help="GloVe text file, 300-d; without it word vectors are learned")
    add("--no-ist", action="store_true", help="no intra-image transfer")
    add("--no-cst", action="store_true", help="no cross-image transfer")
    add("--stat-cooc", action="store_true", help="Eq. 2 with the co-occurrence of the data set")
    add("--pairs", choices=("both", "all"), default="both", help="see pair_targets()")
    add("--lambdas", type=float, nargs=2, help="weights of L_ist, L_cst; 0 keeps pseudo-labels")
    add("--shrink", type=float, default=0, help="a prototype of n counts n / (n + SHRINK)")
    add("--theta", type=float, nargs=2, default=(0.75, 0.75), help="lowest of Eq. 2 and of Eq. 6")
    add = parser.add_argument_group("run").add_argument
    add("--epochs", type=int, help="length of the schedule")
    add("--batch-size", type=int, default=32, help="images a step")
    add("--lr", type=float, help="learning rate")
    add("--workers", type=int, help="processes that decode images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--seed", type=int, default=0, help="initial weights, order and augmentation")
    add("--out", help="for log.jsonl, last.pt, samples.png; default runs/sst-DATA-N")
    add("--resume", metavar="{auto,PATH}", help="continue OUT/last.pt if it is there, or PATH")
    add("--dry-run", action="store_true", help="a few steps on a few images, nothing written")
    first = parser.parse_known_args(argv)[0]  # --data and --resume decide the defaults
    state = common.load_checkpoint(first, "sst")
    parser.set_defaults(**state["args"] if state else RECIPES.get(first.data, RECIPES["real"]))
    add("-h", "--help", action="help", help="show this and exit")
    return common.check_args(parser.parse_args(argv), "width pool"), state


# ------------------------------------------------------------------------------------------- model


def build_trunk(arch: str, weights: str, learns: str = "last") -> tuple:
    """Frozen stages, trained stages and channels of the map of a torchvision classifier. The last
    stage is a ResNet's `layer4`, of others the last quarter of the layers."""
    if arch == "toy":
        from tests import toy  # only here: the method needs nothing of it

        net, weights = toy.Trunk(), toy.TRUNK if weights == "default" else weights
    else:
        with common.naming(f"--arch {arch} --weights {weights} cannot be used; try resnet101"):
            net = get_model(arch, weights="IMAGENET1K_V1" if weights == "default" else None)
    if weights not in ("default", "none"):
        common.load_weights(net, weights)
    layers = [*net.children()][:-2] if hasattr(net, "layer4") else getattr(net, "features", ())
    common.need(layers, f"--arch {arch} has no spatial trunk; choose resnet101 or mobilenet_v2")
    last = len(layers) - 1 if hasattr(net, "layer4") else 3 * len(layers) // 4
    first = dict(all=0, last=last, none=len(layers))[learns]
    frozen, trained = nn.Sequential(*layers[:first]), nn.Sequential(*layers[first:])
    return frozen, trained, trained.eval()(frozen.eval()(torch.zeros(1, 3, 64, 64))).shape[1]


def read_glove(path: str, classes: list[str]) -> Tensor:
    """Word vectors (C, 300) of a GloVe text file: the mean over the words of each class name."""
    joined = dict(diningtable="dining table", pottedplant="potted plant", tvmonitor="tv monitor")
    names = [joined.get(name, name).lower().replace("_", " ").split() for name in classes]
    found = dict.fromkeys(word for name in names for word in name)
    with common.naming(f"--glove {path} is no text file of GloVe"), open(path, "rb") as file:
        for word, *numbers in (line.decode().rstrip().split(" ") for line in file):
            if word in found and len(numbers) == 300:
                found[word] = torch.tensor([*map(float, numbers)])
    missing = ", ".join(sorted(word for word, vector in found.items() if vector is None))
    common.need(not missing, f"--glove {path} has no 300-d vector for: {missing}")
    return torch.stack([torch.stack([found[word] for word in name]).mean(0) for name in names])


class SemanticDecoupling(nn.Module):
    """Class features by low-rank bilinear attention (SSGRL, ICCV 2019): (B, N, D) -> (B, C, D)."""

    def __init__(self, words: Tensor, width: int, learned: bool = True) -> None:
        super().__init__()
        self.words = nn.Parameter(words, requires_grad=learned)  # (C, 300)
        self.image = nn.Linear(width, width, bias=False)
        self.word = nn.Linear(300, width, bias=False)
        self.attention = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.image(x), self.word(self.words)  # (B, N, D), (C, D)
        joint = torch.tanh(u[:, :, None] * v)  # (B, N, C, D)
        weight = self.attention(joint).squeeze(-1).softmax(dim=1)  # (B, N, C)
        return weight.transpose(1, 2) @ x  # (B, C, D)


class GatedGraph(nn.Module):
    """Gated graph network (Li et al., 2016) over classes: (B, C, D) -> (B, C, D) in (-1, 1)."""

    def __init__(self, adjacency: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency)  # (C, C), row i holds P(j|i)
        self.cell, self.output = nn.GRUCell(2 * width, width), nn.Linear(2 * width, width)

    def forward(self, f: Tensor) -> Tensor:
        h = f
        for _ in range(3):
            message = torch.cat((self.adjacency @ h, self.adjacency.T @ h), dim=-1)  # (B, C, 2D)
            h = self.cell(message.flatten(0, 1), h.flatten(0, 1)).view_as(h)  # (B, C, D)
        return torch.tanh(self.output(torch.cat((h, f), dim=-1)))


class PairNet(nn.Module):
    """phi_intra of Eq. 1: f (B, C, D) -> symmetric logits (B, C, C) that i and j are both there."""

    def __init__(self, num_classes: int, width: int, hidden: tuple[int, int]) -> None:
        super().__init__()
        self.first, relu = nn.Linear(2 * width, hidden[0]), nn.ReLU(inplace=True)
        self.rest = nn.Sequential(relu, nn.Linear(*hidden), relu, nn.Linear(hidden[1], 1))
        pairs = torch.triu_indices(num_classes, num_classes, offset=1)
        self.register_buffer("pairs", pairs, persistent=False)

    def forward(self, f: Tensor) -> Tensor:
        # W [f_i, f_j] = W_left f_i + W_right f_j: two products per class, not one per pair
        left, right = self.first.weight.chunk(2, dim=1)
        a, b = F.linear(f, left, self.first.bias), F.linear(f, right)  # (B, C, hidden)
        # Eq. 1: p_ij = phi_intra([f_i, f_j]) before its sigmoid; a[:, i] is not bit-stable on CPU
        i, j = self.pairs
        p = self.rest(a.index_select(1, i) + b.index_select(1, j)).squeeze(-1)  # (B, pairs)
        matrix = p.new_zeros(len(f), f.shape[1], f.shape[1])
        matrix[:, i, j] = matrix[:, j, i] = p
        return matrix


class SST(nn.Module):
    """images (B, 3, H, W) uint8 -> class features f (B, C, D), logits (B, C) and, in training, pair
    logits (B, C, C). A map of 8 positions a side or more is averaged over squares of `pool`."""

    def __init__(self, trunk, sarl, graph, pairs=None, pool=1, frozen_bn=False) -> None:
        super().__init__()
        (C, D), self.frozen_bn = (len(graph.adjacency), graph.output.out_features), frozen_bn
        self.frozen, self.trained = trunk[0].requires_grad_(False), trunk[1]
        self.pool = nn.AvgPool2d(pool)
        self.project = nn.Sequential(nn.Conv2d(trunk[2], D, 1, bias=False), nn.BatchNorm2d(D))
        self.sarl, self.graph, self.pairs = sarl, graph, pairs
        self.classifier = nn.Parameter(torch.randn(C, D) * D**-0.5)
        self.bias = nn.Parameter(torch.zeros(C))
        self.register_buffer("prototypes", torch.zeros(C, D))  # of Eq. 6

    def train(self, mode: bool = True):
        super().train(mode)
        self.frozen.eval()
        self.trained.train(mode and not self.frozen_bn)
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x = self.trained(self.frozen(common.normalise(images)))
        x = self.project(self.pool(x) if x.shape[-1] >= 8 else x)  # (B, D, h, w)
        f = self.sarl(x.flatten(2).transpose(1, 2))  # (B, N, D) -> (B, C, D)
        logits = (self.graph(f) * self.classifier).sum(-1) + self.bias  # (B, C)
        pairs = self.pairs(f).float() if self.pairs and self.training else None
        return f.float(), logits.float(), pairs


# ------------------------------------------------------------------------------------------ losses


def pair_targets(y: Tensor, negatives: str = "both") -> Tensor:
    """Targets (B, C, C) of Eq. 4 from y (B, C): +1 both present, -1 negative, 0 no loss. Negative
    are pairs with both labels known or, with "all", whatever is not positive (the letter)."""
    a, b = y[:, :, None].long(), y[:, None].long()
    negative = (a * b != 0) | (negatives == "all")
    target = torch.where((a == 1) & (b == 1), 1, -negative.long())
    return target * (1 - torch.eye(y.shape[1], dtype=torch.long, device=y.device))


def ist_loss(logits: Tensor, target: Tensor) -> Tensor:
    """L_ist, Eq. 3-4 with the minus sign and max(p - m, 0), as a mean over pairs with a target.
    logits (B, C, C), target (B, C, C) in {1, 0, -1} -> scalar, 0 without targets."""
    p = torch.sigmoid(logits)
    p_m = (p - 0.05).clamp(min=0)
    # Eq. 4: -(1 - p)^1 log p if the pair co-occurs, -p_m^2 log(1 - p_m) if not; Eq. 3, as a mean
    loss_pos, loss_neg = (p - 1) * F.logsigmoid(logits), -(p_m**2) * torch.log1p(-p_m)
    total = (loss_pos * (target == 1) + loss_neg * (target == -1)).sum()
    return total / (target != 0).sum().clamp(min=1)


def cst_loss(f: Tensor, y: Tensor) -> Tensor:
    """L_cst, Eq. 7-8 over pairs of different images: f (B, C, D), y (B, C) -> [0, 4]. Mean of 1 - s
    over pairs with c known present in both, plus mean of 1 + s over the others with c known in
    both; either is 0 without a pair. Costs O(BCD): no pair is formed."""
    u = F.normalize(f, dim=-1)  # Eq. 5: s_c^{n,m} = u_n . u_m
    member = torch.stack((y == 1, y != 0)).to(u.dtype)  # (2, B, C): present, known
    # the cosines of all ordered pairs of n unit vectors add up to |sum u|^2 - n
    square = torch.einsum("kbc,bcd->kcd", member, u).square().sum((1, 2))
    s_pos, s_known = square - (member * u.square().sum(-1)).sum((1, 2))
    n_pos, n_known = (member.sum(1) * (member.sum(1) - 1)).sum(1)
    n_rest = n_known - n_pos
    # Eq. 8: 1 - s where both are present, 1 + s otherwise; Eq. 7, as a mean over either kind
    attract = torch.where(n_pos > 0, (n_pos - s_pos) / n_pos.clamp(min=1), 0.0)
    repel = torch.where(n_rest > 0, (n_rest + s_known - s_pos) / n_rest.clamp(min=1), 0.0)
    return attract + repel


def partial_bce(logits: Tensor, y: Tensor) -> Tensor:
    """Eq. 9 with the minus sign: logits (B, C), y (B, C) in {1, 0, -1} -> scalar mean over images,
    each of which averages over its known entries; one with nothing known contributes 0."""
    # Eq. 9: log p where y = 1 and log(1 - p) where y = -1; both are log sigmoid(y * logit)
    loss = -F.logsigmoid(y * logits) * y.abs()  # (B, C)
    return (loss.sum(1) / y.abs().sum(1).clamp(min=1)).mean()


# ----------------------------------------------------------------------------------- pseudo-labels


def threshold(epoch: int, lowest: float) -> float:
    """theta of Eq. 2 and 6: 1 in epochs 1 to 5 (no pseudo-label), 0.95 in the 6th, then -0.025."""
    return 1.0 if epoch <= 5 else max(lowest, 0.95 - 0.025 * (epoch - 6))


@torch.no_grad()
def cooccurrence(y: Tensor) -> Tensor:
    """Row i: P(j|i) = n(i and j present) / n(i present, j known) or 0. y (images, C) -> (C, C)."""
    present, known = (y == 1).double(), (y != 0).double()
    return (present.T @ present / (present.T @ known).clamp(min=1)).fill_diagonal_(0).float()


@torch.no_grad()
def intra_pseudo_labels(p: Tensor, y: Tensor, theta: float) -> Tensor:
    """Eq. 2, a mean: y (B, C) with unknown labels set to 1 where known positives vouch for them.
    p (B or 1, C, C): p[n, i, j] in [0, 1] is i given j. theta: no pseudo-label from 1 up."""
    positive = (y == 1).to(p.dtype)
    # Eq. 2: y_i = 1[mean of p_ij over known positives j >= theta]
    score = (p @ positive[:, :, None]).squeeze(-1) / positive.sum(1, keepdim=True).clamp(min=1)
    return torch.where((y == 0) & (score >= theta) & (theta < 1), 1, y)


@torch.no_grad()
def cross_pseudo_labels(f: Tensor, y: Tensor, prototype: Tensor, theta: float) -> Tensor:
    """Eq. 6: y (B, C) with unknown labels set to 1 where f (B, C, D) is like known positives.
    prototype (C, D): the mean of their unit features, 0 for a class without; theta as in Eq. 2."""
    # Eq. 6: the mean of cosines over D_c is one product with the mean unit vector
    similarity = (F.normalize(f, dim=-1) * prototype).sum(-1)  # (B, C)
    return torch.where((y == 0) & (similarity >= theta) & (theta < 1), 1, y)


# ---------------------------------------------------------------------------------------- training


def train_one_epoch(model, loader, optimizer, truth, epoch, args):
    """One pass with the prototypes of the last; leaves its own for the next. Returns log entries.
    `truth` (images, C) serves the diagnostics of the pseudo-labels and nothing else."""
    net, totals, device = getattr(model.train(), "module", model), {}, truth.device
    theta_intra, theta_cross = (threshold(epoch, lowest) for lowest in args.theta)
    for images, y, index in tqdm(loader, f"epoch {epoch}", leave=False, disable=None):
        images, y = images.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            f, logits, pair_logits = model(images)  # (B, C, D), (B, C), (B, C, C)
        # Eq. 10: L_cls is the loss on the known labels, and below on either completed set
        y_intra, y_cross, loss_cls = y, y, partial_bce(logits, y)
        loss_ist = loss_cst = torch.zeros_like(loss_cls)
        if not args.no_ist:
            p = net.graph.adjacency.T[None]  # for --stat-cooc: row i, column j holds P(i|j)
            if not args.stat_cooc:
                p = torch.sigmoid(pair_logits.detach())
                loss_ist = ist_loss(pair_logits, pair_targets(y, args.pairs))
            y_intra = intra_pseudo_labels(p, y, theta_intra)
            loss_cls = loss_cls + partial_bce(logits, y_intra)
        if not args.no_cst:
            y_cross = cross_pseudo_labels(f, y, net.prototypes, theta_cross)
            loss_cls, loss_cst = loss_cls + partial_bce(logits, y_cross), cst_loss(f, y)
            sums = torch.einsum("bc,bcd->cd", (y == 1).float(), F.normalize(f.detach(), dim=-1))
            common.add_up(totals, sums=sums, number=(y == 1).sum(0)[:, None])
        # Eq. 11: L = L_cls + lambda_1 L_ist + lambda_2 L_cst
        loss = loss_cls + args.lambdas[0] * loss_ist + args.lambdas[1] * loss_cst
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        y_both, true = torch.maximum(y_intra, y_cross), truth[index.to(device)]
        common.add_up(totals, pseudo=common.pseudo_counts(y_both, y, true), loss=loss)
        common.add_up(totals, loss_cls=loss_cls, loss_ist=loss_ist, loss_cst=loss_cst)
    entry = common.epoch_entry(totals, len(loader))
    if not args.no_cst:
        net.prototypes = totals["sums"] / (totals["number"] + args.shrink).clamp(min=1)
    return entry


def evaluate(net, loader, y, bf16: bool) -> tuple[dict, Tensor]:
    """Metrics and logits (images, C), rows as in the data set."""
    logits = common.outputs(lambda x: net.eval()(x)[1:2], loader, net.bias.device, bf16)[0]
    return common.multilabel_metrics(logits.numpy(), y), logits


# -------------------------------------------------------------------------------------------- main


def build(args: Namespace, classes: list[str], adjacency: Tensor, fresh: bool = False) -> SST:
    C, D, trunk = len(classes), args.width, build_trunk(args.arch, args.weights, args.train_trunk)
    words = read_glove(args.glove, classes) if args.glove and fresh else torch.randn(C, 300)
    if fresh and not args.glove and args.data != "toy":
        print("no --glove: word vectors start at random and are learned", file=sys.stderr)
    sarl = SemanticDecoupling(words, D, not args.glove)
    pairs = None if args.no_ist or args.stat_cooc else PairNet(C, D, args.hidden)
    return SST(trunk, sarl, GatedGraph(adjacency, D), pairs, args.pool, args.frozen_bn)


def main() -> None:
    args, state = parse_args()
    device, bf16 = common.pick_device(args.device), args.precision == "bf16"
    torch.manual_seed(args.seed)
    if args.predict:
        net = build(args, state["classes"], state["model"]["graph.adjacency"]).to(device)
        return common.predict(lambda x: net.eval()(x)[1], net, args, state)
    classes, train, test, y, about = common.load_task(args, state, "sst", common.hide_entries)
    net = build(args, classes, cooccurrence(torch.tensor(y)), fresh=not state)
    net.to(device, memory_format=torch.channels_last)
    views = common.make_transform(args.size), common.make_transform(args.size, args.crops)
    test_loader = common.make_loader(common.ImageDataset(*test, views[0]), args)
    if args.eval:
        common.load_weights(net, state["model"])
        return common.report(args, classes, test[1], evaluate(net, test_loader, test[1], bf16)[1])
    loader = common.make_loader(common.ImageDataset(train[0], y, views[1]), args, train=True)
    common.need(loader.batch_size > 1, "batch norm compares images: --batch-size must be 2 or more")
    rest = [p for name, p in net.named_parameters() if name != "sarl.words"]
    groups = [dict(params=rest), dict(params=[net.sarl.words], weight_decay=0)]  # it shrinks words
    optimizer = torch.optim.Adam(groups, args.lr, weight_decay=args.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_step, gamma=0.1)
    run = common.Run(args, about, state, model=net, optimizer=optimizer, scheduler=scheduler)
    model, truth = common.parallel(net, args.compile), torch.tensor(train[1], device=device)
    logits = evaluate(net, test_loader, test[1], bf16)[1]  # finds a broken test image now
    for epoch in range(run.start, args.epochs + 1):
        run.begin(epoch, loader)
        entry = train_one_epoch(model, loader, optimizer, truth, epoch, args)
        metrics, logits = evaluate(net, test_loader, test[1], bf16)
        scheduler.step()
        run.end(entry | metrics)
    run.finish(common.test_cells(test, logits))


if __name__ == "__main__":
    common.run_script(main)
