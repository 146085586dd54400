# SPDX-License-Identifier: MIT
"""Context-Based Semantic-Aware Alignment (CBSA): few images fully labelled, the rest not at all.

Fan, Xie, Xiao, Huang: Context-Based Semantic-Aware Alignment for Semi-Supervised Multi-Label
Learning, AAAI 2025. CLIP's text embedding of each class looks for its own place in the image and
pools a feature there, so that one text is aligned with one region instead of many texts with one
whole image. A second task names the contexts of an image: groups of classes that occur together.
A moving average of the network labels the other images, as often per class as the labelled ones
show it.

Only the abstract and the captions of the figures are public to us. From them: label-specific image
features by CLIP's text encoder, their one-to-one alignment, contexts by spectral clustering of the
label correlations, learned on labelled and unlabelled images, class-wise thresholds. What a
docstring marks *abstract* or *Figure* is in these; every formula is our reading.

Run:  python cbsa.py                                               toy world, 5 % of the images
      python cbsa.py --no-unlabelled                               the baseline, supervised only
      python cbsa.py --data coco --root DIR --known 0.05           OpenAI's CLIP, fetched once
      python tests/ablations.py cbsa                               the table of the README

Measured: toy world, three seeds, mAP of the last epoch: 71.9 ± 0.5 with 5 % of the images known,
73.6 ± 0.2 with 10 %, 74.7 ± 0.3 with 20 %; supervised only 68.5 ± 0.4, 71.9 ± 0.8, 74.8 ± 0.4.
About 95 s on 2 CPU cores, twice that the first time, which pretrains the toy CLIP.

Differs from the paper, as far as can be known:
 1. "Where" and "what" have a prompt each (--one-prompt for one): the region showing a {class}
    attends, a photo of a {class} names.
 2. The local features are CLIP's value path, which its own attention pool averages.
 3. Pseudo-labels are made once an epoch, over all unlabelled images: the counts are then exact.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.cluster import SpectralClustering
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

import common
from common import InputError

RECIPES = {
    "real": dict(
        arch="RN101-quickgelu", size=224, epochs=20, warm_up=2, batch_size=64, lr=1e-5,
        head_lr=1e-3, ema=0.999, crops=(448, 384, 320), augment=(2, 9), erase=0.33, workers=4,
    ),
    "toy": dict(  # RandAugment changes colours and sizes, by which toy objects are known
        arch="toy", size=96, epochs=6, warm_up=1, batch_size=64, lr=2e-4, head_lr=1e-2,
        ema=0.98, crops=(448,), augment=(0, 0), erase=0.1, workers=0,
    ),
}  # fmt: skip
CONTEXTS = {"toy": 4, "voc2007": 4, "voc2012": 4, "coco": 10, "nuswide": 10}
# the model hangs on these: --eval and --predict take them from the checkpoint
MODEL_ARGS = "arch size whole_image one_prompt no_context contexts tau".split()


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
    known = 1.0 if data == "folder" else 0.05  # one's own: what is unknown, nobody knows
    add("--known", type=float, default=known, help="proportion of IMAGES kept labelled, in (0, 1]")
    add("--mask-seed", type=int, default=1, help="which images are labelled; 1 is the benchmark's")
    add("--limit", type=int, help="use the first LIMIT images of each split")
    add("--eval", action="store_true", help="only evaluate the checkpoint of --resume PATH")
    add("--predict", nargs="+", metavar="IMAGE", help="only predict these, with --resume PATH")
    add = parser.add_argument_group("method").add_argument
    add("--arch", help="toy, or a CLIP of open_clip with a ResNet tower")
    add("--weights", default="default", help="default (OpenAI's), none, or a file for open_clip")
    add("--train-trunk", choices=("last", "all"), default="last", help="stages trained")
    add("--size", type=int, help="side of the square input in pixels, a multiple of 32")
    add("--whole-image", action="store_true", help="one feature for all labels: CLIP's own")
    add("--one-prompt", action="store_true", help="a photo of a {class} also attends")
    add("--no-context", action="store_true", help="no context identification")
    add("--global-threshold", action="store_true", help="one threshold for all classes")
    add("--no-unlabelled", action="store_true", help="supervised only: the labelled images")
    add("--contexts", type=int, help="G, number of contexts; 0 for the eigengap's")
    add("--tau", type=float, default=0.05, help="tau_a, temperature of the attention")
    add("--lambda-u", type=float, default=1.0, help="weight of the unlabelled images")
    add("--lambda-c", type=float, default=0.5, help="weight of the context loss")
    add("--ema", type=float, help="decay of the teacher, a step")
    add("--warm-up", type=int, help="first epochs, on labelled images only")
    add = parser.add_argument_group("run").add_argument
    add("--epochs", type=int, help="length of the schedule")
    add("--stop-after", type=int, metavar="E", help="end this run after epoch E of its schedule")
    add("--batch-size", type=int, help="half of it labelled")
    add("--lr", type=float, help="highest rate of the image tower")
    add("--head-lr", type=float, help="highest rate of scale, biases and context head")
    add("--workers", type=int, help="processes that decode images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--seed", type=int, default=0, help="initial weights, order and augmentation")
    add("--out", help="for log.jsonl, last.pt, samples.png; default runs/cbsa-DATA-N")
    add("--resume", metavar="{auto,PATH}", help="continue OUT/last.pt if it is there, or PATH")
    add("--dry-run", action="store_true", help="a few steps on a few images, nothing written")
    parser.set_defaults(**RECIPES["toy" if data == "toy" else "real"])
    parser.set_defaults(contexts=CONTEXTS.get(data, 0))
    not_below = "lambda_u lambda_c warm_up ema contexts"
    args = common.check_args(parser.parse_args(argv), "tau head_lr", not_below)
    if args.dry_run:
        args.warm_up = 0
    if args.ema >= 1:
        raise InputError(f"--ema {args.ema} must be below 1")
    if args.warm_up >= args.epochs and not args.no_unlabelled:
        raise InputError(f"--warm-up {args.warm_up} leaves no epoch of {args.epochs} after it")
    return args


# ------------------------------------------------------------------------------------------- model


def label_features(u: Tensor, where: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Label-specific features (abstract), by attention (our reading).

    Args: u (B, N, D) and where (C, D), unit vectors; temperature tau > 0: towards 0 the best
    position alone counts, towards infinity all alike. Returns h (B, C, D), unit, and a (B, C, N).
    """
    # a_ki = softmax_i(<g_k, u_i> / tau)
    a = (where @ u.transpose(1, 2) / tau).softmax(dim=-1)  # (B, C, N)
    # h_k = sum_i a_ki u_i, renormalised
    return F.normalize(a @ u, dim=-1), a


