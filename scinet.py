# SPDX-License-Identifier: MIT
"""Semantic Co-occurrence Insight Network (SCINet): CLIP prompts when single labels are missing.

Wu, Teng, Feng, Shi, Lin, Zhang, Wang: Exploring Partial Multi-Label Learning via Integrating
Semantic Co-occurrence Knowledge, 2025 (arXiv 2507.05992). This file is a reconstruction from the
abstract, a paragraph and figures of the project's page: we did not have the equations. Both towers
of CLIP are frozen. A prompt learns, and how image and text change each other's features. Similar
images and correlated labels lend each other confidence in labels that nobody gave. A weak, a medium
and a strong view of an image must agree.

Run:  python scinet.py                            toy world, 10 % of the labels known
      python scinet.py --data coco --known 0.1    COCO 2014 in data/
      python scinet.py --lambda-u 0               known labels only

Measured:  toy world mAP 95.0 +- 0.3 (CLIP 72.4); photographs, 10 %: 31.8 +- 0.2 (CLIP 28.0).
Neither fusion nor self-distillation added to that (tests/RESULTS.md).

Where this differs. Their code is wuliwuxin/SCINet, which names an earlier paper (ACM MM 2024); "-":
not said; "=": as theirs. Docstrings say (paper) for what rests on abstract, paragraph, figures.
what              paper                  their code                     here (formulas: our reading)
image tower       frozen                 learns                         frozen
prompt            [v1 .. vm, CLASS]      m = 4, from "a photo of a"     =
text and image    bi-dominant prompter   a graph network on the texts   two halves, the mean of both
images' graph     Gaussian, width 0.3    none                           10 neighbours, width 0.3
labels' graph     Pearson, weight 0.4    a file, top-k                  Pearson of confidences with
                                                                        known labels; weight 0.03
views             weak, medium, strong   0, 3 and 1 x RandAugment       0, 1, 3 x (toy: 0), erasing
teacher           -                      the view of 3 of that of 1     easier view and fusion
threshold         dynamic                tau a / (2 - a)                =, never under 1/2
unknown label     -                      absent unless p > 0.6          no loss unless it passes
self-distilling   yes                    none                           --lambda-s 1; off
"""

import argparse
import json
import logging
import math
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import laplacian
from sklearn.neighbors import kneighbors_graph
from sklearn.preprocessing import normalize
from timm.layers import resample_abs_pos_embed
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler
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
    weights=("openai", "tag of open_clip, file, or none; hf-hub: and local-dir: have their own"),
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
    arch=("local-dir:tests/toy/clip", "RN101-quickgelu", "of open_clip, hf-hub:, local-dir:"),
    size=(0, "side of the square input in pixels; 0 for that of the tower"),
    epochs=(4, 20, "length of the schedule"),
    batch_size=(64, "images a step, over all processes"),
    lr=(2e-3, "learning rate of prompt and W"),
    head_lr=(2e-2, "learning rate of beta, gamma and the biases"),
    precision=("fp32", "of the network: fp32 or bf16"),
    seed=(0, "of initial weights, order and augmentation"),
    rank=(32, "of W; 0: no text-dominant half"),
    beta=(1.0, "weight of the local features at the start; 0: no visual-dominant half"),
    lambda_u=(0.3, "weight of the consistency losses; 0: known labels only"),
    lambda_s=(0.0, "weight of the self-distillation"),
    tau=(0.95, "highest threshold of a class"),
    lambda_n=(0.1, "weight of the instance graph; paper 0.1"),
    lambda_q=(0.03, "weight of the label graph; paper 0.4"),
    sigma=(0.3, "width of the Gaussian between unit features; paper 0.3"),
    neighbours=(10, "K, of an image in the instance graph"),
    smallest_crop=(448, 320, "random crops of an image of 512 are 512, 448, ... or this"),
    operations=(0, 3, "of RandAugment on a strong view; a third on a medium one"),
    erase=(1.0, 0.5, "chance that a part of a strong view is erased; half of it on a medium one"),
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
class LearnedPrompt(nn.Module):
    """In the place of CLIP's token embedding: tokens (C, length) of "a photo of a {class}" ->
    (C, length, width), where v1 .. v4, which are learned, stand for the first four words. Paper:
    [v1 .. vm, CLASS]; m = 4 and the start are our reading."""

    def __init__(self, embedding, tokens):
        super().__init__()
        self.embedding = embedding
        self.context = nn.Parameter(embedding(tokens[0, 1:5]).detach())  # (4, width)

    def forward(self, tokens):
        x = self.embedding(tokens).clone()
        x[:, 1:5] = self.context
        return x

