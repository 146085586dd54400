# SPDX-License-Identifier: MIT
"""Context-Based Semantic-Aware Alignment (CBSA): few images fully labelled, the rest not at all.

Fan, Xie, Xiao, Huang: Context-Based Semantic-Aware Alignment for Semi-Supervised Multi-Label
Learning, AAAI 2025 (arXiv 2412.18842). This file is a reconstruction from the abstract and the
captions of the figures: we did not have the equations. CLIP's text feature of each class finds its
place in the image, so that a text is compared with a feature of its own and not with the one
feature of the whole image. A second task says which contexts an image shows, which are groups of
classes that occur together. The unlabelled images get pseudo-labels, by a threshold for each class.

Run:  python cbsa.py                              toy world, 5 % of the images labelled
      python cbsa.py --data coco --known 0.05     COCO 2014 in data/
      python cbsa.py --warm-up 99                 supervised: no loss on unlabelled images

Measured:  toy world mAP 93.7 +- 0.1 (CLIP 72.4); photographs, 5 %: 31.8 +- 0.2 (CLIP 28.5).
The unlabelled images bring little of that (tests/RESULTS.md).

Where this differs. Docstrings say (abstract) or (Figure) for what rests on these.
what                abstract and captions               here (our reading)
label features      from CLIP's text encoder            attention of a text of its own, "where"
alignment           one text, one label feature         cosine with a second text, "what"
prompts             -                                   3 sentences (where), 4 (what); toy 1
contexts            spectral clustering of the          the same, of a smoothed P(j|i); C / 8,
                    correlation of labels               not under 4, not over C / 2
context task        on all images                       a linear head on CLIP's image feature
pseudo-labels       thresholds for each class           by rank, as many as the labelled images
                                                        suggest; none near threshold (toy: off)
teacher             -                                   moving average of the network, weak views
what learns         -                                   the last stage of the image tower, the head
loss                -                                   asymmetric loss, four parts
"""

import argparse
import copy
import json
import logging
import os
import shutil
import sys
import time
from functools import partial
from itertools import dropwhile
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from sklearn.cluster import SpectralClustering
from timm.layers import resample_abs_pos_embed
from torch import distributed, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, WeightedRandomSampler
from tqdm import tqdm

# isort: off
from common import ImageDataset, check_labels, class_text, describe, find_images, hide_images
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
    known=(0.05, 1.0, "proportion of the IMAGES that keep their labels"),
    mask_seed=(1, "which images these are"),
    limit=(0, "use the first LIMIT images of each part; 0 for all"),
    arch=("local-dir:tests/toy/clip", "RN101-quickgelu", "of open_clip, hf-hub:, local-dir:"),
    size=(0, "side of the square input in pixels; 0 for that of the tower"),
    epochs=(6, 20, "length of the schedule"),
    warm_up=(1, 2, "first epochs, on labelled images only"),
    batch_size=(64, "images a step, over all processes"),
    lr=(1e-4, 1e-5, "learning rate of the tower"),
    head_lr=(1e-2, 5e-4, "learning rate of what is not the tower"),
    precision=("fp32", "of the network: fp32 or bf16"),
    seed=(0, "of initial weights, order and augmentation"),
    alpha=(0.5, "weight of the local features at the start; 0: one feature for all labels"),
    kappa=(0.3, "weight of the contexts in the scores at the start; 0: none"),
    contexts=(0, "G, their number; 0: an eighth of C, at least 4, at most half of C"),
    lambda_c=(0.1, 0.5, "weight of the context losses"),
    lambda_u=(1.0, "weight of the losses on unlabelled images"),
    one_threshold=(False, "one threshold for all classes"),
    band=(False, True, "no pseudo-labels near a threshold"),
    ema=(0.98, 0.999, "decay of the teacher, a step"),
    smallest_crop=(448, 320, "random crops of an image of 512 are 512, 448, ... or this"),
    operations=(0, 2, "of RandAugment on a strong view"),
    erase=(0.1, 0.33, "largest part of a strong view that is erased"),
)
WHERE = ("the region showing a {}", "a close-up of a {}", "a cropped photo of the {}")
WHAT = ("a photo of a {}", "a picture of the {}", "a photo with a {} in it", "a {} in a scene")
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
def label_features(f, u, where, alpha, tau):
    """Label-specific features (abstract), by attention (our reading). Unit f (B, D), u (B, N, D),
    where (C, D); weight alpha, 0 for f alone; temperature tau, towards 0 the best position alone
    counts. -> h (B, C, D), unit."""
    # a_ki = softmax_i(<where_k, u_i> / tau)
    a = (where @ u.mT / tau).softmax(dim=-1)  # (B, C, N)
    # h_k = nrm(f + alpha sum_i a_ki u_i)
    return F.normalize(f[:, None] + alpha * (a @ u), dim=-1)