class CBSA(nn.Module):
    """images (B, 3, H, W) uint8 -> logits (B, C), context logits (B, G), attention (B, C, N).

    Of CLIP it keeps the image tower; the text tower is used once, here. All in float32.
    """

    def __init__(self, args: argparse.Namespace, classes: list[str], num_contexts: int) -> None:
        super().__init__()
        clip, tokenize = common.load_clip(args.arch, args.weights, args.size)
        prompts = "a photo of a {}", "the region showing a {}"
        tokens = [common.prompt_tokens(tokenize, prompt, classes) for prompt in prompts]
        with torch.no_grad():
            what, where = (clip.encode_text(t, normalize=True) for t in tokens)  # (C, D) each
        self.register_buffer("what", what)
        self.register_buffer("where", what if args.one_prompt else where)
        self.visual, self.scale = clip.visual, nn.Parameter(clip.logit_scale.detach().exp())
        self.bias = nn.Parameter(torch.zeros(len(classes)))
        self.context = nn.Linear(clip.visual.output_dim, num_contexts)
        self.tau, self.whole, self.bf16 = args.tau, args.whole_image, args.precision == "bf16"
        self.train_all = args.train_trunk == "all"
        if not self.train_all:
            self.visual.requires_grad_(False)
            self.visual.layer4.requires_grad_(True)
            self.visual.attnpool.requires_grad_(True)

    def train(self, mode: bool = True) -> CBSA:
        super().train(mode)
        self.visual.eval()  # few labelled images: CLIP's batch statistics stay
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v = self.visual
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            with torch.set_grad_enabled(self.train_all and torch.is_grad_enabled()):
                x = v.stem(common.normalise(images, *common.CLIP_MEAN_STD))
                x = v.layer3(v.layer2(v.layer1(x)))
            x = v.layer4(x)  # (B, D_in, h, w)
            u, whole = common.pool_features(v.attnpool, x)  # (B, N, D), (B, D)
        whole = F.normalize(whole.float(), dim=-1)
        h, attention = label_features(F.normalize(u.float(), dim=-1), self.where, self.tau)
        if self.whole:
            h = whole[:, None]  # (B, 1, D)
        # p_k = sigma(s <h_k, t_k> + b_k)
        logits = self.scale * (h * self.what).sum(-1) + self.bias  # (B, C)
        return logits, self.context(whole), attention