class SCINet(nn.Module):
    """images (B, 3, H, W) uint8, and unit text features (C, D) in the place of the prompt's, which
    need not be made for every batch -> logits (B, C), unit image features f (B, D).

    clip: a model of open_clip, which is changed: frozen, its prompt learned and no longer than the
    classes need. tokens (C, context length): "a photo of a {class}". rank: of W. beta: where it
    starts; 0 is fixed. The formulas are our reading.
    """

    def __init__(self, clip, tokens, rank, beta):
        super().__init__()
        self.bf16 = False  # whether the towers run in bfloat16
        length = tokens.argmax(1).max() + 1  # where the longest text ends; what follows is empty
        clip.positional_embedding.data = clip.positional_embedding[:length]
        clip.attn_mask = clip.attn_mask[:length, :length]
        self.clip = clip.requires_grad_(False)
        self.clip.token_embedding = LearnedPrompt(clip.token_embedding, tokens)
        self.register_buffer("tokens", tokens[:, :length])
        D = clip.text_projection.shape[1]
        self.down = nn.Linear(D, rank, bias=False)
        self.up = nn.Linear(rank, D, bias=False)
        nn.init.zeros_(self.up.weight)  # W = up down starts at 0: CLIP's own ranking
        self.beta = nn.Parameter(torch.tensor(beta), requires_grad=beta > 0)
        self.gamma = nn.Parameter(clip.logit_scale.exp())
        self.bias = nn.Parameter(torch.zeros(len(tokens)))

    def text(self):
        with torch.autocast(self.bias.device.type, torch.bfloat16, enabled=self.bf16):
            return self.clip.encode_text(self.tokens, normalize=True).float()  # (C, D)

    def forward(self, images, text=None):
        t = self.text() if text is None else text  # (C, D)
        with torch.no_grad(), torch.autocast(t.device.type, torch.bfloat16, enabled=self.bf16):
            f, z = clip_features(self.clip.visual, images)  # (B, D), (B, N, D)
        # text-dominant: t_ic = nrm(t_c + W f_i)
        shift = self.up(self.down(f))  # (B, D)
        t_image = F.normalize(t + shift[:, None], dim=-1)  # (B, C, D)
        # visual-dominant: f_ic = nrm(f_i + beta sum_u softmax_u(<t_c, Z_iu> / 0.1) Z_iu)
        a = (t @ z.mT / 0.1).softmax(dim=-1)  # (B, C, N)
        f_class = F.normalize(f[:, None] + self.beta * (a @ z), dim=-1)  # (B, C, D)
        # p_ic = sigmoid(gamma / 2 (<f_i, t_ic> + <f_ic, t_c>) + bias_c)
        text_dominant = (f[:, None] * t_image).sum(-1)  # (B, C)
        visual_dominant = (f_class * t).sum(-1)  # (B, C)
        return self.gamma / 2 * (text_dominant + visual_dominant) + self.bias, f

