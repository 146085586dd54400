# SPDX-License-Identifier: MIT
"""Semantic Co-occurrence Insight Network (SCINet): CLIP prompts when single labels are missing.

Wu, Teng, Feng, Shi, Lin, Zhang, Wang: Exploring Partial Multi-Label Learning via Integrating
Semantic Co-occurrence Knowledge, 2025. Both towers of CLIP are frozen. What learns is a prompt, and
how image and text change each other's features. Similar images and correlated labels lend each
other confidence in the labels that nobody gave. Three ever harder views of an image must agree.

We had the abstract, one paragraph and the captions of the figures, not the equations. The code that
the authors released holds none of the three modules. From abstract and captions: frozen
encoders, a learned prompt [v1 .. vm, CLASS], a Gaussian graph of instances, a Pearson graph of
labels, one confidence matrix, weak, medium and strong views, consistency, self-distillation,
difficulty; lambda_n = 0.1, lambda_q = 0.4, width 0.3. A docstring says (paper) where it rests on
these; every formula is our reading.

Run:  python scinet.py                       toy world, 10 % of the labels known
      python scinet.py --no-augment          known labels only
      python scinet.py --data coco --root DIR --known 0.1

Measured with 10 % known, mAP over three seeds. 3,000 photographs: CLIP 28.0; learned prompt
29.3 ± 0.5; SCINet 31.9 ± 0.2. Toy world: 72.4, 81.6 ± 0.0 and 94.5 ± 0.2.
Differs from the paper, as far as can be known:
 1. lambda_q is 0.03: the paper's 0.4 costs real scores 2 to 7 points (tests/fusion.py).
 2. Pearson's coefficients are of the confidences, with known labels in their place: at 10 % known,
    one image in a hundred knows both labels of a pair.
 3. What is fused, S, is a mean over the epochs, of scores of views that nothing was erased from.
 4. A threshold is never under 1/2. What passes teaches with its probability, not as 0 or 1.
 5. The teacher of a view is the mean of an easier view and the confidence.
 6. The self-distillation is off (on: --lambda-s 1): it changed nothing on photographs.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn
from torchvision.transforms import v2

import common

REAL = dict(
    known=0.1,
    arch="RN101-quickgelu",
    size=224,  # pixels
    rank=32,  # of W
    related=5,  # labels that the label graph joins to a label
    tau=0.95,  # highest threshold of a class
    epochs=20,
    lr=2e-3,
    head_lr=2e-2,
    crops=(448, 384, 320),  # sides of the random crops, of an image of 512
    medium=dict(ops=1, magnitude=9, erase=0.0),  # of RandAugment; chance that a part is erased
    strong=dict(ops=3, magnitude=9, erase=0.5),
    workers=4,
)
TOY = REAL | dict(
    arch="local-dir:tests/toy_clip",
    size=128,
    epochs=4,
    crops=(448,),
    medium=dict(ops=0, magnitude=0, erase=0.5),  # toy objects are known by colour and size
    strong=dict(ops=0, magnitude=0, erase=1.0),
    workers=0,
)
OWN = REAL | dict(known=1.0)  # what is unknown in one's own labels, nobody knows
RECIPES = dict(real=REAL, toy=TOY, folder=OWN)

def parse_args(argv=None):
    """The arguments, and the checkpoint of --resume or None."""
    parser = common.arguments(__doc__, known="label ENTRIES", mask_seed=0, batch_size=64)
    add = parser.add_argument_group("method").add_argument
    add("--arch", help="a CLIP of open_clip, hf-hub:ORG/NAME or local-dir:FOLDER")
    add("--weights", default="default", help="default (OpenAI's, the folder's), tag, none, or file")
    add("--no-text-dominant", action="store_true", help="images do not change the text features")
    add("--no-visual-dominant", action="store_true", help="texts do not change the image feature")
    add("--no-augment", action="store_true", help="known labels only, one view")
    add(
        "--lambda-n",
        type=common.WEIGHT,
        default=0.1,
        help="weight of the instance graph; paper 0.1",
    )
    add(
        "--lambda-q",
        type=common.WEIGHT,
        default=0.03,
        help="weight of the label graph; paper 0.4",
    )
    add(
        "--sigma",
        type=common.RATE,
        default=0.3,
        help="width of the Gaussian between unit features; paper 0.3",
    )
    add(
        "--neighbours",
        type=common.POSITIVE,
        default=10,
        help="K, of the instance graph",
    )
    add(
        "--lambda-u",
        type=common.WEIGHT,
        default=0.3,
        help="weight of the consistency losses",
    )
    add(
        "--lambda-s",
        type=common.WEIGHT,
        default=0.0,
        help="weight of the self-distillation",
    )
    add(
        "--ramp",
        type=common.NATURAL,
        default=2,
        help="epochs in which lambda-u and lambda-s grow from 0",
    )
    add("--head-lr", type=common.RATE, help="highest rate of beta, gamma and the biases")
    return common.parse(parser, RECIPES, "scinet", argv)

# ------------------------------------------------------------------------------------------- model

class PromptEncoder(nn.Module):
    """Text features of the learned prompt [v1 .. v4, CLASS] (paper; m = 4 and start our reading):
    () -> (C, D), unit. The context starts as "a photo of a", shared by all classes. The text tower
    is that of `clip`, a model of open_clip, and stays frozen. tokens (C, context length): of "a
    photo of a {class}"."""

    def __init__(self, clip, tokens):
        super().__init__()
        end = tokens.argmax(1)  # the end-of-text token has the highest number
        tokens = tokens[:, : end.max() + 1]  # the mask is causal: what follows has no effect
        length = tokens.shape[1]
        self.register_buffer("end", end, persistent=False)
        self.transformer = clip.transformer.requires_grad_(False)
        self.ln_final = clip.ln_final.requires_grad_(False)
        self.register_buffer("position", clip.positional_embedding.detach()[:length])
        self.register_buffer("projection", clip.text_projection.detach())
        self.register_buffer("mask", clip.attn_mask[:length, :length])
        embedded = clip.token_embedding(tokens).detach()  # (C, length, width)
        self.register_buffer("embedded", embedded)
        self.context = nn.Parameter(embedded[0, 1:5].clone())  # v1 .. v4

    def forward(self):
        C = len(self.embedded)
        context = self.context.expand(C, -1, -1)
        x = torch.cat((self.embedded[:, :1], context, self.embedded[:, 5:]), dim=1)
        x = self.transformer(x + self.position, attn_mask=self.mask)
        x = self.ln_final(x)[torch.arange(C), self.end]  # (C, width)
        return F.normalize(x @ self.projection, dim=-1)

