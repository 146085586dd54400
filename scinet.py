# SPDX-License-Identifier: MIT
"""Semantic Co-occurrence Insight Network (SCINet): CLIP prompts when single labels are missing.

Wu, Teng, Feng, Shi, Lin, Zhang, Wang: Exploring Partial Multi-Label Learning via Integrating
Semantic Co-occurrence Knowledge, 2025. Both towers of CLIP are frozen; what learns is a prompt that
image and text feed into each other. Similar images and correlated labels lend each other confidence
in the labels that nobody gave. Three ever harder views of an image must agree on them.

Only the abstract, one paragraph and the captions of the figures are public to us; the code that the
authors released holds none of the three modules. From them: frozen encoders and a learned prompt
[v1 .. vm, CLASS]; a Gaussian graph of instances, a Pearson graph of labels, one confidence matrix;
weak, medium and strong views, consistency, self-distillation, difficulty; lambda_n = 0.1,
lambda_q = 0.4, width 0.3. What a docstring marks *paper* is in these; every formula is our reading.

Run:  python scinet.py                                             toy world, 10 % known
      python scinet.py --no-augment                                the baseline, known labels only
      python scinet.py --data coco --root DIR --known 0.1          OpenAI's CLIP, fetched once
      python tests/ablations.py scinet                             the table of the README

Measured: toy world, three seeds, mAP of the last epoch: 74.3 ± 0.3 at 10 % known, 74.5 ± 0.2 at
30 %, 74.8 ± 0.1 at 50 %; known labels only 74.1 ± 0.3, 74.5 ± 0.3, 74.6 ± 0.1. The frozen
towers leave no room. The fusion on real labels, mAP of hidden entries at 10 % known: 26.3 -> 29.2
of a weak probe's scores, 28.6 -> 30.0 of a better one's. About 80 s on 2 CPU cores.

Differs from the paper, as far as can be known:
 1. lambda_n and lambda_q: see the README for both choices measured.
 2. Pearson's coefficients are of the known labels; those of the text features lower the result.
 3. Thresholds are never under 1/2; what passes teaches with its probability, not as 0 or 1: on the
    toy world hard targets end below the known labels alone.
 4. The easier view is always the teacher.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torchvision.transforms import v2

import common
from common import InputError

RECIPES = {
    "real": dict(
        arch="RN101-quickgelu", size=224, epochs=20, batch_size=64, lr=2e-3,
        crops=(448, 384, 320), medium=(1, 9, 0), strong=(3, 9, 0.5), workers=4,
    ),
    "toy": dict(  # RandAugment changes colours and sizes, by which toy objects are known
        arch="toy", size=96, epochs=4, batch_size=64, lr=2e-3,
        crops=(448,), medium=(0, 0, 0.5), strong=(0, 0, 1), workers=0,
    ),
}  # fmt: skip
# the model hangs on these: --eval and --predict take them from the checkpoint
MODEL_ARGS = "arch size no_text_dominant no_visual_dominant rank tau_u".split()


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
    add("--arch", help="toy, or a CLIP of open_clip with a ResNet tower")
    add("--weights", default="default", help="default (OpenAI's), none, or a file for open_clip")
    add("--size", type=int, help="side of the square input in pixels, a multiple of 32")
    add("--no-text-dominant", action="store_true", help="images do not change the text features")
    add("--no-visual-dominant", action="store_true", help="texts do not change the image feature")
    add("--no-augment", action="store_true", help="known labels only, one view")
    add("--rank", type=int, default=32, help="rank of W, which feeds the image into the text")
    add("--tau-u", type=float, default=0.05, help="temperature over positions")
    add("--lambda-n", type=float, default=1.0, help="weight of the instance graph; paper 0.1")
    add("--lambda-q", type=float, default=0.1, help="weight of the label graph; paper 0.4")
    add("--sigma", type=float, default=0.3, help="width of the Gaussian between unit features")
    add("--neighbours", type=int, default=10, help="K, of the instance graph")
    add("--related", type=int, default=5, help="labels a label is joined to in the label graph")
    add("--kappa", type=float, default=20, help="shrinks correlations seen on few images")
    add("--tau", type=float, default=0.95, help="highest threshold of a class")
    add("--lambda-u", type=float, default=1.0, help="weight of the consistency losses")
    add("--ramp", type=int, default=2, help="epochs in which that weight grows from 0")
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
    add("--out", help="for log.jsonl, last.pt, samples.png; default runs/scinet-DATA-N")
    add("--resume", metavar="{auto,PATH}", help="continue OUT/last.pt if it is there, or PATH")
    add("--dry-run", action="store_true", help="a few steps on a few images, nothing written")
    parser.set_defaults(**RECIPES["toy" if data == "toy" else "real"])
    above = "rank tau_u sigma neighbours related tau"
    not_below = "lambda_n lambda_q lambda_u kappa ramp"
    return common.check_args(parser.parse_args(argv), above, not_below)


# ------------------------------------------------------------------------------------------- model


class PromptEncoder(nn.Module):
    """Text features of the learned prompt [v1 .. v4, CLASS] (paper; m = 4 and start our reading).

    forward() -> (C, D), unit. The context starts as "a photo of a", shared by all classes. Takes
    CLIP's text tower, which stays frozen.
    """

    def __init__(self, clip: nn.Module, tokens: Tensor) -> None:
        super().__init__()
        end = tokens.argmax(1)  # the end-of-text token has the highest number
        self.register_buffer("end", end, persistent=False)
        tokens = tokens[:, : end.max() + 1]  # the mask is causal: what follows has no effect
        self.tower = nn.ModuleDict(dict(transformer=clip.transformer, ln_final=clip.ln_final))
        self.register_buffer("position", clip.positional_embedding.detach()[: tokens.shape[1]])
        self.register_buffer("projection", clip.text_projection.detach())
        self.register_buffer("mask", clip.attn_mask[: tokens.shape[1], : tokens.shape[1]])
        self.register_buffer("embedded", clip.token_embedding(tokens).detach())  # (C, L, width)
        self.tower.requires_grad_(False)
        self.context = nn.Parameter(self.embedded[0, 1:5].clone())  # v1 .. v4

    def forward(self) -> Tensor:
        C = len(self.embedded)
        context = self.context.expand(C, -1, -1)
        x = torch.cat((self.embedded[:, :1], context, self.embedded[:, 5:]), dim=1)  # (C, L, width)
        x = self.tower["transformer"](x + self.position, attn_mask=self.mask)
        x = self.tower["ln_final"](x)[torch.arange(C), self.end]  # (C, width)
        return F.normalize(x @ self.projection, dim=-1)


class SCINet(nn.Module):
    """images (B, 3, H, W) uint8 -> logits (B, C), image features f (B, D). All in float32."""

    def __init__(self, args: argparse.Namespace, classes: list[str]) -> None:
        super().__init__()
        clip, tokenize = common.load_clip(args.arch, args.weights, args.size)
        self.visual = clip.visual.requires_grad_(False)
        tokens = common.prompt_tokens(tokenize, "a photo of a {}", classes)
        self.prompt, D = PromptEncoder(clip, tokens), clip.visual.output_dim
        self.down = nn.Linear(D, args.rank, bias=False)
        self.up = nn.Linear(args.rank, D, bias=False)
        nn.init.zeros_(self.up.weight)  # W = up down starts at 0: CLIP's own ranking
        self.beta = nn.Parameter(torch.zeros(()))
        self.gamma = nn.Parameter(clip.logit_scale.detach().exp())
        self.bias = nn.Parameter(torch.zeros(len(classes)))
        self.text, self.image = not args.no_text_dominant, not args.no_visual_dominant
        self.tau, self.bf16 = args.tau_u, args.precision == "bf16"

    def train(self, mode: bool = True) -> SCINet:
        super().train(mode)
        self.visual.eval()
        self.prompt.eval()
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit image features f (B, D) and spatial tokens Z (B, N, D) of the frozen tower."""
        v = self.visual
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            x = v.stem(common.normalise(images, *common.CLIP_MEAN_STD))
            x = v.layer4(v.layer3(v.layer2(v.layer1(x))))  # (B, D_in, h, w)
            z, f = common.pool_features(v.attnpool, x)
        return F.normalize(f.float(), dim=-1), F.normalize(z.float(), dim=-1)

    def forward(self, images: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (f, z), t = self.encode(images), self.prompt() if text is None else text  # t (C, D)
        text_dominant = visual_dominant = f @ t.T  # (B, C)
        if self.text:
            text_dominant = text_dominant_scores(f, t, self.up(self.down(f)))
        if self.image:
            visual_dominant = visual_dominant_scores(f, t, z, self.beta, self.tau)
        # our reading: p_ic = sigma(gamma / 2 [<f_i, t_ic> + <f_ic, t_c>] + bias)
        return self.gamma / 2 * (text_dominant + visual_dominant) + self.bias, f


def text_dominant_scores(f: Tensor, t: Tensor, w: Tensor) -> Tensor:
    """<f_i, t_ic> with t_ic = nrm(t_c + W f_i) (paper: the image feeds the text; our reading).

    Args: unit f (B, D) and t (C, D); w = W f (B, D). Returns (B, C); no (B, C, D) is formed.
    """
    square = 1 + 2 * w @ t.T + w.square().sum(-1, keepdim=True)  # |t_c + W f_i|^2
    return (f @ t.T + (f * w).sum(-1, keepdim=True)) / square.clamp(min=1e-6).sqrt()


def visual_dominant_scores(f: Tensor, t: Tensor, z: Tensor, beta: Tensor, tau: float) -> Tensor:
    """<f_ic, t_c> with f_ic = nrm(f_i + beta sum_u softmax_u(<t_c, Z_iu> / tau) Z_iu).

    Paper: the text feeds the image; our reading. Args: unit f (B, D), t (C, D), z (B, N, D);
    scalar beta. Returns (B, C).
    """
    a = (t @ z.transpose(1, 2) / tau).softmax(dim=-1)  # (B, C, N)
    return (F.normalize(f[:, None] + beta * (a @ z), dim=-1) * t).sum(-1)


# ------------------------------------------------------------------------------------------ losses


def weighted_bce(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy of logits (B, C) for targets in [0, 1], a mean weighted by weight."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * weight).sum() / (weight > 0).sum().clamp(min=1)


def difficulty_weight(p: Tensor, q: Tensor, y: Tensor) -> Tensor:
    """1 - d_i / ln 2 on unknown entries, 1 on known ones: (B, C).

    d_i in [0, ln 2]: mean over classes of the Jensen-Shannon divergence between the probabilities
    p and q (B, C) of two views. Paper: confidence and difficulty work together; our reading.
    """

    def entropy(r: Tensor) -> Tensor:
        return -torch.xlogy(r, r) - torch.xlogy(1 - r, 1 - r)

    # JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2
    d = (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).mean(1, keepdim=True)
    return torch.where(y == 0, 1 - d / math.log(2), 1.0)


# ----------------------------------------------------------------------------------- pseudo-labels


@torch.no_grad()
def instance_graph(f: Tensor, neighbours: int, sigma: float, block: int = 1024) -> Tensor:
    """A_n = D^-1/2 W D^-1/2, W_ij = exp(-|f_i - f_j|^2 / 2 sigma^2) (paper: Gaussian, local).

    Args: unit f (n, D). W keeps K nearest neighbours and is made symmetric. Returns a sparse
    (n, n) on the CPU; memory O(n (K + block)).
    """
    n, rows, columns, values = len(f), [], [], []
    if not neighbours < n:
        raise InputError(f"--neighbours {neighbours} must be below {n}, the number of images")
    for start in range(0, n, block):
        own = torch.arange(start, min(start + block, n), device=f.device)
        cosine = (f[own] @ f.T).index_put_((own - start, own), f.new_tensor(-math.inf))
        cosine, index = cosine.topk(neighbours)
        values.append(((cosine - 1) / sigma**2).exp().flatten().cpu())  # |f_i - f_j|^2 = 2 - 2 cos
        rows.append(own.repeat_interleave(neighbours).cpu())
        columns.append(index.flatten().cpu())
    i, j, w = torch.cat(rows), torch.cat(columns), torch.cat(values) / 2
    where, w = torch.stack((torch.cat((i, j)), torch.cat((j, i)))), torch.cat((w, w))
    graph = torch.sparse_coo_tensor(where, w, (n, n), check_invariants=False).coalesce()
    (i, j), w = graph.indices(), graph.values()
    scale = torch.zeros(n).index_add_(0, i, w).clamp(min=1e-30).rsqrt()
    w.mul_(scale[i]).mul_(scale[j])
    return graph.to_sparse_csr()  # its products take half the time


@torch.no_grad()
def pearson(y: Tensor) -> tuple[Tensor, Tensor]:
    """Pearson's r_cd of labels c and d over images where both are known, and their number n_cd.

    y (images, C) in {1, 0, -1} -> (C, C) float64 twice; r is 0 where a label does not vary.
    """
    present, known = (y == 1).double(), (y != 0).double()
    n, both, one = known.T @ known, present.T @ present, present.T @ known  # one: c, where d known
    spread = n * one - one.square()  # n^2 times the variance of c where d is known
    r = (n * both - one * one.T) / (spread * spread.T).clamp(min=1e-12).sqrt()
    return r * (spread * spread.T > 0), n


def label_graph(y: Tensor, kappa: float, related: int) -> Tensor:
    """A_q (C, C): positive correlations of known labels, D^-1/2 R D^-1/2 (paper: Pearson).

    Our reading: shrunk by n_cd / (n_cd + kappa), the `related` largest of each label, symmetric.
    """
    r, n = pearson(y)
    r = (r * n / (n + kappa).clamp(min=1e-30)).clamp(min=0).fill_diagonal_(0)
    weakest = r.topk(min(related, len(r)), dim=1).values[:, -1:]
    r = r * (r >= weakest)
    r = (r + r.T) / 2
    scale = r.sum(1).clamp(min=1e-30).rsqrt()
    return (scale[:, None] * r * scale).float()


@torch.no_grad()
def fuse(
    s: Tensor, y: Tensor, a_n: Tensor, a_q: Tensor, lambda_n: float, lambda_q: float, steps=None
) -> Tensor:
    """The unified confidence matrix P (n, C) in [0, 1] (paper); its objective is our reading.

    P = argmin 1/2 |P - S|^2 + lambda_n/2 tr(P'(I - A_n)P) + lambda_q/2 tr(P(I - A_q)P') with known
    entries fixed. Args: scores s (n, C) in [0, 1], y (n, C), A_n sparse (n, n), A_q (C, C). A step
    shrinks the error to r = (lambda_n + lambda_q) / (1 + lambda_n + lambda_q) of it, or less;
    without `steps`, as many as bring r^steps under 1e-5.
    """
    r = (lambda_n + lambda_q) / (1 + lambda_n + lambda_q)
    if steps is None:
        steps = math.ceil(math.log(1e-5) / math.log(r)) if r else 1
    unknown, truth = (y == 0).to(s.dtype), (y == 1).to(s.dtype)
    p = truth + unknown * s
    for _ in range(steps):
        # P <- clip((S + lambda_n A_n P + lambda_q P A_q) / (1 + lambda_n + lambda_q))
        # in place: on many images, what takes the time is memory
        p = (a_n @ p).mul_(lambda_n).add_(p @ a_q, alpha=lambda_q).add_(s)
        p.div_(1 + lambda_n + lambda_q).clamp_(0, 1).mul_(unknown).add_(truth)
    return p


def hidden_map(p: Tensor, y: Tensor, truth: Tensor) -> float:
    """mAP in percent of confidences p (n, C) for the hidden entries alone. Diagnostic."""
    hidden, values = y == 0, []
    for c in range(y.shape[1]):
        true = truth[hidden[:, c], c] == 1
        if true.any():
            values.append(average_precision_score(true, p[hidden[:, c], c]))
    return 100 * float(np.mean(values)) if values else math.nan


def hidden_cells(data: common.Data, y: Tensor, s: Tensor, p: Tensor) -> list[common.Cell]:
    """For the picture: training images, their likeliest hidden labels before > after fusion."""
    cells = []
    for i in range(min(6, len(y))):
        text = []
        for c in torch.where(y[i] == 0, p[i], -1).argsort(descending=True)[:5].tolist():
            colour = "green" if data.train.y[i, c] == 1 else "red"
            text.append((f"{data.classes[c]} {s[i, c]:.2f} > {p[i, c]:.2f}", colour))
        cells.append((common.open_image(data.train.images[i]), text))
    return cells


def class_thresholds(count: Tensor, tau: float) -> Tensor:
    """T_c = tau a_c / (2 - a_c), never under 1/2 (FlexMatch, NeurIPS 2021; our reading): (C,).

    count (C,): unknown entries of class c whose last target reached tau; a_c is its share of the
    largest.
    """
    a = count / count.max().clamp(min=1)
    return (tau * a / (2 - a)).clamp(min=0.5)


def targets(q: Tensor, y: Tensor, threshold: Tensor) -> Tensor:
    """y (B, C) with unknown entries 1 where q >= T_c, -1 where 1 - q > T_c: in {1, 0, -1}."""
    guess = torch.where(q >= threshold, 1, -(1 - q > threshold).to(y.dtype))
    return torch.where(y == 0, guess.to(y.dtype), y)


# ---------------------------------------------------------------------------------------- training


def train_one_epoch(net, loader, optimizer, scheduler, memory, truth, epoch, args, tally):
    """One pass over weak, medium and strong views. Returns log entries.

    memory: p (n, C), the fused confidence of all images, count (C,) of targets that passed in the
    last epoch, sharp (C, C). tally: s (n, C), which gets the scores of the weak views (an epoch
    leaves out a last smaller batch, whose scores stay), `passed` targets (C,) and what the epoch
    adds up: see `common.add_losses`. `truth` serves the diagnostics.
    """
    net.train()
    device = net.bias.device
    threshold = class_thresholds(memory["count"], args.tau).to(device)
    ramp = min(1.0, (epoch - 1) / args.ramp) if args.ramp else 1.0
    begin, seen, p_all, sharp = time.time(), 0, *(memory[k].to(device) for k in ("p", "sharp"))
    for *views, y, index in common.progress(loader, f"epoch {epoch}"):
        y, index = y.to(device, non_blocking=True), index.to(device, non_blocking=True)
        logits = net(torch.cat(views).to(device, non_blocking=True))[0].chunk(len(views))
        y, index, *logits = common.gather(y, index, *logits)
        seen += len(index)
        weak = torch.sigmoid(logits[0].detach())
        tally["s"][index] = weak
        known = (y != 0).float()
        parts = dict(loss_known=weighted_bce(logits[0], (y == 1).float(), known))
        loss = parts["loss_known"]
        if not args.no_augment:
            medium, strong = (torch.sigmoid(x.detach()) for x in logits[1:])
            weight, p = difficulty_weight(weak, strong, y), p_all[index]
            # our reading: weak and P teach medium in L_a, medium and P teach strong in L_b
            for name, easier, x in (("a", weak, logits[1]), ("b", medium, logits[2])):
                q = torch.where(y == 0, (p + easier) / 2, known * (y == 1))
                passed = targets(q, y, threshold) != 0
                parts[f"loss_{name}"] = weighted_bce(x, q, weight * passed)
            # self-distillation: the weak view, its labels seen through the sharp label graph
            soft = weak @ sharp
            parts["loss_self"] = weighted_bce(logits[0], soft, weight * (y == 0))
            # our reading: L = L_known + lambda_u (L_a + L_b + L_self)
            unknown = parts["loss_a"] + parts["loss_b"] + parts["loss_self"]
            loss = loss + ramp * args.lambda_u * unknown
            q = (p + weak) / 2
            guessed = common.pseudo_counts(targets(q, y, threshold), y, truth[index])
            passed = ((q >= args.tau) & (y == 0)).sum(0)
            common.add_up(tally, dict(passed=passed, pseudo=guessed))
        loss.backward()
        common.sum_gradients(net)
        optimizer.step()
        optimizer.zero_grad()  # here: the next forward does not hold them
        scheduler.step()
        common.add_losses(tally, parts | dict(loss=loss))
    none = torch.tensor([0, 0, 0, 0, 1])
    entry = common.mean_losses(tally, epoch)
    entry |= common.pseudo_quality(dict(pseudo=tally.get("pseudo", none)))
    return entry | dict(images_per_second=seen / (time.time() - begin))


@torch.no_grad()
def scores(net, loader, rows: int) -> list[Tensor]:
    """Logits (rows, C) and image features (rows, D), at the indices that the loader brings."""
    net.eval()
    batches, text, device = common.progress(loader, "scores"), net.prompt(), net.bias.device
    found = [(index, *net(images.to(device), text)) for images, _, index in batches]
    return common.all_rows(found, rows)


def evaluate(net, loader, y: np.ndarray) -> tuple[dict, np.ndarray]:
    """Metrics and logits (images, C), rows as in the data set."""
    logits = scores(net, loader, len(y))[0].numpy()
    return common.multilabel_metrics(logits, y), logits


# -------------------------------------------------------------------------------------------- main


def main() -> None:
    args = parse_args()
    device = common.pick_device(args.device)
    torch.manual_seed(args.seed)
    state = common.load_checkpoint(args, "scinet", MODEL_ARGS)
    if args.predict:
        net = SCINet(args, state["classes"]).to(device).eval()
        net.load_state_dict(state["model"])
        return common.predict(lambda images: net(images)[0], args, state["classes"], device)

    data = common.load_data(args.data, args.root, args.limit, args.download)
    y = common.hide_entries(data.train.y, args.known, args.mask_seed)
    if not y.any():
        raise InputError(f"--known {args.known} of {y.size} labels leaves none known; raise it")
    run = dict(method="scinet", data=args.data, classes=data.classes, mask=common.mask_hash(y))
    net = SCINet(args, data.classes)
    net.to(device, memory_format=torch.channels_last)
    test_loader = common.test_loader(data, args)
    if state:
        common.check_same_run(state, run, args)
        net.load_state_dict(state["model"])
    if args.eval:
        metrics, logits = evaluate(net, test_loader, data.test.y)
        return common.report_test(data, metrics, logits, args)

    views = [common.train_transform(args.size, args.crops)]  # weak
    for number, magnitude, erasing in (args.medium, args.strong):
        parts = v2.RandAugment(number, magnitude), views[0], v2.RandomErasing(erasing, (0.02, 0.1))
        views.append(v2.Compose(parts))
    sampler = common.EpochSampler(np.arange(len(y)), args.batch_size, args.seed)
    views = views[: 1 if args.no_augment else 3]
    loader = common.make_loader(data.train.images, y, views, sampler, args)
    plain_sampler = common.EpochSampler(np.arange(len(y)), args.batch_size)
    plain = [common.test_transform(args.size)]
    plain_loader = common.make_loader(data.train.images, y, plain, plain_sampler, args)
    learned = [p for p in net.parameters() if p.requires_grad]
    scalars = [net.gamma, net.beta, net.bias]  # decay would pull them away from CLIP's
    rest = [p for p in learned if all(p is not q for q in scalars)]
    groups = [dict(params=rest), dict(params=scalars, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, args.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    known, truth, tally = torch.tensor(y), torch.tensor(data.train.y), {}
    a_q, start, best, metrics = label_graph(known, args.kappa, args.related), 1, None, None
    first, f = scores(net, plain_loader, len(y))
    a_n = instance_graph(f.to(device), args.neighbours, args.sigma)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        memory, start, best = state["memory"], state["epoch"] + 1, state["best"]
        metrics, tally = state["metrics"], common.to_device(state["tally"], device)
        common.set_generators(state["generators"], device)
    log = common.RunLog(args, run, y, start if state else 0, device)
    if not state:
        # CLIP's cosines are all positive: the mean of a class's logits becomes its prior's
        prior = ((known == 1).sum(0) + 0.5) / ((known != 0).sum(0) + 1)
        net.bias.data = (prior.logit() - first.mean(0)).to(device)
        s = torch.sigmoid(first + net.bias.data.cpu())
        memory = dict(s=s, count=((s >= args.tau) & (known == 0)).sum(0))
        zero_shot = evaluate(net, test_loader, data.test.y)[0]["mAP"]
        print(f"zero-shot mAP: {zero_shot:.2f}", flush=True)
        log.write(dict(epoch=0, mAP=zero_shot))
    sharp = torch.eye(len(a_q)) + a_q.square()
    memory["sharp"], logits = sharp / sharp.sum(0), None
    if args.compile:
        net.compile()

    def state_of(epoch: int, tally: dict) -> dict:
        state = dict(model=net.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch)
        state |= dict(scheduler=scheduler.state_dict(), memory=memory, metrics=metrics, best=best)
        return state | dict(tally=tally)

    hidden_truth = truth.to(device)
    for epoch in range(start, min(args.epochs, args.stop_after or args.epochs) + 1):
        sampler.epoch, sampler.skip, begin = epoch, tally.get("step", 0), time.time()
        entry = dict(epoch=epoch, lr=tally.setdefault("lr", scheduler.get_last_lr()[0]))
        before = memory["s"]
        memory["p"] = fuse(before, known, a_n, a_q, args.lambda_n, args.lambda_q)
        hidden = dict(hidden_mAP=hidden_map(before, known, truth))
        hidden["hidden_mAP_fused"] = hidden_map(memory["p"], known, truth)
        tally.setdefault("s", before.to(device, copy=True))
        try:
            parts = train_one_epoch(
                net, loader, optimizer, scheduler, memory, hidden_truth, epoch, args, tally
            )
            metrics, logits = evaluate(net, test_loader, data.test.y)
        except common.Interrupted:
            log.interrupt(epoch, state_of(epoch - 1, tally))
        zero = torch.zeros_like(memory["count"])
        memory |= dict(s=tally["s"].cpu(), count=tally.get("passed", zero).cpu())
        tally = {}
        del metrics["ap"]
        best = max(best or metrics, metrics, key=lambda m: m["mAP"])
        log.epoch(entry | parts | metrics | hidden, begin)
        log.checkpoint(state_of(epoch, tally))
        if epoch == args.stop_after:
            return print(f"stopped after epoch {epoch}; --out {log.out} --resume auto continues")
    columns = {"last epoch": metrics, "best on test (what most papers report)": best}
    print(common.metrics_table(columns))
    if logits is not None:
        log.samples(data, logits, hidden_cells(data, known, before, memory["p"]))
        print("its last row: hidden labels of training images, confidence before > after fusion")


if __name__ == "__main__":
    common.run_script(main)