# ------------------------------------------------------------------------------------------ losses


def asymmetric_loss(
    logits: Tensor, y: Tensor, gamma_neg: float = 4, gamma_pos: float = 0, margin: float = 0.05
) -> Tensor:
    """Asymmetric loss (Ridnik et al., ICCV 2021): mean over the known entries, 0 without any.

    Args: logits (B, C), y (B, C) in {1, 0, -1}. The focus weights carry no gradient.
    """
    p = torch.sigmoid(logits)
    p_m = (p - margin).clamp(min=0)
    # (1 - p)^gamma_pos log p where present, p_m^gamma_neg log(1 - p_m) where absent
    log_absent = F.logsigmoid(-logits) if margin == 0 else torch.log1p(-p_m)
    positive = (1 - p.detach()) ** gamma_pos * F.logsigmoid(logits)
    negative = p_m.detach() ** gamma_neg * log_absent
    total = (positive * (y == 1) + negative * (y == -1)).sum()
    return -total / (y != 0).sum().clamp(min=1)


# ----------------------------------------------------------------------------------- pseudo-labels


def class_prior(y: Tensor) -> Tensor:
    """How often each class shows in labelled images, (C,): (sum y + 1/2) / (n + 1). Our reading."""
    return ((y == 1).sum(0) + 0.5) / ((y != 0).sum(0) + 1)