def text_dominant_scores(f, t, w):
    """<f_i, t_ic> with t_ic = nrm(t_c + W f_i) (paper: the image feeds the text; our reading).
    Unit f (B, D) and t (C, D), w = W f (B, D) -> (B, C); no (B, C, D) is formed."""
    square = 1 + 2 * w @ t.T + w.square().sum(-1, keepdim=True)  # |t_c + W f_i|^2
    product = f @ t.T + (f * w).sum(-1, keepdim=True)  # <f_i, t_c + W f_i>
    return product / square.clamp(min=1e-6).sqrt()

def visual_dominant_scores(f, t, z, beta, tau):
    """<f_ic, t_c> with f_ic = nrm(f_i + beta sum_u softmax_u(<t_c, Z_iu> / tau) Z_iu) (paper: the
    text feeds the image; our reading). Unit f (B, D), t (C, D), z (B, N, D) -> (B, C)."""
    a = (t @ z.transpose(1, 2) / tau).softmax(dim=-1)  # (B, C, N)
    f_class = F.normalize(f[:, None] + beta * (a @ z), dim=-1)  # (B, C, D)
    return (f_class * t).sum(-1)

class SCINet(nn.Module):
    """images (B, 3, H, W) uint8 -> logits (B, C), image features f (B, D). visual: CLIP's image
    tower, read by `common.clip_features`; scale: CLIP's; rank: of W. Where W or beta is 0 and
    fixed, its half is CLIP's cosine."""

    def __init__(self, visual, prompt, scale, rank=32, tau=0.1):
        super().__init__()
        C = len(prompt.embedded)
        D = prompt.projection.shape[1]
        self.visual = visual.requires_grad_(False)
        self.prompt = prompt
        self.tau = tau
        self.down = nn.Linear(D, rank, bias=False)
        self.up = nn.Linear(rank, D, bias=False)
        nn.init.zeros_(self.up.weight)  # W = up down starts at 0: CLIP's own ranking
        self.beta = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(C))
        self.gamma = nn.Parameter(scale.clone())

    def train(self, mode=True):
        super().train(mode)
        self.visual.eval()
        self.prompt.eval()
        return self

    def forward(self, images, text=None):
        """text (C, D): in the place of the prompt's, which need not be made for every batch."""
        with torch.no_grad():
            f, z = common.clip_features(self.visual, images)  # (B, D), (B, N, D)
        with torch.autocast(f.device.type, enabled=False):  # only the tower runs in bf16
            t = self.prompt() if text is None else text  # (C, D)
            text_dominant = text_dominant_scores(f, t, self.up(self.down(f)))
            visual_dominant = visual_dominant_scores(f, t, z, self.beta, self.tau)
            # our reading: p_ic = sigma(gamma / 2 [<f_i, t_ic> + <f_ic, t_c>] + bias)
            return self.gamma / 2 * (text_dominant + visual_dominant) + self.bias, f

