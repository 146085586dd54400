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

Measured on 3,000 photographs, 10 % known, with a small CLIP, three seeds, mAP of the last epoch:
31.6 ± 0.1; known labels only 31.3 ± 0.3, zero-shot 28.5.

Differs from the paper, as far as can be known:
 1. lambda_q is 0.03: the paper's 0.4 costs real scores 2 to 12 points (tests/fusion.py).
 2. Pearson's coefficients are of the confidences, known labels filled in: at 10 % known, one image
    in a hundred has both labels of a pair. They follow the confidences from epoch to epoch. On one
    linear probe's scores of photographs those of the known labels alone fused better by 0.3 to 1.8.
 3. Thresholds are never under 1/2; what passes teaches with its probability, not as 0 or 1.
 4. The easier view is always the teacher.
 5. What is fused is the mean over epochs of the scores of views that nothing was erased from.
"""

import math
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

import common
from common import need

RECIPES = {  # rank of W; related: labels joined to a label
    "real": dict(
        arch="RN101-quickgelu", size=224, epochs=20, crops=(448, 384, 320), medium=(1, 9, 0),
        strong=(3, 9, 0.5), workers=4, rank=32, related=5,
    ),
    "toy": dict(  # RandAugment changes colours and sizes, by which toy objects are known
        arch="local-dir:tests/toy_clip", size=128, epochs=4, crops=(448,), medium=(0, 0, 0.5),
        strong=(0, 0, 1), workers=0, rank=32, related=5,
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
    add("--arch", help="a CLIP of open_clip, hf-hub:ORG/NAME or local-dir:FOLDER")
    add("--weights", default="default", help="default (OpenAI's, the folder's), none, or a file")
    add("--size", type=int, help="side of the square input in pixels")
    add("--no-text-dominant", action="store_true", help="images do not change the text features")
    add("--no-visual-dominant", action="store_true", help="texts do not change the image feature")
    add("--no-augment", action="store_true", help="known labels only, one view")
    add("--tau-u", type=float, default=0.1, help="temperature over positions")
    add("--lambda-n", type=float, default=0.1, help="weight of the instance graph; paper 0.1")
    add("--lambda-q", type=float, default=0.03, help="weight of the label graph; paper 0.4")
    add("--sigma", type=float, default=0.3, help="width of the Gaussian between unit features")
    add("--neighbours", type=int, default=10, help="K, of the instance graph")
    add("--tau", type=float, default=0.95, help="highest threshold of a class")
    add("--lambda-u", type=float, default=1.0, help="weight of the consistency losses")
    add("--ramp", type=int, default=2, help="epochs in which that weight grows from 0")
    add = parser.add_argument_group("run").add_argument
    add("--epochs", type=int, help="length of the schedule")
    add("--batch-size", type=int, default=64, help="images a step")
    add("--lr", type=float, default=2e-3, help="highest rate of the prompt and W")
    add("--head-lr", type=float, default=2e-2, help="highest rate of beta, gamma and the biases")
    add("--workers", type=int, help="processes that decode images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--seed", type=int, default=0, help="initial weights, order and augmentation")
    add("--out", help="for log.jsonl, last.pt, samples.png; default runs/scinet-DATA-N")
    add("--resume", metavar="{auto,PATH}", help="continue OUT/last.pt if it is there, or PATH")
    add("--dry-run", action="store_true", help="a few steps on a few images, nothing written")
    first = parser.parse_known_args(argv)[0]  # --data and --resume decide the defaults
    state = common.load_checkpoint(first, "scinet")
    parser.set_defaults(**state["args"] if state else RECIPES.get(first.data, RECIPES["real"]))
    add("-h", "--help", action="help", help="show this and exit")
    return common.check_args(parser.parse_args(argv), "tau_u sigma neighbours tau head_lr"), state


# ------------------------------------------------------------------------------------------- model


class PromptEncoder(nn.Module):
    """Text features of the learned prompt [v1 .. v4, CLASS] (paper; m = 4 and start our reading):
    () -> (C, D), unit. The context starts as "a photo of a", shared by all classes. The text tower
    is CLIP's and stays frozen."""

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


def text_dominant_scores(f: Tensor, t: Tensor, w: Tensor) -> Tensor:
    """<f_i, t_ic> with t_ic = nrm(t_c + W f_i) (paper: the image feeds the text; our reading).
    Unit f (B, D) and t (C, D), w = W f (B, D) -> (B, C); no (B, C, D) is formed."""
    square = 1 + 2 * w @ t.T + w.square().sum(-1, keepdim=True)  # |t_c + W f_i|^2
    return (f @ t.T + (f * w).sum(-1, keepdim=True)) / square.clamp(min=1e-6).sqrt()