class CBSA(nn.Module):
    """images (B, 3, H, W) uint8 -> logits (B, C), context logits (B, G).

    visual: image tower of CLIP. where, what (C, D): unit text features of the two prompts. scale:
    CLIP's. member (C, G) in {0, 1}: classes of a context. alpha, kappa: where they start; 0 is
    fixed. The score is our reading.
    """

    def __init__(self, visual, where, what, scale, member, alpha, kappa):
        super().__init__()
        self.bf16 = False  # whether the tower runs in bfloat16
        self.visual = visual
        self.register_buffer("where", where)
        self.register_buffer("what", what)
        self.register_buffer("member", member)
        self.scale = nn.Parameter(scale)
        self.bias = nn.Parameter(torch.zeros(len(what)))
        self.alpha = nn.Parameter(torch.tensor(alpha), requires_grad=alpha > 0)
        self.kappa = nn.Parameter(torch.tensor(kappa), requires_grad=kappa > 0)
        self.context = nn.Linear(what.shape[1], member.shape[1])
        nn.init.zeros_(self.context.weight)  # r starts at 0: CLIP's own ranking
        nn.init.zeros_(self.context.bias)

    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            f, u = clip_features(self.visual, images)  # (B, D), (B, N, D)
        h = label_features(f, u, self.where, self.alpha, tau=0.1)  # (B, C, D)
        r = self.context(f)  # (B, G)
        # z_k = s <h_k, what_k> + b_k + kappa r_g(k), g(k) the context of class k
        z = self.scale * (h * self.what).sum(-1) + self.bias + self.kappa * r @ self.member.T
        return z, r

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

def last_stage(visual):
    """Parameters of an image tower's last stage and of the modules after it. The projection of a
    ViT, which is no module, stays as it is."""
    if hasattr(visual, "trunk"):
        stage = visual.trunk.get_submodule(visual.trunk.feature_info[-1]["module"])
    elif hasattr(visual, "layer4"):
        stage = visual.layer4
    else:
        stage = visual.transformer.resblocks[-1]
    first = next(stage.parameters())
    return dropwhile(lambda p: p is not first, visual.parameters())

def text_features(clip, tokenize, sentences, classes):
    """Unit means (C, D) of the unit text features of each class in some sentences (Radford et al.,
    ICML 2021)."""
    tokens = [prompt_tokens(tokenize, sentence, classes) for sentence in sentences]
    features = sum(clip.encode_text(each, normalize=True) for each in tokens)
    return F.normalize(features, dim=-1)

