# SPDX-License-Identifier: MIT
"""Context-Based Semantic-Aware Alignment (CBSA): few images fully labelled, the rest not at all.

Fan, Xie, Xiao, Huang: Context-Based Semantic-Aware Alignment for Semi-Supervised Multi-Label
Learning, AAAI 2025. CLIP's text embedding of each class looks for its own place in the image and
adds what it finds there to the image's feature, so that one text is aligned with one feature
instead of many texts with one. A second task names the contexts of an image, groups of classes that
occur together, and lends its logits to their classes. A moving average of the network labels the
other images, as often per class as the labelled ones show it.

Only the abstract and the captions of the figures are public to us. From them: label-specific image
features by CLIP's text encoder, their one-to-one alignment, contexts by spectral clustering of the
label correlations, learned on labelled and unlabelled images, class-wise thresholds. What a
docstring marks *abstract* or *Figure* is in these; every formula is our reading.

Run:  python cbsa.py                                               toy world, 5 % of the images
      python cbsa.py --no-unlabelled                               the baseline, supervised only
      python cbsa.py --data coco --root DIR --known 0.05           OpenAI's CLIP, fetched once

Measured on 3,000 photographs, 5 % of them labelled, with a small CLIP whose projection learns,
three seeds, mAP of the last epoch: 32.4 ± 0.2; supervised only 31.8 ± 0.2, zero-shot 28.6.

Differs from the paper, as far as can be known:
 1. "Where" and "what" have a prompt each (--one-prompt for one): the region showing a {class}
    attends, a photo of a {class} names.
 2. Pseudo-labels are made once an epoch, over all unlabelled images: the counts are then exact.
    On real data those near the threshold are none (--band): 54 % are right then, 44 % before.
"""

import math
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, BooleanOptionalAction, Namespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.cluster import SpectralClustering
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Subset
from torchvision.transforms import v2
from tqdm import tqdm

import common