def visual_dominant_scores(f: Tensor, t: Tensor, z: Tensor, beta: Tensor, tau: float) -> Tensor:
    """<f_ic, t_c> with f_ic = nrm(f_i + beta sum_u softmax_u(<t_c, Z_iu> / tau) Z_iu) (paper: the
    text feeds the image; our reading). Unit f (B, D), t (C, D), z (B, N, D) -> (B, C)."""
    a = (t @ z.transpose(1, 2) / tau).softmax(dim=-1)  # (B, C, N)
    return (F.normalize(f[:, None] + beta * (a @ z), dim=-1) * t).sum(-1)


class SCINet(nn.Module):
    """images (B, 3, H, W) uint8 -> logits (B, C), image features f (B, D). visual: CLIP's image
    tower; scale: CLIP's; rank: of W. Where W or beta is 0 and fixed, its half is CLIP's cosine."""

    def __init__(self, visual, prompt, scale: Tensor, rank: int = 32, tau: float = 0.1) -> None:
        super().__init__()
        self.visual, self.prompt = visual.requires_grad_(False), prompt
        (C, D), self.tau = (len(prompt.embedded), prompt.projection.shape[1]), tau
        self.down, self.up = nn.Linear(D, rank, bias=False), nn.Linear(rank, D, bias=False)
        nn.init.zeros_(self.up.weight)  # W = up down starts at 0: CLIP's own ranking
        self.beta, self.bias = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(C))
        self.gamma = nn.Parameter(scale.clone())

    def train(self, mode: bool = True):
        super().train(mode)
        self.visual.eval()
        self.prompt.eval()
        return self

    def forward(self, images: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            f, z = common.clip_features(self.visual, images)  # (B, D), (B, N, D)
        with torch.autocast(f.device.type, enabled=False):  # only the tower runs in bf16
            t = self.prompt() if text is None else text  # (C, D)
            text_dominant = text_dominant_scores(f, t, self.up(self.down(f)))
            visual_dominant = visual_dominant_scores(f, t, z, self.beta, self.tau)
            # our reading: p_ic = sigma(gamma / 2 [<f_i, t_ic> + <f_ic, t_c>] + bias)
            return self.gamma / 2 * (text_dominant + visual_dominant) + self.bias, f


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
def instance_graph(f: Tensor, neighbours: int, sigma: float) -> Tensor:
    """A_n = D^-1/2 W D^-1/2, W_ij = exp(-|f_i - f_j|^2 / 2 sigma^2) (paper: Gaussian, local).

    f (n, D), unit. W keeps K nearest neighbours and is made symmetric. Returns a sparse (n, n).
    """
    need(neighbours < len(f), f"--neighbours {neighbours} must be below {len(f)}, the images")
    w = kneighbors_graph(f.numpy(), neighbours, mode="distance", n_jobs=-1)
    w.data = np.exp(-(w.data**2) / (2 * sigma**2))
    w = (w + w.T) / 2
    scale = np.maximum(np.asarray(w.sum(1)), 1e-30).reshape(-1, 1) ** -0.5
    w = w.multiply(scale).multiply(scale.T).tocsr()
    return torch.sparse_csr_tensor(w.indptr, w.indices, w.data.astype("f"), w.shape)


@torch.no_grad()
def pearson(p: Tensor) -> Tensor:
    """Pearson's r_cd (C, C) of confidences p (n, C); 0 for a label that does not vary."""
    return torch.corrcoef(p.T.double()).view(p.shape[1], -1).nan_to_num(0)


def label_graph(p: Tensor, related: int) -> Tensor:
    """A_q (C, C): the positive correlations R of confidences p, D^-1/2 R D^-1/2 (paper: Pearson).

    Our reading: of each label the `related` largest, symmetric, and nothing with itself.
    """
    r = pearson(p).clamp(min=0).fill_diagonal_(0)
    r = r * (r >= r.topk(min(related, len(r)), dim=1).values[:, -1:])
    r = (r + r.T) / 2
    scale = r.sum(1).clamp(min=1e-30).rsqrt()
    return (scale[:, None] * r * scale).float()


@torch.no_grad()
def fuse(
    s: Tensor, y: Tensor, a_n: Tensor, a_q: Tensor, lambda_n: float, lambda_q: float, steps=None
) -> Tensor:
    """The unified confidence matrix P (n, C) in [0, 1] (paper); its objective is our reading.

    P = argmin 1/2 |P - S|^2 + lambda_n/2 tr(P'(I - A_n)P) + lambda_q/2 tr(P(I - A_q)P'), known
    entries fixed, of scores s (n, C) in [0, 1], y (n, C), A_n sparse (n, n), A_q (C, C). A step
    leaves r of the error or less; without `steps`, as many as bring r^steps under 1e-5.
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


def class_thresholds(count: Tensor, tau: float) -> Tensor:
    """T_c = tau a_c / (2 - a_c), never under 1/2 (FlexMatch, NeurIPS 2021; our reading): (C,).
    count (C,): unknown entries of c whose last target reached tau; a_c its share of the largest."""
    a = count / count.max().clamp(min=1)
    return (tau * a / (2 - a)).clamp(min=0.5)


def targets(q: Tensor, y: Tensor, threshold: Tensor) -> Tensor:
    """y (B, C) with unknown entries 1 where q >= T_c, -1 where 1 - q > T_c: in {1, 0, -1}."""
    guess = torch.where(q >= threshold, 1, -(1 - q > threshold).to(y.dtype))
    return torch.where(y == 0, guess.to(y.dtype), y)


def hidden_map(p: Tensor, y: Tensor, truth: Tensor) -> float:
    """mAP in percent of confidences p (n, C) for the hidden entries alone. Diagnostic."""
    hidden = torch.where(y == 0, truth, 0).numpy()
    ap = common.average_precision(p.numpy(), hidden)[(hidden == 1).any(0)]
    return float(ap.mean()) if len(ap) else math.nan


# ---------------------------------------------------------------------------------------- training


def train_one_epoch(model, loader, optimizer, scheduler, memory, truth, epoch, args):
    """One pass over weak, medium and strong views. Returns log entries.

    memory: fused confidence p (n, C), sharp label graph (C, C); s (n, C), a mean of `seen` (n, 1)
    scores, takes up the weak views'; count (C,): targets that passed. `truth`: for diagnostics.
    """
    model.train()
    device = getattr(model, "module", model).bias.device
    p_all, sharp, truth = (x.to(device) for x in (memory["p"], memory["sharp"], truth))
    sums, number = torch.zeros_like(p_all), torch.zeros_like(p_all[:, :1])
    totals = dict(sums=sums, number=number, passed=torch.zeros_like(memory["count"], device=device))
    thresholds = class_thresholds(memory["count"], args.tau).to(device)
    ramp = min(1.0, (epoch - 1) / args.ramp) if args.ramp else 1.0
    for *views, y, index in tqdm(loader, f"epoch {epoch}", leave=False, disable=None):
        y, index = y.to(device, non_blocking=True), index.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            logits = model(torch.cat(views).to(device, non_blocking=True))[0].chunk(len(views))
        weak, known, p = torch.sigmoid(logits[0].detach()), (y != 0).float(), p_all[index]
        sums[index] += weak
        number[index] += 1
        parts = dict(loss_known=weighted_bce(logits[0], (y == 1).float(), known))
        loss = parts["loss_known"]
        if not args.no_augment:
            medium, strong = (torch.sigmoid(x.detach()) for x in logits[1:])
            weight = difficulty_weight(weak, strong, y)
            # our reading: weak and P teach medium in L_a, medium and P teach strong in L_b
            for name, easier, x in (("a", weak, logits[1]), ("b", medium, logits[2])):
                q = torch.where(y == 0, (p + easier) / 2, known * (y == 1))
                taught = targets(q, y, thresholds) != 0
                parts[f"loss_{name}"] = weighted_bce(x, q, weight * taught)
            # self-distillation: the weak view, its labels seen through the sharp label graph
            parts["loss_self"] = weighted_bce(logits[0], weak @ sharp, weight * (y == 0))
            # our reading: L = L_known + lambda_u (L_a + L_b + L_self)
            unknown = parts["loss_a"] + parts["loss_b"] + parts["loss_self"]
            loss = loss + ramp * args.lambda_u * unknown
            q = (p + weak) / 2
            counts = common.pseudo_counts(targets(q, y, thresholds), y, truth[index])
            common.add_up(totals, pseudo=counts, passed=((q >= args.tau) & (y == 0)).sum(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        common.add_up(totals, loss=loss, **parts)
    entry = common.epoch_entry(totals, len(loader))
    seen = memory["seen"] + number.cpu()
    s = (memory["s"] * memory["seen"] + sums.cpu()) / seen
    memory |= dict(s=s, seen=seen, count=totals["passed"].cpu())
    return entry


def evaluate(net, loader, y: np.ndarray, bf16: bool) -> tuple[dict, Tensor]:
    """Metrics and logits (images, C), rows as in the data set."""
    text = net.eval().prompt().detach()
    logits = common.outputs(lambda x: net(x, text)[:1], loader, net.bias.device, bf16)[0]
    return common.multilabel_metrics(logits.numpy(), y), logits


# -------------------------------------------------------------------------------------------- main


def build(args: Namespace, classes: list[str]) -> SCINet:
    clip, tokenize = common.load_clip(args.arch, args.weights, args.size)
    prompt = PromptEncoder(clip, common.prompt_tokens(tokenize, "a photo of a {}", classes))
    net = SCINet(clip.visual, prompt, clip.logit_scale.detach().exp(), args.rank, args.tau_u)
    for layer in (net.down, net.up):
        layer.requires_grad_(not args.no_text_dominant)
    if args.no_visual_dominant:
        net.beta.requires_grad_(False).zero_()
    return net


def main() -> None:
    args, state = parse_args()
    device, bf16 = common.pick_device(args.device), args.precision == "bf16"
    torch.manual_seed(args.seed)
    if args.predict:
        net = build(args, state["classes"]).to(device)
        return common.predict(lambda x: net.eval()(x)[0], net, args, state)

    classes, train, test, y, about = common.load_task(args, state, "scinet", common.hide_entries)
    net = build(args, classes).to(device, memory_format=torch.channels_last)
    if state:
        common.load_weights(net, state["model"])
    plain, views = common.make_transform(args.size), [common.make_transform(args.size, args.crops)]
    test_loader = common.make_loader(common.ImageDataset(*test, plain), args)
    if args.eval:
        return common.report(args, classes, test[1], evaluate(net, test_loader, test[1], bf16)[1])

    known, truth = torch.tensor(y), torch.tensor(train[1])
    plain_loader = common.make_loader(common.ImageDataset(train[0], y, plain), args)
    logits, f = common.outputs(net.eval(), plain_loader, device, bf16)
    a_n = instance_graph(f, args.neighbours, args.sigma)
    # CLIP's cosines are all positive: the mean of a class's logits becomes its prior's
    bias = ((known == 1).sum(0) + 0.5).div((known != 0).sum(0) + 1).logit() - logits.mean(0)
    s, net.bias.data = torch.sigmoid(logits + bias), bias.to(device)
    memory = dict(s=s, seen=torch.ones(len(s), 1), count=((s >= args.tau) & (known == 0)).sum(0))
    for number, magnitude, erasing in () if args.no_augment else (args.medium, args.strong):
        erase = v2.RandomErasing(erasing, (0.02, 0.1))
        views.append(v2.Compose([v2.RandAugment(number, magnitude), views[0], erase]))
    loader = common.make_loader(common.ImageDataset(train[0], y, *views), args, train=True)
    learned = [p for p in net.parameters() if p.requires_grad]
    matrices, rest = ([p for p in learned if (p.dim() > 1) == many] for many in (True, False))
    groups = [dict(params=matrices), dict(params=rest, lr=args.head_lr, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, args.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    run = common.Run(args, about, state, model=net, optimizer=optimizer, scheduler=scheduler)
    metrics, logits = evaluate(net, test_loader, test[1], bf16)
    if state:
        memory = state["memory"]
    else:
        run.add(dict(epoch=0, mAP=metrics["mAP"]))  # zero-shot
    model = common.parallel(net, args.compile)
    for epoch in range(run.start, args.epochs + 1):
        run.begin(epoch, loader)
        a_q = label_graph(torch.where(known == 0, memory["s"], (known == 1).float()), args.related)
        sharp = torch.eye(len(a_q)) + a_q.square()
        memory["p"] = fuse(memory["s"], known, a_n, a_q, args.lambda_n, args.lambda_q)
        memory["sharp"] = sharp / sharp.sum(0)
        hidden = dict(hidden_mAP=hidden_map(memory["s"], known, truth))
        hidden["hidden_mAP_fused"] = hidden_map(memory["p"], known, truth)
        more = memory, truth, epoch, args
        entry = train_one_epoch(model, loader, optimizer, scheduler, *more)
        metrics, logits = evaluate(net, test_loader, test[1], bf16)
        run.end(entry | metrics | hidden, memory=memory)
    run.finish(common.test_cells(test, logits))


if __name__ == "__main__":
    common.run_script(main)