@torch.no_grad()
def build(args, classes, y, checkpoint):
    """The network of a run: a new one for labelled y (images, C), or that of a checkpoint."""
    clip, tokenize, args.size = load_clip(args.arch, args.weights, args.size)
    sentences = 1 if args.data == "toy" else 4  # its CLIP has learned the first of each
    what = text_features(clip, tokenize, WHAT[:sentences], classes)
    where = text_features(clip, tokenize, WHERE[:sentences], classes)
    if checkpoint:
        member = checkpoint["model"]["member"]
    else:
        member = find_contexts(y[(y != 0).any(1)], args.contexts)
    clip.visual.requires_grad_(False)
    for p in last_stage(clip.visual):
        p.requires_grad_(True)
    scale = clip.logit_scale.exp()
    net = CBSA(clip.visual, where, what, scale, member, args.alpha, args.kappa)
    net.bf16 = args.precision == "bf16"
    if checkpoint:
        net.load_state_dict(checkpoint["model"])
    return net

# ----------------------------------------------------------------------- losses and pseudo-labels
def asymmetric_loss(logits, y, gamma=4, margin=0.05):
    """Asymmetric loss (Ridnik et al., ICCV 2021): mean over the known entries, 0 without any.
    logits (B, C), y (B, C) in {1, 0, -1} -> scalar. The focus carries no gradient."""
    p = torch.sigmoid(logits)
    p_m = (p - margin).clamp(min=0)
    # log p where present, p_m^gamma log(1 - p_m) where absent
    positive = F.logsigmoid(logits)
    negative = p_m.detach() ** gamma * torch.log1p(-p_m)
    total = (positive * (y == 1) + negative * (y == -1)).sum()
    return -total / (y != 0).sum().clamp(min=1)

def class_prior(y):
    """How often each class shows in labelled images, (C,), ours: (present + 1/2) / (known + 1)."""
    return ((y == 1).sum(0) + 0.5) / ((y != 0).sum(0) + 1)