RECIPES = {  # lambda_c: weight of the context loss; alpha, kappa: what they start from
    "real": dict(
        arch="RN101-quickgelu", size=224, epochs=20, warm_up=2, lr=1e-5, head_lr=1e-3, ema=0.999,
        crops=(448, 384, 320), augment=(2, 9), erase=0.33, workers=4, band=True,
        alpha=0.5, kappa=0.3, lambda_c=0.5,
    ),
    "toy": dict(  # RandAugment changes colours and sizes, by which toy objects are known
        arch="local-dir:tests/toy_clip", size=128, epochs=6, warm_up=1, lr=1e-4, head_lr=1e-2,
        ema=0.98, crops=(448,), augment=(0, 0), erase=0.1, workers=0,
        alpha=0.5, kappa=0.3, lambda_c=0.5,
    ),
}  # fmt: skip
RECIPES["folder"] = RECIPES["real"] | dict(known=1.0)  # one's own: what is unknown, nobody knows
for name, number in dict(toy=4, voc2007=4, voc2012=4, coco=10).items():
    RECIPES[name] = RECIPES.get(name, RECIPES["real"]) | dict(contexts=number)


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, dict | None]:
    """The arguments and the checkpoint of --resume, from which they start; None without one."""
    parser = ArgumentParser(add_help=False, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.description, parser.error = __doc__.split("\n")[0], common.refuse
    add = parser.add_argument_group("task").add_argument
    add("--data", default="toy", help=f"toy, {', '.join(common.DATASETS)}")
    add("--root", help="folder of the data set")
    add("--download", action="store_true", help="fetch voc2007, voc2012 or coco into --root first")
    add("--known", type=float, default=0.05, help="proportion of IMAGES kept labelled, in (0, 1]")
    add("--complete", action="store_true", help="a line of train.csv leaves out what is absent")
    add("--mask-seed", type=int, default=1, help="which images are labelled; 1 is the benchmark's")
    add("--limit", type=int, help="use the first LIMIT images of each split")
    add("--eval", action="store_true", help="only evaluate the checkpoint of --resume PATH")
    add("--predict", nargs="+", metavar="IMAGE", help="only predict these, with --resume PATH")
    add = parser.add_argument_group("method").add_argument
    add("--arch", help="a CLIP of open_clip, hf-hub:ORG/NAME or local-dir:FOLDER")
    add("--weights", default="default", help="default (OpenAI's, the folder's), none, or a file")
    add("--train-trunk", choices=("proj", "last", "all"), default="last", help="what of it learns")
    add("--size", type=int, help="side of the square input in pixels")
    add("--whole-image", action="store_true", help="one feature for all labels: alpha is 0")
    add("--one-prompt", action="store_true", help="a photo of a {class} also attends")
    add("--no-context", action="store_true", help="no context identification")
    add("--global-threshold", action="store_true", help="one threshold for all classes")
    add("--band", action=BooleanOptionalAction, help="pseudo-labels near the threshold are none")
    add("--no-unlabelled", action="store_true", help="supervised only: the labelled images")
    add("--contexts", type=int, default=0, help="G, number of contexts; 0 for the eigengap's")
    add("--lambda-u", type=float, default=1.0, help="weight of the unlabelled images")
    add("--ema", type=float, help="decay of the teacher, a step")
    add("--warm-up", type=int, help="first epochs, on labelled images only")
    add = parser.add_argument_group("run").add_argument
    add("--epochs", type=int, help="length of the schedule")
    add("--batch-size", type=int, default=64, help="images a step, labelled and unlabelled")
    add("--labelled", type=float, default=0.125, help="smallest labelled share of a batch")
    add("--lr", type=float, help="highest rate of the image tower")
    add("--head-lr", type=float, help="highest rate of what is not the tower")
    add("--workers", type=int, help="processes that decode images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--seed", type=int, default=0, help="initial weights, order and augmentation")
    add("--out", help="for log.jsonl, last.pt, samples.png; default runs/cbsa-DATA-N")
    add("--resume", metavar="{auto,PATH}", help="continue OUT/last.pt if it is there, or PATH")
    add("--dry-run", action="store_true", help="a few steps on a few images, nothing written")
    first = parser.parse_known_args(argv)[0]  # --data and --resume decide the defaults
    state = common.load_checkpoint(first, "cbsa")
    parser.set_defaults(**state["args"] if state else RECIPES.get(first.data, RECIPES["real"]))
    add("-h", "--help", action="help", help="show this and exit")
    return common.check_args(parser.parse_args(argv), "head_lr"), state


# ------------------------------------------------------------------------------------------- model


def label_features(f: Tensor, u: Tensor, where: Tensor, alpha, tau: float) -> tuple[Tensor, Tensor]:
    """Label-specific features (abstract), by attention (our reading).

    Args: f (B, D), u (B, N, D), where (C, D), unit; weight alpha, 0 for f alone; temperature tau:
    towards 0 the best position alone counts. Returns h (B, C, D), unit, and a (B, C, N).
    """
    # a_ki = softmax_i(<g_k, u_i> / tau)
    a = (where @ u.transpose(1, 2) / tau).softmax(dim=-1)  # (B, C, N)
    # h_k = nrm(f + alpha sum_i a_ki u_i)
    return F.normalize(f[:, None] + alpha * (a @ u), dim=-1), a


class CBSA(nn.Module):
    """images (B, 3, H, W) uint8 -> logits (B, C), context logits (B, G), attention (B, C, N).

    visual and scale: CLIP's. where and what (C, D): unit text features of the two prompts. member
    (C, G) in {0, 1}: classes of a context. alpha, kappa: learned, but where they start at 0 fixed.
    """

    def __init__(
        self, visual: nn.Module, where: Tensor, what: Tensor, scale: Tensor, member: Tensor,
        alpha: float = 0.5, kappa: float = 0.3,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, buffer in dict(where=where, what=what, member=member).items():
            self.register_buffer(name, buffer)
        self.visual, self.scale, self.tau = visual, nn.Parameter(scale.clone()), 0.1  # tau_a
        self.bias = nn.Parameter(torch.zeros(len(what)))
        self.alpha = nn.Parameter(torch.tensor(alpha), requires_grad=alpha > 0)
        self.kappa = nn.Parameter(torch.tensor(kappa), requires_grad=kappa > 0)
        self.context = nn.Linear(what.shape[1], member.shape[1])
        for start in self.context.parameters():
            nn.init.zeros_(start)  # r starts at 0: CLIP's own ranking

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f, u = common.clip_features(self.visual, images)  # (B, D), (B, N, D)
        with torch.autocast(f.device.type, enabled=False):  # only the tower runs in bf16
            h, attention = label_features(f, u, self.where, self.alpha, self.tau)
            r = self.context(f)  # (B, G)
            # z_k = s <h_k, t_k> + b_k + kappa r_g(k), g(k) the context of class k (our reading)
            logits = self.scale * (h * self.what).sum(-1) + self.bias  # (B, C)
            return logits + self.kappa * r @ self.member.T, r, attention


# ------------------------------------------------------------------------------------------ losses


def asymmetric_loss(logits: Tensor, y: Tensor, gamma_neg=4, gamma_pos=0, margin=0.05) -> Tensor:
    """Asymmetric loss (Ridnik et al., ICCV 2021): mean over the known entries, 0 without any.

    Args: logits (B, C), y (B, C) in {1, 0, -1}. The focus weights carry no gradient.
    """
    p = torch.sigmoid(logits)
    p_m = (p - margin).clamp(min=0)
    # (1 - p)^gamma_pos log p where present, p_m^gamma_neg log(1 - p_m) where absent
    log_absent = F.logsigmoid(-logits) if margin == 0 else torch.log1p(-p_m)
    positive = (1 - p.detach()) ** gamma_pos * F.logsigmoid(logits)
    negative = p_m.detach() ** gamma_neg * log_absent
    return -(positive * (y == 1) + negative * (y == -1)).sum() / (y != 0).sum().clamp(min=1)


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
    p = (present.T @ present + smooth * present.mean(0)) / (present.sum(0)[:, None] + smooth)
    affinity = (p + p.T) / 2 + epsilon
    np.fill_diagonal(affinity, 0)
    if number == 0:
        degree = affinity.sum(0) ** -0.5
        values = np.linalg.eigvalsh(np.eye(C) - degree[:, None] * affinity * degree)
        number = 2 + int(np.argmax(np.diff(values[1 : C // 2 + 2])))
    common.need(2 <= number <= C, f"--contexts {number} must be 2 to {C}, the number of classes")
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
def pseudo_labels(score: Tensor, y: Tensor, one_threshold=False, band=False) -> Tensor:
    """Class-wise thresholds (Figure 2), class-distribution-aware (our reading): (m, C), 1 or -1.

    Args: score (m, C) of the unlabelled images; y (n, C) of the labelled ones. Of every class the
    round(prior m) highest scores are positive, ties by order; a class not seen in y gets none.
    `one_threshold`: as many positives in total, by one threshold for all classes. `band`: 0 for the
    lower half of the positives and, down to twice their count, for negatives.
    """
    seen, shape = (y == 1).any(0), score.shape
    number = (class_prior(y) * len(score)).round().long() * seen  # (C,)
    score = score.masked_fill(~seen, -math.inf)
    if one_threshold:
        score, number = score.reshape(-1, 1), number.sum()[None]
    rank = score.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    last, first = number, number  # after the positives, of the negatives
    if band:  # however frequent a class is, half of its negatives stay
        last, first = (number + 1) // 2, torch.minimum(2 * number, (number + len(score)) // 2)
    return ((rank < last).to(torch.int8) - (rank >= first).to(torch.int8)).view(shape)


# ---------------------------------------------------------------------------------------- training


def endless(loader):
    while True:
        yield from loader
        if common.PROCESSES > 1:
            loader.sampler.set_epoch(loader.sampler.epoch + 1)


def train_one_epoch(model, teacher, loaders, steps, optimizer, scheduler, labels, args):
    """`steps` steps of the student over strong views; the teacher follows. Returns log entries.

    loaders: of labelled images and, but in the warm-up, of unlabelled ones. labels: known and
    pseudo-labels of classes (n, C) and contexts (n, G).
    """
    net, totals, lambda_c = getattr(model, "module", model), {}, args.lambda_c
    model.train()
    net.visual.eval()  # few labelled images: CLIP's batch statistics stay
    device, (classes, contexts) = net.bias.device, labels
    batches = zip(range(steps), *map(endless, loaders), strict=False)
    for _, *batch in tqdm(batches, total=steps, leave=False, disable=None):
        images, _, index = (torch.cat(v) for v in zip(*batch, strict=True))
        n, y, g = len(batch[0][2]), classes[index].to(device), contexts[index].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            logits, context_logits, _ = model(images.to(device, non_blocking=True))
        loss_lab = asymmetric_loss(logits[:n], y[:n])
        loss_unl = asymmetric_loss(logits[n:], y[n:])
        loss_ctx_lab = asymmetric_loss(context_logits[:n], g[:n])
        loss_ctx_unl = asymmetric_loss(context_logits[n:], g[n:])
        # L = L_lab + lambda_u L_unl + lambda_c (L_ctx_lab + lambda_u L_ctx_unl)
        loss_ctx = loss_ctx_lab + args.lambda_u * loss_ctx_unl
        loss = loss_lab + args.lambda_u * loss_unl + (not args.no_context) * lambda_c * loss_ctx
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        teacher.update_parameters(net)
        common.add_up(totals, loss=loss, loss_labelled=loss_lab, loss_unlabelled=loss_unl)
        common.add_up(totals, loss_context=loss_ctx_lab, loss_context_unlabelled=loss_ctx_unl)
    return common.epoch_entry(totals, steps)


def evaluate(net, loader, y: np.ndarray, bf16: bool) -> tuple[dict, Tensor]:
    """Metrics and logits (images, C), rows as in the data set."""
    logits = common.outputs(lambda x: net.eval()(x)[:1], loader, net.bias.device, bf16)[0]
    return common.multilabel_metrics(logits.numpy(), y), logits


@torch.no_grad()
def attention_cells(net, test: tuple, size: int) -> list[tuple]:
    """For samples.png: test images, and beside each where its five likeliest labels look."""
    cells = []
    for item, y in zip(test[0][:6], test[1], strict=False):
        image = common.open_image(item).resize((176, 176))
        x = common.make_transform(size)(image)[None]
        logits, _, attention = net.eval()(x.to(net.bias.device))
        cells.append((image, []))
        maps = attention[0].unflatten(1, (math.isqrt(attention.shape[-1]), -1)).cpu().numpy()
        for label in common.likeliest(torch.sigmoid(logits[0]).cpu(), y):
            a = maps[label[0]]
            light = Image.fromarray(np.uint8(255 * a / a.max())).resize(image.size, 2)
            white = Image.new("RGB", image.size, "white")
            cells.append((Image.composite(image, white, light), [label]))
    return cells


# -------------------------------------------------------------------------------------------- main


def build(args: Namespace, classes: list[str], member: Tensor) -> CBSA:
    clip, tokenize = common.load_clip(args.arch, args.weights, args.size)
    prompts = "a photo of a {}", "a photo of a {}" if args.one_prompt else "the region showing a {}"
    tokens = (common.prompt_tokens(tokenize, prompt, classes) for prompt in prompts)
    with torch.no_grad():
        what, where = (clip.encode_text(t, normalize=True) for t in tokens)  # (C, D) each
        scale = clip.logit_scale.exp()
    clip.visual.requires_grad_(args.train_trunk == "all")
    for weight in common.last_stage(clip.visual, projection_only=args.train_trunk == "proj"):
        weight.requires_grad_(True)
    alpha, kappa = args.alpha * (not args.whole_image), args.kappa * (not args.no_context)
    return CBSA(clip.visual, where, what, scale, member, alpha=alpha, kappa=kappa)


def make_loaders(args: Namespace, images, y: np.ndarray, parts: list[Tensor]) -> tuple:
    """A loader of strong views for each of `parts`, the labelled and the unlabelled rows of images
    and y, whose batches are one together; and a loader of all weak views."""
    weak = common.make_transform(args.size, args.crops)
    erase = v2.RandomErasing(0.5, (0.02, args.erase))
    strong = v2.Compose([v2.RandAugment(*args.augment), weak, erase])
    common.need(args.labelled <= 1, f"--labelled {args.labelled} must be a share, at most 1")
    data, share = common.ImageDataset(images, y, strong), max(args.labelled, len(parts[0]) / len(y))
    n = max(1, round(share * args.batch_size / common.PROCESSES)) * common.PROCESSES
    each = zip(parts, (n, max(common.PROCESSES, args.batch_size - n)), strict=False)
    loaders = [common.make_loader(Subset(data, rows), args, True, size) for rows, size in each]
    return loaders, common.make_loader(common.ImageDataset(images, y, weak), args)


def main() -> None:
    args, state = parse_args()
    device, bf16 = common.pick_device(args.device), args.precision == "bf16"
    torch.manual_seed(args.seed)
    if args.predict:
        net = build(args, state["classes"], state["model"]["member"]).to(device)
        return common.predict(lambda x: net.eval()(x)[0], net, args, state)

    classes, train, test, y, about = common.load_task(args, state, "cbsa", common.hide_images)
    test_data = common.ImageDataset(*test, common.make_transform(args.size))
    test_loader = common.make_loader(test_data, args)
    if args.eval:
        net = build(args, classes, state["model"]["member"]).to(device)
        common.load_weights(net, state["model"])
        return common.report(args, classes, test[1], evaluate(net, test_loader, test[1], bf16)[1])

    labelled, known, truth = (y != 0).any(1), torch.tensor(y), torch.tensor(train[1])
    cluster = find_contexts(y[labelled], args.contexts)
    member = F.one_hot(torch.tensor(cluster).long()).float()  # (C, G)
    net = build(args, classes, member).to(device, memory_format=torch.channels_last)
    teacher = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    lab, unl = (torch.tensor(np.flatnonzero(part)) for part in (labelled, ~labelled))
    loaders, weak_loader = make_loaders(args, train[0], y, [lab, unl] if len(unl) else [lab])
    steps, rates = max(map(len, loaders)), [args.lr, args.head_lr]
    tower = [p for p in net.visual.parameters() if p.requires_grad]
    head = [net.scale, net.bias, net.alpha, net.kappa, *net.context.parameters()]
    groups = [dict(params=tower, lr=args.lr), dict(params=head, lr=args.head_lr, weight_decay=0.0)]
    optimizer, total = torch.optim.AdamW(groups, fused=True), args.epochs * steps
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=total)
    saved = dict(student=net, model=teacher.module, optimizer=optimizer, scheduler=scheduler)
    run = common.Run(args, about, state, **saved)
    teacher.n_averaged.fill_(state["epoch"] if state else 0)  # the first student is copied
    for k in range(member.shape[1]):
        print(f"context {k}:", ", ".join(classes[c] for c in np.flatnonzero(cluster == k)))
    if not state:
        # CLIP's cosines are all positive: the mean of a class's logits becomes its prior's
        logits = common.outputs(lambda x: net.eval()(x)[:1], weak_loader, device, bf16)[0]
        net.bias.data = (class_prior(known[lab]).logit() - logits.mean(0)).to(device)
        entry = dict(epoch=0)  # zero-shot: f alone, h without f, their mix
        for name, alpha in dict(mAP_image=0, mAP_local=1e6, mAP=net.alpha.item()).items():
            net.alpha.data.fill_(alpha)
            entry[name] = evaluate(net, test_loader, test[1], bf16)[0]["mAP"]
        print(f"zero-shot: image {entry['mAP_image']:.2f}, local {entry['mAP_local']:.2f}, both:")
        run.add(entry)
    model = common.parallel(net, args.compile)
    for epoch in range(run.start, args.epochs + 1):
        alone = epoch <= min(args.warm_up, args.epochs - 1) or args.no_unlabelled or not len(unl)
        run.begin(epoch, *loaders[: 2 - alone])
        labels = [known.clone(), context_labels(known, member)]
        guess = lambda x: teacher.module.eval()(x)[:2]  # noqa: E731
        guesses = () if alone else common.outputs(guess, weak_loader, device, bf16)
        for label, score in zip(labels, guesses, strict=False):
            label[unl] = pseudo_labels(score[unl], label[lab], args.global_threshold, args.band)
        counts = common.pseudo_counts(labels[0][unl], known[unl], truth[unl])
        quality = common.epoch_entry(dict(pseudo=counts.to(device)), steps)
        more = steps, optimizer, scheduler, labels, args
        entry = train_one_epoch(model, teacher, loaders[: 2 - alone], *more)
        metrics, _ = evaluate(teacher.module, test_loader, test[1], bf16)
        run.end(entry | metrics | quality)
    run.finish(attention_cells(teacher.module, test, args.size))


if __name__ == "__main__":
    common.run_script(main)