# ------------------------------------------------------------------------------------------ losses

def weighted_bce(logits, target, weight):
    """Binary cross-entropy of logits (B, C) for targets in [0, 1], times weight, as a mean over the
    entries whose weight is above 0: small weights make a small loss. 0 without any."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * weight).sum() / (weight > 0).sum().clamp(min=1)

def consistency_loss(student, teacher, confidence, y, threshold, weight):
    """L_a or L_b (paper; our reading): the mean of the teacher's probabilities (B, C), of an easier
    view, and the fused confidence (B, C) teaches the logits of the student (B, C), where it passes
    the thresholds (C,) of the classes, and where y (B, C) knows, that. weight (B, C)."""
    target = torch.where(y == 0, (confidence + teacher) / 2, (y == 1).to(teacher.dtype))
    passed = targets(target, y, threshold) != 0
    return weighted_bce(student, target, weight * passed)

def difficulty_weight(p, q, y):
    """1 - d_i / ln 2 on unknown entries, 1 on known ones: (B, C).

    d_i in [0, ln 2]: mean over classes of the Jensen-Shannon divergence between the probabilities
    p and q (B, C) of two views. Paper: confidence and difficulty work together; our reading.
    """

    def entropy(r):
        return -torch.xlogy(r, r) - torch.xlogy(1 - r, 1 - r)

    # JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2
    mixed = entropy((p + q) / 2)  # (B, C)
    single = (entropy(p) + entropy(q)) / 2
    d = (mixed - single).mean(1, keepdim=True)  # (B, 1)
    return torch.where(y == 0, 1 - d / math.log(2), 1.0)

# ----------------------------------------------------------------------------------- pseudo-labels

@torch.no_grad()
def instance_graph(f, neighbours, sigma):
    """A_n = D^-1/2 W D^-1/2, W_ij = exp(-|f_i - f_j|^2 / 2 sigma^2), a sparse (n, n). Paper: a
    Gaussian of local neighbours; the formulas are our reading.

    f (n, D), unit. W keeps K nearest neighbours and is made symmetric. ValueError unless K < n.
    """
    if neighbours >= len(f):
        raise ValueError(f"{neighbours} neighbours must be below {len(f)}, the images")
    w = kneighbors_graph(f.numpy(), neighbours, mode="distance", n_jobs=-1)
    w.data = np.exp(-(w.data**2) / (2 * sigma**2))
    w = (w + w.T) / 2
    degree = np.maximum(np.asarray(w.sum(1)), 1e-30).reshape(-1, 1)
    scale = degree**-0.5
    w = w.multiply(scale).multiply(scale.T).tocsr()
    return torch.sparse_csr_tensor(w.indptr, w.indices, w.data.astype("f"), w.shape)

@torch.no_grad()
def label_graph(p, related):
    """A_q (C, C): the positive correlations R of confidences p (n, C), D^-1/2 R D^-1/2.

    Paper: Pearson's coefficients. Our reading: 0 for a label that does not vary; of each label the
    `related` largest, symmetric, and nothing with itself.
    """
    r = torch.corrcoef(p.T.double()).view(p.shape[1], -1).nan_to_num(0)
    r = r.clamp(min=0).fill_diagonal_(0)
    smallest = r.topk(min(related, len(r)), dim=1).values[:, -1:]  # that is kept, (C, 1)
    r = r * (r >= smallest)
    r = (r + r.T) / 2
    scale = r.sum(1).clamp(min=1e-30).rsqrt()
    return (scale[:, None] * r * scale).float()

@torch.no_grad()
def fuse(s, y, a_n, a_q, lambda_n, lambda_q, steps=None):
    """The unified confidence matrix P (n, C) in [0, 1] (paper); its objective is our reading.

    P = argmin 1/2 |P - S|^2 + lambda_n/2 tr(P'(I - A_n)P) + lambda_q/2 tr(P(I - A_q)P'), known
    entries fixed, of scores s (n, C) in [0, 1], y (n, C), A_n sparse (n, n), A_q (C, C). A step
    leaves r of the error or less; without `steps`, as many as bring r^steps under 1e-5.
    """
    total = 1 + lambda_n + lambda_q
    if steps is None:
        r = (lambda_n + lambda_q) / total
        steps = math.ceil(math.log(1e-5) / math.log(r)) if r else 1
    present = (y == 1).to(s.dtype)
    p = torch.where(y == 0, s, present)
    for _ in range(steps):
        # P <- clip((S + lambda_n A_n P + lambda_q P A_q) / (1 + lambda_n + lambda_q))
        p = (s + lambda_n * (a_n @ p) + lambda_q * (p @ a_q)) / total
        p = torch.where(y == 0, p.clamp(0, 1), present)
    return p

def class_thresholds(count, tau):
    """T_c = tau a_c / (2 - a_c), never under 1/2 (FlexMatch, NeurIPS 2021; our reading): (C,).
    count (C,): unknown entries of c whose confidence reached tau; a_c its share of the largest."""
    a = count / count.max().clamp(min=1)
    return (tau * a / (2 - a)).clamp(min=0.5)

def targets(q, y, threshold):
    """y (B, C) with unknown entries 1 where q >= T_c, -1 where 1 - q > T_c: in {1, 0, -1}."""
    guess = torch.where(q >= threshold, 1, -(1 - q > threshold).to(y.dtype))
    return torch.where(y == 0, guess.to(y.dtype), y)

@dataclass
class Memory:
    """What is known of the n training images: s (n, C), the mean of `seen` (n, 1) scores, and what
    `update_memory` makes of it for an epoch: the fused confidence p (n, C), the label graph of the
    self-distillation `sharp` (C, C), and the thresholds (C,) of the classes."""

    s: Tensor
    seen: Tensor
    p: Tensor | None = None
    sharp: Tensor | None = None
    thresholds: Tensor | None = None

def update_memory(memory, y, a_n, related, lambda_n, lambda_q, tau):
    """A memory with what an epoch needs, from its scores s and the known labels of y (n, C)."""
    a_q = label_graph(torch.where(y == 0, memory.s, (y == 1).float()), related)
    p = fuse(memory.s, y, a_n, a_q, lambda_n, lambda_q)
    sharp = torch.eye(len(a_q)) + a_q.square()
    sharp = sharp / sharp.sum(0)
    passed = ((p + memory.s) / 2 >= tau) & (y == 0)
    return replace(memory, p=p, sharp=sharp, thresholds=class_thresholds(passed.sum(0), tau))

# ---------------------------------------------------------------------------------------- training

def train_one_epoch(model, loader, optimizer, scheduler, memory, epoch, args):
    """One pass over weak, medium and strong views. Returns log entries, and a memory whose s takes
    up the scores of the weak views."""
    model.train()
    net = getattr(model, "module", model)  # without DistributedDataParallel
    device = net.bias.device
    confidence = memory.p.to(device)
    sharp = memory.sharp.to(device)
    thresholds = memory.thresholds.to(device)
    ramp = min(1.0, (epoch - 1) / args.ramp) if args.ramp else 1.0
    totals = dict(scores=torch.zeros_like(confidence), seen=torch.zeros_like(confidence[:, :1]))
    for *views, y, index in common.progress(loader, f"epoch {epoch}"):
        y = y.to(device, non_blocking=True)
        index = index.to(device, non_blocking=True)
        images = torch.cat(views).to(device, non_blocking=True)
        with common.autocast(device, args.precision):
            logits = model(images)[0].chunk(len(views))  # (B, C) of each view
        weak = torch.sigmoid(logits[0].detach())
        totals["scores"][index] += weak
        totals["seen"][index] += 1
        loss_known = weighted_bce(logits[0], (y == 1).float(), (y != 0).float())
        loss = loss_known
        losses = dict(loss_known=loss_known)
        if not args.no_augment:
            medium = torch.sigmoid(logits[1].detach())
            strong = torch.sigmoid(logits[2].detach())
            p = confidence[index]  # (B, C)
            weight = difficulty_weight(weak, strong, y)
            # the easier view is the teacher: weak of medium in L_a, medium of strong in L_b
            loss_medium = consistency_loss(logits[1], weak, p, y, thresholds, weight)
            loss_strong = consistency_loss(logits[2], medium, p, y, thresholds, weight)
            # self-distillation: the weak view, its labels seen through the sharp label graph
            loss_self = weighted_bce(logits[0], weak @ sharp, weight * (y == 0))
            # our reading: L = L_known + lambda_u (L_a + L_b) + lambda_s L_self
            loss_unknown = args.lambda_u * (loss_medium + loss_strong) + args.lambda_s * loss_self
            loss = loss + ramp * loss_unknown
            losses |= dict(loss_medium=loss_medium, loss_strong=loss_strong, loss_self=loss_self)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        common.add_up(totals, loss=loss, **losses)
    totals = common.over_processes(totals, net)
    seen = memory.seen + totals["seen"].cpu()
    s = (memory.s * memory.seen + totals["scores"].cpu()) / seen
    return common.epoch_entry(totals, len(loader)), Memory(s, seen)

def evaluate(net, task, precision):
    """Metrics and logits (images, C) of the test images, rows as in the data set."""
    net.eval()
    text = net.prompt().detach()
    score = lambda images: net(images, text)[:1]  # noqa: E731
    logits = common.outputs(score, task.test_loader, net.bias.device, precision)[0]
    return common.multilabel_metrics(logits.numpy(), task.test_y), logits

def diagnostics(memory, y, truth):
    """Log entry of how many guesses pass the thresholds, and how many of these are right."""
    guess = targets((memory.p + memory.s) / 2, y, memory.thresholds)
    return common.epoch_entry(dict(pseudo=common.pseudo_counts(guess, y, truth)), 1)

# -------------------------------------------------------------------------------------------- main

def build(args, classes):
    """The network of a run."""
    clip, tokenize = common.load_clip(args.arch, args.weights, args.size)
    prompt = PromptEncoder(clip, common.prompt_tokens(tokenize, "a photo of a {}", classes))
    net = SCINet(clip.visual, prompt, clip.logit_scale.detach().exp(), args.rank)
    net.down.requires_grad_(not args.no_text_dominant)
    net.up.requires_grad_(not args.no_text_dominant)
    if args.no_visual_dominant:
        net.beta.requires_grad_(False).zero_()
    return net

def harder(view, ops, magnitude, erase):
    """The view with RandAugment before it and, by a chance of `erase`, a part of it erased."""
    return v2.Compose([v2.RandAugment(ops, magnitude), view, v2.RandomErasing(erase, (0.02, 0.1))])

def start_memory(net, logits, y):
    """Set the biases, and return a memory of the scores with which CLIP begins: logits (n, C)."""
    # CLIP's cosines are all positive: the mean of a class's logits becomes that of its prior
    prior = ((y == 1).sum(0) + 0.5) / ((y != 0).sum(0) + 1)
    bias = prior.logit() - logits.mean(0)
    net.bias.data.copy_(bias)
    return Memory(torch.sigmoid(logits + bias), torch.ones(len(y), 1))

def make_optimizer(net, args, steps):
    """AdamW on two groups, matrices and the rest, and a rate that falls as a cosine."""
    learned = [p for p in net.parameters() if p.requires_grad]
    matrices = [p for p in learned if p.dim() > 1]
    rest = [p for p in learned if p.dim() <= 1]
    groups = [dict(params=matrices), dict(params=rest, lr=args.head_lr, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, args.lr, fused=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

def main():
    args, state = parse_args()
    device = common.pick_device(args.device)
    torch.manual_seed(args.seed)
    if args.predict:
        net = build(args, state["classes"]).to(device)
        return common.predict(lambda images: net(images)[0], net, args, state)
    # data
    task = common.load_task(args, state, "scinet", common.hide_entries)
    y = torch.tensor(task.y)
    truth = torch.tensor(task.truth)
    views = [common.make_transform(args.size, args.crops)]
    if not args.no_augment:
        views += [harder(views[0], **args.medium), harder(views[0], **args.strong)]
    loader = common.make_loader(common.ImageDataset(task.images, y, *views), args, train=True)
    plain_data = common.ImageDataset(task.images, y, common.make_transform(args.size))
    # network
    net = build(args, task.classes).to(device, memory_format=torch.channels_last)
    if state:
        common.load_weights(net, state["model"])
    if args.eval:
        return common.report(args, task, evaluate(net, task, args.precision)[1])
    logits, f = common.outputs(net, common.make_loader(plain_data, args), device, args.precision)
    with common.naming("--neighbours cannot be used"):
        a_n = instance_graph(f, args.neighbours, args.sigma)
    memory = Memory(**state["memory"]) if state else start_memory(net, logits, y)
    # optimizer
    optimizer, scheduler = make_optimizer(net, args, args.epochs * len(loader))
    # loop
    run = common.Run(args, task.about, state, model=net, optimizer=optimizer, scheduler=scheduler)
    metrics, logits = evaluate(net, task, args.precision)
    if not state:
        run.add(dict(epoch=0, mAP=metrics["mAP"]))  # zero-shot
    model = common.parallel(net, args.compile)
    fusion = (args.related, args.lambda_n, args.lambda_q, args.tau)
    for epoch in range(run.start, args.epochs + 1):
        run.begin(epoch, loader)
        memory = update_memory(memory, y, a_n, *fusion)
        guesses = diagnostics(memory, y, truth)
        entry, memory = train_one_epoch(model, loader, optimizer, scheduler, memory, epoch, args)
        metrics, logits = evaluate(net, task, args.precision)
        run.end(entry | guesses | metrics, memory=vars(memory))
    run.finish(task, logits)

if __name__ == "__main__":
    common.run_script(main)