def find_contexts(y: np.ndarray, number: int, smooth: float = 1.0, epsilon: float = 1e-3):
    """Contexts (abstract, Figure 5): spectral clusters of the labels' correlation, (C,) int.

    Args: y (images, C), labelled images only; number of contexts, 0 for the largest eigengap.
    P(j|i) = (n_ij + smooth P(j)) / (n_i + smooth) is made symmetric, its diagonal 0; epsilon off
    the diagonal keeps a label that never co-occurs from being a context by itself. Our reading.
    """
    present, C = (y == 1).astype(float), y.shape[1]
    if C < 3 and number == 0:
        return np.zeros(C, int)  # too few for an eigengap
    count = present.sum(0)
    p = present.T @ present + smooth * present.mean(0)
    p /= count[:, None] + smooth
    affinity = (p + p.T) / 2 + epsilon
    np.fill_diagonal(affinity, 0)
    if number == 0:
        degree = affinity.sum(0) ** -0.5
        values = np.linalg.eigvalsh(np.eye(C) - degree[:, None] * affinity * degree)
        number = 2 + int(np.argmax(np.diff(values[1 : C // 2 + 2])))
    if not 2 <= number <= C:
        raise InputError(f"--contexts {number} must be from 2 to {C}, the number of classes")
    clusters = SpectralClustering(number, affinity="precomputed", random_state=0)
    return clusters.fit_predict(affinity)


def context_labels(y: Tensor, member: Tensor) -> Tensor:
    """OR over the classes of a context: y (B, C) in {1, 0, -1}, member (C, G) 0/1 -> (B, G) int8.

    +1 if any class is present, -1 if all are known absent, else 0.
    """
    some = ((y == 1).float() @ member) > 0
    none = ((y == -1).float() @ member) == member.sum(0)
    return some.to(torch.int8) - none.to(torch.int8)


@torch.no_grad()
def pseudo_labels(score: Tensor, y: Tensor, one_threshold: bool = False) -> Tensor:
    """Class-wise thresholds (Figure 2), class-distribution-aware (our reading): (m, C), 1 or -1.

    Args: score (m, C) of the unlabelled images; y (n, C) of the labelled ones. Of every class the
    round(prior m) highest scores are positive, ties by order; a class not seen in y gets none.
    `one_threshold`: as many positives in total, by one threshold for all classes.
    """
    seen = (y == 1).any(0)
    number = (class_prior(y) * len(score)).round().long() * seen  # (C,)
    score = score.masked_fill(~seen, -math.inf)
    if one_threshold:
        score, number, shape = score.reshape(-1, 1), number.sum()[None], score.shape
    else:
        shape = score.shape
    order = score.argsort(dim=0, descending=True, stable=True)
    positive = order.argsort(dim=0) < number  # the rank of every score
    return torch.where(positive, 1, -1).to(torch.int8).view(shape)


class MixedSampler(common.EpochSampler):
    """Batches of keys, half labelled and half not: an epoch is one pass over the larger part.

    The smaller part comes again and again, in another order each time. Without the other part, as
    in the warm-up, batches hold half as many images.
    """

    def __init__(self, labelled: np.ndarray, other: np.ndarray, batch_size: int, seed: int) -> None:
        super().__init__(max(labelled, other, key=len), max(1, batch_size // 2), seed)
        self.parts, self.only_labelled = [labelled, other], False

    def __iter__(self):
        generators, size = np.random.default_rng((self.seed, self.epoch)).spawn(2), self.batch_size
        parts = []
        for generator, part in zip(generators, self.parts, strict=True):
            rounds = math.ceil(len(self) * size / len(part)) if len(part) else 0
            orders = [generator.permutation(part) for _ in range(rounds)]
            parts.append(np.concatenate([[], *orders]).astype(int))
        for k in range(self.skip, len(self)):
            batch = [part[k * size : (k + 1) * size] for part in parts[: 2 - self.only_labelled]]
            yield [(self.epoch, i) for i in np.concatenate(batch).tolist()]


# ---------------------------------------------------------------------------------------- training


def train_one_epoch(net, teacher, loader, optimizer, scheduler, labelled, args, epoch, tally):
    """One pass of the student over strong views; the teacher follows. Returns log entries.

    labelled (n,): which images are. tally: labels and pseudo-labels of `classes` (n, C) and
    `contexts` (n, G), and what the epoch has added up: see `common.add_losses`.
    """
    net.train()
    classes, contexts = tally["classes"], tally["contexts"]
    begin, seen, device = time.time(), 0, labelled.device
    for images, _, index in common.progress(loader, f"epoch {epoch}"):
        outputs = net(images.to(device, non_blocking=True))[:2]
        logits, context_logits, index = common.gather(*outputs, index.to(device, non_blocking=True))
        seen += len(index)
        y, g, known = classes[index], contexts[index], labelled[index, None]
        parts = dict(
            loss_labelled=asymmetric_loss(logits, y * known),
            loss_unlabelled=asymmetric_loss(logits, y * ~known),
            loss_context=asymmetric_loss(context_logits, g * known),
            loss_context_unlabelled=asymmetric_loss(context_logits, g * ~known),
        )
        # L = L_lab + lambda_u L_unl + lambda_c (L_ctx_lab + lambda_u L_ctx_unl)
        loss = parts["loss_labelled"] + args.lambda_u * parts["loss_unlabelled"]
        if not args.no_context:
            context = parts["loss_context"] + args.lambda_u * parts["loss_context_unlabelled"]
            loss = loss + args.lambda_c * context
        loss.backward()
        common.sum_gradients(net)
        optimizer.step()
        optimizer.zero_grad()  # here: the next forward does not hold them
        scheduler.step()
        teacher.update_parameters(net)
        common.add_losses(tally, parts | dict(loss=loss))
    entry = common.mean_losses(tally, epoch)
    return entry | dict(images_per_second=seen / (time.time() - begin))


@torch.no_grad()
def scores(net, loader, rows: int) -> list[Tensor]:
    """Logits (rows, C) and context logits (rows, G), at the indices that the loader brings."""
    net.eval()
    batches, device = common.progress(loader, "scores"), net.bias.device
    found = [(index, *net(images.to(device))[:2]) for images, _, index in batches]
    return common.all_rows(found, rows)


def evaluate(net, loader, y: np.ndarray) -> tuple[dict, np.ndarray]:
    """Metrics and logits (images, C), rows as in the data set."""
    logits = scores(net, loader, len(y))[0].numpy()
    return common.multilabel_metrics(logits, y), logits


@torch.no_grad()
def draw_attention(net, data: common.Data, size: int, path: str) -> None:
    """A picture: test images, and beside each where its most probable labels look."""
    cells = []
    for row, item in enumerate(data.test.images[:6]):
        image = common.open_image(item).resize((176, 176))
        x = common.test_transform(size)(image)[None].to(net.bias.device)
        logits, _, attention = net.eval()(x)
        cells.append((image, []))
        for c in logits[0].argsort(descending=True)[:5].tolist():
            a = attention[0, c].unflatten(0, (math.isqrt(attention.shape[-1]), -1)).cpu().numpy()
            light = Image.fromarray(np.uint8(255 * a / a.max())).resize(image.size, 2)
            colour = "green" if data.test.y[row, c] == 1 else "red"
            text = f"{data.classes[c]} {torch.sigmoid(logits[0, c]):.2f}"
            seen = Image.composite(image, Image.new("RGB", image.size, "white"), light)
            cells.append((seen, [(text, colour)]))
    common.draw_sheet(cells, 6, path, lines=1)


# -------------------------------------------------------------------------------------------- main


def main() -> None:
    args = parse_args()
    device = common.pick_device(args.device)
    torch.manual_seed(args.seed)
    state = common.load_checkpoint(args, "cbsa", MODEL_ARGS)
    if args.eval or args.predict:
        net = CBSA(args, state["classes"], len(state["teacher"]["context.bias"])).to(device)
        net.load_state_dict(state["teacher"])
    if args.predict:
        return common.predict(lambda x: net.eval()(x)[0], args, state["classes"], device)

    data = common.load_data(args.data, args.root, args.limit, args.download)
    y = common.hide_images(data.train.y, args.known, args.mask_seed)
    run = dict(method="cbsa", data=args.data, classes=data.classes, mask=common.mask_hash(y))
    test_loader = common.test_loader(data, args)
    if state:
        common.check_same_run(state, run, args)
    if args.eval:
        metrics, logits = evaluate(net, test_loader, data.test.y)
        return common.report_test(data, metrics, logits, args)

    labelled = (y != 0).any(1)
    if not labelled.any():
        raise InputError(f"--known {args.known} of {len(y)} images leaves none labelled")
    cluster = find_contexts(y[labelled], args.contexts)
    member = F.one_hot(torch.tensor(cluster).long()).float()  # (C, G)
    net = CBSA(args, data.classes, member.shape[1])
    net.to(device, memory_format=torch.channels_last)
    teacher = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    if state:
        net.load_state_dict(state["model"])
        teacher.module.load_state_dict(state["teacher"])

    weak = [common.train_transform(args.size, args.crops)]
    erasing = v2.RandomErasing(0.5, (0.02, args.erase))
    strong = [v2.Compose([v2.RandAugment(*args.augment), *weak, erasing])]
    rows = [np.flatnonzero(labelled), np.flatnonzero(~labelled)]
    sampler = MixedSampler(*rows, args.batch_size, args.seed)
    loader = common.make_loader(data.train.images, y, strong, sampler, args)
    weak_sampler = common.EpochSampler(np.arange(len(y)), args.batch_size)
    weak_loader = common.make_loader(data.train.images, y, weak, weak_sampler, args)
    tower = [p for p in net.visual.parameters() if p.requires_grad]
    head = [net.scale, net.bias, *net.context.parameters()]
    groups = [dict(params=tower, lr=args.lr), dict(params=head, lr=args.head_lr, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [args.lr, args.head_lr], total_steps=args.epochs * len(loader)
    )
    start, best, metrics, tally = 1, None, None, {}
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        teacher.n_averaged.fill_(state["averaged"])
        start, best, metrics = state["epoch"] + 1, state["best"], state["metrics"]
        tally = common.to_device(state["tally"], device)
        common.set_generators(state["generators"], device)
    log = common.RunLog(args, run, y, start if state else 0, device)
    for k in range(member.shape[1]):
        print(f"context {k}:", ", ".join(data.classes[c] for c in np.flatnonzero(cluster == k)))
    truth, known = torch.tensor(data.train.y), torch.tensor(y)
    lab, unl = (torch.tensor(part) for part in rows)
    if not state:
        # CLIP's cosines are all positive: the mean of a class's logits becomes its prior's
        logits = scores(net, weak_loader, len(y))[0]
        net.bias.data = (class_prior(known[lab]).logit() - logits.mean(0)).to(device)
        zero_shot = {}
        for net.whole in (not args.whole_image, args.whole_image):
            zero_shot[net.whole] = evaluate(net, test_loader, data.test.y)[0]["mAP"]
        text = "zero-shot mAP: whole image {:.2f}, label-specific {:.2f}"
        print(text.format(zero_shot[True], zero_shot[False]), flush=True)
        log.write(dict(epoch=0, mAP=zero_shot[True], mAP_label_specific=zero_shot[False]))
    if args.compile:
        net.compile()

    def state_of(epoch: int, tally: dict) -> dict:
        state = dict(model=net.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch)
        state |= dict(scheduler=scheduler.state_dict(), teacher=teacher.module.state_dict())
        state |= dict(averaged=int(teacher.n_averaged), metrics=metrics, best=best)
        return state | dict(tally=tally)

    where = torch.tensor(labelled, device=device)
    for epoch in range(start, min(args.epochs, args.stop_after or args.epochs) + 1):
        sampler.epoch = weak_sampler.epoch = epoch
        sampler.skip, begin = tally.get("step", 0), time.time()
        entry = dict(epoch=epoch, lr=tally.setdefault("lr", scheduler.get_last_lr()[0]))
        sampler.only_labelled = args.no_unlabelled or epoch <= args.warm_up or not len(unl)
        try:
            if "classes" not in tally:
                classes, contexts = known.clone(), context_labels(known, member)
                if not sampler.only_labelled:
                    logits, g = scores(teacher.module, weak_loader, len(y)), contexts[lab]
                    one = args.global_threshold
                    classes[unl] = pseudo_labels(logits[0][unl], known[lab], one)
                    contexts[unl] = pseudo_labels(logits[1][unl], g, one)
                tally |= dict(classes=classes.to(device), contexts=contexts.to(device))
            quality = common.pseudo_counts(tally["classes"].cpu()[unl], known[unl], truth[unl])
            parts = train_one_epoch(
                net, teacher, loader, optimizer, scheduler, where, args, epoch, tally
            )
            metrics, logits = evaluate(teacher.module, test_loader, data.test.y)
        except common.Interrupted:
            log.interrupt(epoch, state_of(epoch - 1, tally))
        tally = {}
        del metrics["ap"]
        best = max(best or metrics, metrics, key=lambda m: m["mAP"])
        log.epoch(entry | parts | metrics | common.pseudo_quality(dict(pseudo=quality)), begin)
        log.checkpoint(state_of(epoch, tally))
        if epoch == args.stop_after:
            return print(f"stopped after epoch {epoch}; --out {log.out} --resume auto continues")
    columns = {"last epoch": metrics, "best on test (what most papers report)": best}
    print(common.metrics_table(columns))
    if not log.silent:
        draw_attention(teacher.module, data, args.size, log.out / "samples.png")
        print(f"where likely labels look (green: present, red: absent): {log.out / 'samples.png'}")


if __name__ == "__main__":
    common.run_script(main)