def find_contexts(y, number):
    """Contexts (abstract, Figure 5): membership (C, G) in {0, 1} by spectral clustering of the
    labels' correlation. y (images, C), labelled; number of contexts; 0: C / 8, 4 to C / 2.
    P(j|i) = (n_ij + P(j)) / (n_i + 1) is made symmetric, its diagonal 0; 0.001 off the diagonal
    keeps all affinities positive. Our reading."""
    C = y.shape[1]
    number = number or min(C // 2, max(4, C // 8))
    need(1 <= number <= C != 1, f"--contexts must be from 1 to {C}; CBSA needs 2 classes")
    present = (y == 1).double()
    together = present.T @ present + present.mean(0)
    p = together / (present.sum(0)[:, None] + 1)
    affinity = ((p + p.T) / 2 + 1e-3).fill_diagonal_(0)
    clusters = SpectralClustering(number, affinity="precomputed", random_state=0)
    return F.one_hot(torch.tensor(clusters.fit_predict(affinity)).long()).float()

def context_labels(y, member):
    """OR over the classes of a context: y (B, C) in {1, 0, -1}, member (C, G) 0/1 -> (B, G) int8.
    +1 if any class is present, -1 if all are known absent, else 0. Our reading."""
    some = ((y == 1).float() @ member) > 0
    none = ((y == -1).float() @ member) == member.sum(0)
    return some.to(torch.int8) - none.to(torch.int8)

def label_by_rank(scores, number, band):
    """Of each column of scores (m, C) the number (C,) highest are 1, ties by order, the others -1:
    int8. band: 0 for the lower half of the positives, and for as many of the negatives as there
    are positives, at most half of them, those of highest scores."""
    rank = scores.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    positives_end = number
    negatives_start = number
    if band:  # however frequent a class is, half of its negatives stay
        positives_end = (number + 1) // 2
        negatives_start = torch.minimum(2 * number, (number + len(scores)) // 2)
    return (rank < positives_end).to(torch.int8) - (rank >= negatives_start).to(torch.int8)

def pseudo_labels(scores, y, one_threshold=False, band=False):
    """Class-wise thresholds (Figure 2), class-distribution-aware (our reading): (m, C) int8.

    scores (m, C) of the unlabelled images, y (n, C) of the labelled ones. Of every class the
    round(prior m) highest scores are 1, fewer with band; all are 0 of a class that y does not show
    both present and absent. one_threshold: as many in total, by one threshold for all classes.
    """
    taught = (y == 1).any(0) & (y == -1).any(0)
    number = (class_prior(y) * len(scores)).round().long() * taught  # (C,)
    if one_threshold:
        allowed = scores.where(taught, -torch.inf)
        highest = allowed.flatten().topk(number.sum()).indices
        number = (highest % len(taught)).bincount(minlength=len(taught))
    return label_by_rank(scores, number, band) * taught

# ------------------------------------------------------------------------- training and evaluation
def train_one_epoch(model, net, teacher, loader, optimizer, labels, epoch, args):
    """The student, model, learns from strong views; the teacher follows. labels: of classes (n, C)
    and of contexts (n, G), known ones and guesses, and own (n, 1), 1 where an image is labelled.
    Returns mean losses, speed and memory."""
    start = time.time()
    model.train()
    net.visual.eval()  # few labelled images: CLIP's batch statistics stay
    device = net.bias.device
    class_y, context_y, own = (x.to(device) for x in labels)
    losses = torch.zeros(5, device=device)  # read at the end: no step waits for the device
    for step, batch in enumerate(progress(loader), (epoch - 1) * len(loader) + 1):
        images, index = (x.to(device, non_blocking=True) for x in batch)
        logits, context_logits = model(images)  # (B, C), (B, G)
        y = class_y[index]  # (B, C)
        contexts = context_y[index]  # (B, G)
        known = own[index]  # (B, 1)
        loss_lab = asymmetric_loss(logits, y * known)
        loss_unl = asymmetric_loss(logits, y * (1 - known))
        loss_ctx_lab = asymmetric_loss(context_logits, contexts * known)
        loss_ctx_unl = asymmetric_loss(context_logits, contexts * (1 - known))
        # L = L_lab + lambda_u L_unl + lambda_c (L_ctx_lab + lambda_u L_ctx_unl), our reading
        loss = loss_lab + args.lambda_u * loss_unl
        loss = loss + args.lambda_c * (loss_ctx_lab + args.lambda_u * loss_ctx_unl)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # at first a plain mean, so that few steps do not leave the teacher at its start
        average = get_ema_multi_avg_fn(min(args.ema, 1 - 1 / step))
        average([*teacher.parameters()], [*net.parameters()], None)  # needs no count
        losses += torch.stack((loss, loss_lab, loss_unl, loss_ctx_lab, loss_ctx_unl)).detach()
    if WORLD_SIZE > 1:
        distributed.all_reduce(losses)
    means = (losses / len(loader) / WORLD_SIZE).tolist()
    names = "loss loss_lab loss_unl loss_ctx_lab loss_ctx_unl".split()
    entry = dict(zip(names, means, strict=True))
    entry["seconds"] = time.time() - start  # of training alone
    entry["images_per_second"] = len(loader.dataset) / entry["seconds"]
    entry["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return entry

@torch.no_grad()
def evaluate(net, images, args, smallest_crop=0):
    """Logits (images, C) and context logits (images, G), float32, of whole images or of crops."""
    net.eval()
    device = net.bias.device
    sizes = net.member.shape  # C, G
    scores = torch.zeros(len(images), sum(sizes), device=device)
    data = ImageDataset(images, args.size, smallest_crop)
    for batch in progress(make_loader(data, args, range(RANK, len(data), WORLD_SIZE))):
        views, index = (x.to(device, non_blocking=True) for x in batch)
        scores[index] = torch.cat(net(views), dim=1)
    if WORLD_SIZE > 1:  # each process has filled its own rows
        distributed.all_reduce(scores)
    return scores.cpu().split(sizes, dim=1)

def make_loader(data, args, sampler, **options):
    """Batches of this process. Its workers start anew with each epoch, as of a resumed run."""
    size = min(args.batch_size // WORLD_SIZE, len(sampler)) or 1
    options |= dict(num_workers=args.workers, pin_memory=torch.cuda.is_available())
    return DataLoader(data, size, sampler=sampler, **options)

def mixed_sampler(own, mixed):
    """As many images, at random, as there are. An eighth of them or, if that is more, their part of
    all are labelled, own (n,); unless `mixed`, all are."""
    share = max(1 / 8, own.double().mean().item())
    weights = own * share / own.sum()
    if mixed:
        weights += ~own * (1 - share) / (~own).sum()
    return WeightedRandomSampler(weights, len(own) // WORLD_SIZE or 1)

def guess_labels(teacher, images, y, args, mixed):
    """Labels of classes (n, C) and of contexts (n, G), and own (n, 1), 1 where they are those of y
    (n, C). If `mixed`, the others are pseudo-labels from the teacher's scores of weak views."""
    own = (y != 0).any(1)
    labels = [y.clone(), context_labels(y, teacher.member.cpu())]
    if mixed:
        scores = evaluate(teacher, images, args, args.smallest_crop)
        for known, score in zip(labels, scores, strict=True):
            how = (known[own], args.one_threshold, args.band)
            known[~own] = pseudo_labels(score[~own], *how)
    return *labels, own[:, None].to(torch.int8)

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
    y = hide_images(truth, args.known, args.mask_seed)
    labels = dict(classes=classes, hash=check_labels(classes, y, test[1]))

    # network
    y = torch.tensor(y)
    net = build(args, classes, y, checkpoint).to(device, memory_format=torch.channels_last)
    if not checkpoint:  # CLIP's cosines are all positive: mean logits become those of the prior
        logits = evaluate(net, images, args, args.smallest_crop)[0]
        net.bias.data.copy_(class_prior(y).logit() - logits.mean(0))
    fit(net, (images, y, truth), test, labels, args, checkpoint)

def fit(net, train, test, labels, args, checkpoint):
    """Train net on train (images, known labels, truth), and evaluate it on test (images, labels).
    labels: classes and hash, which a resumed run must share with its checkpoint."""
    images, y, truth = train
    own = (y != 0).any(1)  # (n,), which images are labelled
    strong = (args.operations, 0.5, args.erase)
    data = ImageDataset(images, args.size, args.smallest_crop, [strong])
    teacher = copy.deepcopy(net)  # a moving average, which labels and is evaluated

    # optimizer
    head = [p for name, p in net.named_parameters() if not name.startswith("visual.")]
    groups = [dict(params=net.visual.parameters()), dict(params=head, lr=args.head_lr)]
    optimizer = torch.optim.AdamW(groups, args.lr)

    # resume
    run = dict(labels, command=sys.argv, args=vars(args), device=str(net.bias.device))
    log = [dict(run=run | dict(torch=torch.version.__version__))]
    if checkpoint:
        need(labels.items() <= checkpoint.items(), "--resume: the run has other classes or labels")
        net.load_state_dict(checkpoint["student"])
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
        torch.manual_seed((1000 * args.seed + epoch) * WORLD_SIZE + RANK)  # as if it is resumed
        mixed = epoch > args.warm_up and not own.all()
        targets = guess_labels(teacher, images, y, args, mixed)
        loader = make_loader(data, args, mixed_sampler(own, mixed))
        losses = train_one_epoch(model, net, teacher, loader, optimizer, targets, epoch, args)
        logits = evaluate(teacher, test[0], args)[0]
        entry = dict(epoch=epoch, lr=args.lr, **losses)
        entry |= multilabel_metrics(logits, test[1], labels["classes"])
        entry |= pseudo_metrics(targets[0].numpy(), y.numpy(), truth)
        log.append(entry)
        print(describe(entry), flush=True)
        if RANK == 0:
            state = dict(
                labels,
                log=log,
                model=teacher.state_dict(),
                student=net.state_dict(),
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