def load_clip(arch, weights, size):
    """open_clip's CLIP, its tokenizer, and its size in pixels, which is `size` or, if that is 0,
    its own. arch: a name of open_clip, hf-hub:NAME, or local-dir:FOLDER, looked for here and beside
    this file. weights: a tag of open_clip, a file, or "none"; of hf-hub and local-dir their own."""
    kind, colon, folder = arch.partition(":")
    if kind == "local-dir" and not os.path.exists(folder):
        arch = f"local-dir:{Path(__file__).parent / folder}"
    load = weights != "none"
    tag = weights if load and not colon else ""
    try:
        spec = open_clip.get_model_config(arch)
        assert spec, "open_clip does not know it"
        other = {"custom_text", "hf_model_name", "pool_type"} & {*spec, *spec["text_cfg"]}
        assert not other, "its text tower is not as CLIP's and takes no prompts"
        quick = open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu")
        assert not quick or spec.get("quick_gelu"), "add -quickgelu to --arch for these weights"
        clip = open_clip.create_model(arch, tag, load_weights=load, require_pretrained=load)
        size = size or spec["vision_cfg"].get("image_size", 224)
        visual = clip.eval().visual
        stride = getattr(visual, "patch_size", [32])[0]  # of a ViT, or of CLIP's ResNets
        table = getattr(getattr(visual, "attnpool", visual), "positional_embedding", None)
        if table is not None:  # open_clip does not resize that of an attention pool
            assert size % stride == 0, f"--size must be a multiple of {stride}"
            table.data = resample_abs_pos_embed(table.data[None], [size // stride] * 2)[0]
        f, u = clip_features(visual, torch.zeros(1, 3, size, size))
        assert f.ndim == 2 and (u.shape[1] ** 0.5).is_integer(), "its features are no square map"
        return clip, open_clip.get_tokenizer(arch), size
    except Exception as error:  # no network, files of any content, other towers
        need(False, f"--arch {arch} --weights {weights} --size {size} cannot be used: {error}")

def clip_features(visual, images):
    """CLIP's image feature f (B, D) and local features u (B, N, D), unit, N by rows, of an image
    tower of open_clip. u_i is what the end of the tower makes of position i alone: a ResNet's
    attention pool, a ViT's last block (the value path of MaskCLIP, ECCV 2022), the head of a
    convolutional tower of timm."""
    x = normalise(images, visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"])
    pool = getattr(visual, "attnpool", None)
    if hasattr(visual, "trunk"):
        x = visual.trunk.forward_features(x)  # (B, D_in, h, w)
        f = visual.head(visual.trunk.forward_head(x))
        maps = x.flatten(2).mT.flatten(0, 1)[:, :, None, None]  # (B * N, D_in, 1, 1)
        u = visual.head(visual.trunk.forward_head(maps)).unflatten(0, (len(x), -1))
    else:
        out = visual.forward_intermediates(x, indices=1 if pool else 2)  # how many of the last
        f = out["image_features"]
        x = out["image_intermediates"][0].flatten(2).mT  # (B, N, D_in)
        if pool:
            u = pool.c_proj(pool.v_proj(x + pool.positional_embedding[1:]))
        else:  # x enters the last block, in which a position by itself can only read itself
            x = visual.transformer.resblocks[-1](x.flatten(0, 1)[:, None]).view_as(x)
            u = visual.ln_post(x) @ visual.proj
    return F.normalize(f.float(), dim=-1), F.normalize(u.float(), dim=-1)

def prompt_tokens(tokenize, sentence, classes):
    """Tokens (C, context length) of the sentence with each class in the place of {}."""
    texts = [sentence.format(class_text(name)) for name in classes]
    tokens = tokenize(texts)
    need(not texts[0].endswith(" 0"), "CLIP needs names of the classes, in classes.txt")
    distinct = len(tokens.unique(dim=0)) == len(classes)
    need(distinct, f"CLIP reads one text in two of the names {classes}")
    return tokens

def build(args, classes, y, checkpoint):
    """The network of a run: a new one, or that of a checkpoint."""
    clip, tokenize, args.size = load_clip(args.arch, args.weights, args.size)
    tokens = prompt_tokens(tokenize, "a photo of a {}", classes)
    net = SCINet(clip, tokens, args.rank, args.beta)
    net.bf16 = args.precision == "bf16"
    if checkpoint:
        net.load_state_dict(checkpoint["model"])
    return net

# ----------------------------------------------------------------------- losses and pseudo-labels
def weighted_bce(logits, target, weight):
    """Binary cross-entropy of logits (B, C) for targets in [0, 1], times weight, as a mean over the
    entries whose weight is above 0: small weights make a small loss. 0 without any."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * weight).sum() / (weight > 0).sum().clamp(min=1)

def consistency_loss(student, teacher, fused, y, thresholds, weight):
    """L_a or L_b (paper; our reading): logits of the student (B, C) learn y (B, C) where it knows,
    and elsewhere, if it passes the thresholds (C,), the belief of the teacher's probabilities
    (B, C), of an easier view, and the fused confidence (B, C). weight (B, C)."""
    q = (fused + teacher) / 2
    target = torch.where(y == 0, q, (y == 1).float())
    passed = (target >= thresholds) | (1 - target >= thresholds)
    return weighted_bce(student, target, weight * passed)

def difficulty_weight(p, q, y):
    """1 - d_i / ln 2 on unknown entries, 1 on known ones: (B, C). d_i in [0, ln 2]: mean over the
    classes of the Jensen-Shannon divergence between the probabilities p and q (B, C) of two views.
    Paper: confidence and difficulty work together; our reading."""
    entropy = partial(F.binary_cross_entropy, reduction="none")  # H(r) is that of r and r
    m = (p + q) / 2
    # JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2
    js = entropy(m, m) - (entropy(p, p) + entropy(q, q)) / 2  # (B, C)
    d = js.mean(1, keepdim=True)  # (B, 1)
    return torch.where(y == 0, 1 - d / math.log(2), 1.0)

def instance_graph(f, neighbours, sigma):
    """I - A_n, A_n = D^-1/2 W D^-1/2, W_ij = exp(-|f_i - f_j|^2 / 2 sigma^2), a sparse (n, n), of
    unit features f (n, D). W is 0 but for the nearest neighbours; then the mean with its transpose.
    Paper: a Gaussian of local neighbours; our formulas. An image of weights 0 has A_ii = 1."""
    w = kneighbors_graph(f, min(neighbours, len(f) - 1), mode="distance")
    w.data = np.exp(-(w.data**2) / (2 * sigma**2))
    return laplacian((w + w.T) / 2, normed=True)

def label_graph(p):
    """I - A_q, A_q = D^-1/2 R D^-1/2, a (C, C), of the positive correlations R of confidences p
    (n, C). Paper: Pearson's coefficients. Our reading: 0 for a label that is 0 or 1 everywhere (its
    A_cc is 1), and of a label with itself."""
    x = normalize(p - p.mean(0), axis=0)  # of unit length, so that products are correlations
    r = (x.T @ x).clip(min=0)
    np.fill_diagonal(r, 0)
    return laplacian(r, normed=True)

def fuse(s, y, l_n, l_q, lambda_n, lambda_q, steps=12):
    """The unified confidence matrix P (n, C) in [0, 1] (paper); its objective is our reading.

    P = argmin 1/2 |P - S|^2 + lambda_n/2 tr(P'L_n P) + lambda_q/2 tr(P L_q P'), known entries
    fixed, of scores s (n, C) in [0, 1], y (n, C), L_n = I - A_n sparse (n, n), L_q = I - A_q
    (C, C). A step leaves at most (lambda_n + lambda_q) / (1 + lambda_n + lambda_q) of the error.
    """
    p = np.where(y == 0, s, y == 1)
    for _ in range(steps):
        # P <- clip((S + lambda_n A_n P + lambda_q P A_q) / (1 + lambda_n + lambda_q))
        p = s + lambda_n * (p - l_n @ p) + lambda_q * (p - p @ l_q)
        p = np.where(y == 0, p / (1 + lambda_n + lambda_q), y == 1).clip(0, 1)
    return p

def class_thresholds(q, y, tau):
    """T_c = tau a_c / (2 - a_c), never under 1/2 (FlexMatch, NeurIPS 2021; our reading): (C,). a_c:
    in how many unknown entries of y (n, C) the belief q (n, C) reaches tau, for class c, as a part
    of the largest such number."""
    count = ((q >= tau) & (y == 0)).sum(0)
    a = count / max(1, count.max())
    return (tau * a / (2 - a)).clip(min=0.5)

def complete(s, y, l_n, args):
    """Fused confidence (n, C), belief (n, C) and thresholds (C,) of the training images, of scores
    s and known labels y (n, C), and I - A_n (n, n)."""
    l_q = label_graph(np.where(y == 0, s, y == 1))
    fused = fuse(s, y, l_n, l_q, args.lambda_n, args.lambda_q).astype("float32")
    q = (fused + s) / 2
    return fused, q, class_thresholds(q, y, args.tau)

# ------------------------------------------------------------------------- training and evaluation
def train_one_epoch(model, net, loader, optimizer, known, args):
    """One pass over weak, medium and strong views. known: labels y (n, C), fused confidence (n, C)
    and thresholds (C,). Returns an entry of the log, and the scores (n, C) of the weak views."""
    start = time.time()
    model.train()
    net.clip.eval()
    device = net.bias.device
    labels, confidence, thresholds = (torch.tensor(x).to(device) for x in known)
    losses = torch.zeros(5, device=device)  # read at the end: no step waits for the device
    scores = torch.zeros(labels.shape, device=device)
    for batch in progress(loader):
        *views, index = (x.to(device, non_blocking=True) for x in batch)
        y = labels[index]  # (B, C)
        fused = confidence[index]  # (B, C)
        logits = model(torch.cat(views))[0].unflatten(0, (3, -1))  # (3, B, C)
        p = torch.sigmoid(logits.detach())
        scores[index] = p[0]
        weight = difficulty_weight(p[0], p[2], y)  # (B, C)
        loss_known = weighted_bce(logits[0], (y == 1).float(), (y != 0).float())
        # the easier view is the teacher: weak of medium in L_a, medium of strong in L_b
        loss_medium = consistency_loss(logits[1], p[0], fused, y, thresholds, weight)
        loss_strong = consistency_loss(logits[2], p[1], fused, y, thresholds, weight)
        # self-distillation: the mean of the views teaches the weak one
        loss_self = weighted_bce(logits[0], p.mean(0), weight * (y == 0))
        # L = L_known + lambda_u (L_a + L_b) + lambda_s L_self, our reading
        loss = loss_known + args.lambda_u * (loss_medium + loss_strong)
        loss = loss + args.lambda_s * loss_self
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += torch.stack((loss, loss_known, loss_medium, loss_strong, loss_self)).detach()
    if WORLD_SIZE > 1:
        distributed.all_reduce(losses)
        distributed.all_reduce(scores, distributed.ReduceOp.MAX)  # an image may come in two
    means = (losses / len(loader) / WORLD_SIZE).tolist()
    names = "loss loss_known loss_medium loss_strong loss_self".split()
    entry = dict(zip(names, means, strict=True))
    entry["seconds"] = time.time() - start  # of training alone
    entry["images_per_second"] = len(loader.dataset) / entry["seconds"]
    entry["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return entry, scores.cpu().numpy()

@torch.no_grad()
def evaluate(net, images, args):
    """Logits (images, C) and unit image features (images, D), float32, on the CPU."""
    net.eval()
    device = net.bias.device
    text = net.text()
    sizes = text.shape  # C, D
    found = torch.zeros(len(images), sum(sizes), device=device)
    data = ImageDataset(images, args.size)
    for batch in progress(make_loader(data, args, range(RANK, len(data), WORLD_SIZE))):
        views, index = (x.to(device, non_blocking=True) for x in batch)
        found[index] = torch.cat(net(views, text), dim=1)
    if WORLD_SIZE > 1:  # each process has filled its own rows
        distributed.all_reduce(found)
    return found.cpu().split(sizes, dim=1)

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
        return save_predictions(args.out, images, evaluate(net, images, args)[0], classes)
    found, images, y = load_data(args.data, args.root, "test", args.limit, args.download)
    need(found == classes, "--resume: the run has other classes")
    metrics = multilabel_metrics(evaluate(net, images, args)[0], y, classes)
    print(metrics_table([metrics]))
    print(describe(metrics["AP"], classes))

def main(args, checkpoint):
    # processes and device
    device = start_device(args.device)
    torch.manual_seed(args.seed)

    # data
    load = partial(load_data, args.data, args.root, limit=args.limit)
    classes, *test = load("test", fetch=args.download)  # images and labels
    _, images, truth = load("train")
    args.download = False  # a resumed run has the data
    need(args.neighbours and args.sigma, "--neighbours and --sigma must be above 0")
    need(len(images) > 1, "the training images must be two or more")
    y = hide_entries(truth, args.known, args.mask_seed)
    labels = dict(classes=classes, hash=check_labels(classes, y, test[1]))

    # network, and what CLIP says of the training images
    net = build(args, classes, y, checkpoint).to(device, memory_format=torch.channels_last)
    logits, f = evaluate(net, images, args)
    l_n = instance_graph(f.numpy(), args.neighbours, args.sigma)
    if not checkpoint:  # CLIP's cosines are all positive: mean logits become those of the prior
        positives = (y == 1).sum(0)
        prior = (positives + 0.5) / ((y != 0).sum(0) + 1)  # (C,)
        bias = torch.tensor(prior).logit() - logits.mean(0)
        net.bias.data.copy_(bias)
        logits += bias
    s = torch.sigmoid(logits).numpy()
    fit(net, (images, y, truth), test, s, l_n, labels, args, checkpoint)

def fit(net, train, test, s, l_n, labels, args, checkpoint):
    """Train net on train (images, known labels, truth), and evaluate it on test (images, labels).
    s, l_n: scores (n, C) and I - A_n (n, n) of the training images. labels: classes and hash,
    which a resumed run must share with its checkpoint."""
    images, y, truth = train
    medium = (args.operations // 3, args.erase / 2)
    strong = (args.operations, args.erase)  # and a weak view, without either
    data = ImageDataset(images, args.size, args.smallest_crop, [(), medium, strong])
    sampler = DistributedSampler(data, WORLD_SIZE, RANK)
    loader = make_loader(data, args, sampler)

    # optimizer
    matrices = [net.clip.token_embedding.context, net.down.weight, net.up.weight]
    scalars = dict(params=[net.beta, net.gamma, net.bias], lr=args.head_lr)
    optimizer = torch.optim.AdamW([dict(params=matrices), scalars], args.lr)

    # resume
    run = dict(labels, command=sys.argv, args=vars(args), device=str(net.bias.device))
    log = [dict(run=run | dict(torch=torch.version.__version__))]
    if checkpoint:
        need(labels.items() <= checkpoint.items(), "--resume: the run has other classes or labels")
        optimizer.load_state_dict(checkpoint["optimizer"])
        s = checkpoint["scores"].numpy()
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
        fused, q, thresholds = complete(s, y, l_n, args)
        known = (y, fused, thresholds)
        losses, scores = train_one_epoch(model, net, loader, optimizer, known, args)
        s = (s * epoch + scores) / (epoch + 1)  # a mean over the epochs
        logits = evaluate(net, test[0], args)[0]
        entry = dict(epoch=epoch, lr=args.lr, **losses)
        entry |= multilabel_metrics(logits, test[1], labels["classes"])
        entry |= pseudo_metrics(np.where(q >= thresholds, 1, y), y, truth)
        log.append(entry)
        print(describe(entry), flush=True)
        if RANK == 0:
            state = dict(
                labels,
                log=log,
                model=net.state_dict(),
                scores=torch.tensor(s),
                optimizer=optimizer.state_dict(),
            )
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
