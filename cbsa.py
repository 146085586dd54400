# SPDX-License-Identifier: MIT
"""Context-Based Semantic-Aware Alignment (CBSA): few images fully labelled, the rest not at all.

Fan, Xie, Xiao, Huang: Context-Based Semantic-Aware Alignment for Semi-Supervised Multi-Label
Learning, AAAI 2025. CLIP's text feature of each class finds its place in the image, so that a text
is aligned with a feature of its own, not with the one feature of the whole image. A second task
tells which contexts an image shows: groups of classes that occur together. The other images are
labelled by a threshold for each class; in our reading, by a moving average of the network.

We had the abstract and the captions of the figures, not the equations. From them: label-specific
features by CLIP's text encoder, one-to-one alignment, contexts by spectral clustering of the label
correlations, learned on labelled and unlabelled images, class-wise thresholds. A docstring says
(abstract) or (Figure) where it rests on these; every formula is our reading.

Run:  python cbsa.py                         toy world, 5 % of the images labelled
      python cbsa.py --no-unlabelled         supervised: no losses on unlabelled images
      python cbsa.py --data coco --root DIR --known 0.05

Measured with 5 % labelled, mAP over three seeds. 3,000 photographs: CLIP 28.5; fine-tuned on the
labelled images 31.2 ± 0.1; CBSA 31.9 ± 0.2. Toy world: 72.4, 88.0 ± 0.7 and 93.1 ± 0.2.
Differs from the paper, as far as can be known:
 1. The words of the prompts are ours: "where" (the region showing a {class}) attends, "what" (a
    photo of a {class}) names. On real data a text feature is a mean over three or four of them.
 2. Pseudo-labels are made once an epoch, from ranks over all unlabelled images.
 3. On real data, scores near the threshold of a class become no label (--band).
"""

import math
from argparse import BooleanOptionalAction
from itertools import count, dropwhile

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import SpectralClustering
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Subset
from torchvision.transforms import v2

import common

REAL = dict(
    known=0.05,
    arch="RN101-quickgelu",
    size=224,  # pixels
    what=("a photo of a {}", "a picture of the {}", "a photo with a {} in it", "a {} in a scene"),
    where=("the region showing a {}", "a close-up of a {}", "a cropped photo of the {}"),
    contexts=0,  # G; 0 for the number that the eigengap gives
    lambda_c=0.5,  # weight of the context losses
    epochs=20,
    warm_up=2,  # epochs on labelled images only
    lr=1e-5,
    head_lr=1e-3,
    ema=0.999,
    crops=(448, 384, 320),  # sides of the random crops, of an image of 512
    augment=dict(num_ops=2, magnitude=9),  # RandAugment of the strong view
    erase=0.33,  # largest part of it that is erased
    band=True,
    workers=4,
)
RECIPES = {
    "real": REAL,
    "voc2007": REAL | dict(contexts=4),
    "voc2012": REAL | dict(contexts=4),
    "coco": REAL | dict(contexts=10),
    "folder": REAL | dict(known=1.0),  # one's own: what is unknown, nobody knows
    "toy": REAL | dict(
        arch="local-dir:tests/toy_clip",
        size=128,
        what=("a photo of a {}",),  # the prompts that the toy CLIP learned
        where=("the region showing a {}",),
        contexts=4,
        lambda_c=0.1,  # 0.5 costs the toy world 0.3
        epochs=6,
        warm_up=1,
        lr=1e-4,
        head_lr=1e-2,
        ema=0.98,
        crops=(448,),
        augment=dict(num_ops=0, magnitude=0),  # toy objects are known by colour and size
        erase=0.1,
        band=False,
        workers=0,
    ),
}  # fmt: skip

def parse_args(argv=None):
    """The arguments, and the checkpoint of --resume or None."""
    parser = common.arguments(__doc__, known="IMAGES", mask_seed=1, batch_size=64)
    add = parser.add_argument_group("method").add_argument
    add("--arch", help="a CLIP of open_clip, hf-hub:ORG/NAME or local-dir:FOLDER")
    add("--weights", default="default", help="default (OpenAI's, the folder's), tag, none, or file")
    add("--train-trunk", choices=("last", "all"), default="last", help="tower stages that learn")
    add("--whole-image", action="store_true", help="one feature for all labels: alpha is 0")
    add("--no-context", action="store_true", help="no context identification")
    add("--global-threshold", action="store_true", help="one threshold for all classes")
    add("--band", action=BooleanOptionalAction, help="pseudo-labels near the threshold are none")
    add("--no-unlabelled", action="store_true", help="no losses on unlabelled images")
    add("--contexts", type=common.NATURAL, help="G, number of contexts; 0 for the eigengap's")
    add("--lambda-u", type=common.WEIGHT, default=1.0, help="weight of the unlabelled images")
    add("--ema", type=common.SHARE, help="decay of the teacher, a step")
    add("--warm-up", type=common.POSITIVE, help="first epochs, on labelled images only")
    add("--head-lr", type=common.RATE, help="highest rate of what is not the tower")
    return common.parse(parser, RECIPES, "cbsa", argv)

# ------------------------------------------------------------------------------------------- model

def label_features(f, u, where, alpha, tau):
    """Label-specific features (abstract), by attention (our reading).

    f (B, D), u (B, N, D), where (C, D), unit; weight alpha, 0 for f alone; temperature tau: towards
    0 the best position alone counts. Returns h (B, C, D), unit, and a (B, C, N).
    """
    # a_ki = softmax_i(<g_k, u_i> / tau)
    a = (where @ u.transpose(1, 2) / tau).softmax(dim=-1)  # (B, C, N)
    # h_k = nrm(f + alpha sum_i a_ki u_i)
    return F.normalize(f[:, None] + alpha * (a @ u), dim=-1), a

class CBSA(nn.Module):
    """images (B, 3, H, W) uint8 -> logits (B, C), context logits (B, G), attention (B, C, N).

    visual and scale: CLIP's, read by `common.clip_features`. where and what (C, D): unit text
    features of the two prompts. member (C, G) in {0, 1}: classes of a context. alpha, kappa:
    learned, but where they start at 0 fixed. The score is our reading.
    """

    def __init__(
        self, visual, where, what, scale, member,
        alpha = 0.5, kappa = 0.3,
    ):  # fmt: skip
        super().__init__()
        self.register_buffer("where", where)
        self.register_buffer("what", what)
        self.register_buffer("member", member)
        self.visual = visual
        self.scale = nn.Parameter(scale.clone())
        self.tau = 0.1
        self.bias = nn.Parameter(torch.zeros(len(what)))
        self.alpha = nn.Parameter(torch.tensor(alpha), requires_grad=alpha > 0)
        self.kappa = nn.Parameter(torch.tensor(kappa), requires_grad=kappa > 0)
        self.context = nn.Linear(what.shape[1], member.shape[1])
        nn.init.zeros_(self.context.weight)  # r starts at 0: CLIP's own ranking
        nn.init.zeros_(self.context.bias)

    def forward(self, images, alpha=None):
        """alpha: in the place of the learned one."""
        alpha = self.alpha if alpha is None else alpha
        f, u = common.clip_features(self.visual, images)  # (B, D), (B, N, D)
        with torch.autocast(f.device.type, enabled=False):  # only the tower runs in bf16
            h, attention = label_features(f, u, self.where, alpha, self.tau)
            r = self.context(f)  # (B, G)
            # z_k = s <h_k, t_k> + b_k + kappa r_g(k), g(k) the context of class k
            logits = self.scale * (h * self.what).sum(-1) + self.bias  # (B, C)
            return logits + self.kappa * r @ self.member.T, r, attention

# ------------------------------------------------------------------------------------------ losses

def asymmetric_loss(logits, y, gamma_neg=4, gamma_pos=0, margin=0.05):
    """Asymmetric loss (Ridnik et al., ICCV 2021): mean over the known entries, 0 without any.

    logits (B, C), y (B, C) in {1, 0, -1} -> scalar; margin in (0, 1). The focus weights carry no
    gradient.
    """
    p = torch.sigmoid(logits)
    p_m = (p - margin).clamp(min=0)
    # (1 - p)^gamma_pos log p where present, p_m^gamma_neg log(1 - p_m) where absent
    positive = (1 - p.detach()) ** gamma_pos * F.logsigmoid(logits)
    negative = p_m.detach() ** gamma_neg * torch.log1p(-p_m)
    total = (positive * (y == 1) + negative * (y == -1)).sum()
    return -total / (y != 0).sum().clamp(min=1)

# ----------------------------------------------------------------------------------- pseudo-labels

def class_prior(y):
    """How often each class shows in labelled images, (C,): (sum y + 1/2) / (n + 1). Our reading."""
    return ((y == 1).sum(0) + 0.5) / ((y != 0).sum(0) + 1)

def find_contexts(y, number, smooth=1.0, epsilon=1e-3):
    """Contexts (abstract, Figure 5): spectral clusters of the labels' correlation, (C,) int.

    y (images, C), labelled images only; number of contexts, 0 for the largest eigengap; ValueError
    where it does not fit. P(j|i) = (n_ij + smooth P(j)) / (n_i + smooth) is made symmetric, its
    diagonal 0; epsilon off the diagonal keeps a label that never co-occurs from being a context by
    itself. Our reading.
    """
    present = (y == 1).astype(float)
    C = y.shape[1]
    if C < 3 and number == 0:
        return np.zeros(C, int)  # too few for an eigengap
    together = present.T @ present + smooth * present.mean(0)
    p = together / (present.sum(0)[:, None] + smooth)
    affinity = (p + p.T) / 2 + epsilon
    np.fill_diagonal(affinity, 0)
    if number == 0:
        number = eigengap(affinity)
    if not 2 <= number <= C:
        raise ValueError(f"{number} contexts: must be 2 to {C}, the number of classes")
    clusters = SpectralClustering(number, affinity="precomputed", random_state=0)
    return clusters.fit_predict(affinity)

def eigengap(affinity):
    """The number of clusters, 2 to C / 2 + 1, behind which the eigenvalues of the normalised
    Laplacian of affinity (C, C) leave the largest gap."""
    C = len(affinity)
    degree = affinity.sum(0) ** -0.5
    laplacian = np.eye(C) - degree[:, None] * affinity * degree
    values = np.linalg.eigvalsh(laplacian)[1 : C // 2 + 2]
    return 2 + int(np.argmax(np.diff(values)))

def context_labels(y, member):
    """OR over the classes of a context: y (B, C) in {1, 0, -1}, member (C, G) 0/1 -> (B, G) int8.

    +1 if any class is present, -1 if all are known absent, else 0. Our reading.
    """
    some = ((y == 1).float() @ member) > 0
    none = ((y == -1).float() @ member) == member.sum(0)
    return some.to(torch.int8) - none.to(torch.int8)

@torch.no_grad()
def pseudo_labels(score, y, one_threshold=False, band=False):
    """Class-wise thresholds (Figure 2), class-distribution-aware (our reading): (m, C) int8.

    score (m, C) of the unlabelled images; y (n, C) of the labelled ones. Of every class the
    round(prior m) highest scores are 1, ties by order, the others -1; all are 0 of a class without
    a positive in y. `one_threshold`: as many positives in total, by one threshold for all classes.
    `band`: 0 for the lower half of the positives and, down to twice their count, for negatives.
    """
    seen = (y == 1).any(0)
    number = (class_prior(y) * len(score)).round().long() * seen  # (C,)
    ranked = score.masked_fill(~seen, -math.inf)
    if one_threshold:
        ranked = ranked.reshape(-1, 1)  # (m C, 1)
        number = number.sum()[None]
    rank = ranked.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    positives_end = number
    negatives_start = number
    if band:  # however frequent a class is, half of its negatives stay
        size = len(score) * seen.sum() if one_threshold else len(score)
        positives_end = (number + 1) // 2
        negatives_start = torch.minimum(2 * number, (number + size) // 2)
    pseudo = torch.zeros_like(ranked, dtype=torch.int8)
    pseudo[rank < positives_end] = 1
    pseudo[rank >= negatives_start] = -1
    return pseudo.view_as(score) * seen

# ---------------------------------------------------------------------------------------- training

def endless(loader):
    """The batches of a loader of `make_loaders` over and over, each pass in another order and of
    other views."""
    for k in count():
        seed = hash((common.EPOCH.item(), k)) % 2**31
        loader.dataset.dataset.epoch.fill_(seed)
        loader.sampler.set_epoch(seed)
        yield from loader

def train_one_epoch(model, teacher, loaders, steps, optimizer, scheduler, labels, args):
    """`steps` steps of the student over strong views; the teacher follows. Returns log entries.

    loaders: of labelled images and, but in the warm-up, of unlabelled ones. labels: known and
    pseudo-labels of classes (n, C) and of contexts (n, G).
    """
    model.train()
    net = getattr(model, "module", model)  # without DistributedDataParallel
    net.visual.eval()  # few labelled images: CLIP's batch statistics stay
    device = net.bias.device
    class_labels, context_labels = labels
    totals = {}
    batches = zip(range(steps), *map(endless, loaders), strict=False)
    for _, *parts in common.progress(batches, "steps"):
        images, _, index = map(torch.cat, zip(*parts, strict=True))
        n_labelled = len(parts[0][0])
        y = class_labels[index].to(device)  # (B, C)
        g = context_labels[index].to(device)  # (B, G)
        with common.autocast(device, args.precision):
            logits, context_logits, _ = model(images.to(device, non_blocking=True))
        loss_lab = asymmetric_loss(logits[:n_labelled], y[:n_labelled])
        loss_unl = asymmetric_loss(logits[n_labelled:], y[n_labelled:])
        loss_ctx_lab = asymmetric_loss(context_logits[:n_labelled], g[:n_labelled])
        loss_ctx_unl = asymmetric_loss(context_logits[n_labelled:], g[n_labelled:])
        # L = L_lab + lambda_u L_unl + lambda_c (L_ctx_lab + lambda_u L_ctx_unl), our reading
        loss = loss_lab + args.lambda_u * loss_unl
        if not args.no_context:
            loss = loss + args.lambda_c * (loss_ctx_lab + args.lambda_u * loss_ctx_unl)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        teacher.update_parameters(net)
        losses = dict(loss=loss, loss_labelled=loss_lab, loss_unlabelled=loss_unl)
        losses |= dict(loss_context=loss_ctx_lab, loss_context_unlabelled=loss_ctx_unl)
        common.add_up(totals, **losses)
    return common.epoch_entry(common.over_processes(totals, net), steps)

def evaluate(net, task, precision, alpha=None):
    """Metrics and logits (images, C) of the test images, rows as in the data set."""
    net.eval()
    score = lambda images: net(images, alpha)[:1]  # noqa: E731
    logits = common.outputs(score, task.test_loader, net.bias.device, precision)[0]
    return common.multilabel_metrics(logits.numpy(), task.test_y), logits

def label_the_unlabelled(teacher, loader, known, labelled, unlabelled, args):
    """As `known`, labels of classes (n, C) and of contexts (n, G), with pseudo-labels in the rows
    `unlabelled`, from the teacher's scores of the weak views of `loader`."""
    teacher.eval()
    device = teacher.bias.device
    scores = common.outputs(lambda images: teacher(images)[:2], loader, device, args.precision)
    labels = []
    for y, score in zip(known, scores, strict=True):
        y = y.clone()
        one = args.global_threshold
        y[unlabelled] = pseudo_labels(score[unlabelled], y[labelled], one, args.band)
        labels.append(y)
    return labels

# -------------------------------------------------------------------------------------------- main

def last_stage(visual):
    """Parameters of an image tower's last stage and of all after it."""
    if hasattr(visual, "trunk"):
        stage = visual.trunk.get_submodule(visual.trunk.feature_info[-1]["module"])
    else:
        stage = getattr(visual, "layer4", None) or visual.transformer.resblocks[-1]
    first = next(stage.parameters())
    own = [visual.proj] if hasattr(visual, "proj") else []  # a ViT's, before its blocks
    return [*dropwhile(lambda p: p is not first, visual.parameters()), *own]

def text_features(clip, tokenize, prompts, classes):
    """Unit means (C, D) of the unit text features of each class in a few prompts (Radford et al.,
    ICML 2021)."""
    features = 0
    for prompt in prompts:
        tokens = common.prompt_tokens(tokenize, prompt, classes)
        features = features + clip.encode_text(tokens, normalize=True)
    return F.normalize(features, dim=-1)

def build(args, classes, member):
    """The network of a run; member (C, G): classes of a context."""
    clip, tokenize = common.load_clip(args.arch, args.weights, args.size)
    with torch.no_grad():
        what = text_features(clip, tokenize, args.what, classes)  # (C, D)
        where = text_features(clip, tokenize, args.where, classes)  # (C, D)
        scale = clip.logit_scale.exp()
    clip.visual.requires_grad_(args.train_trunk == "all")
    for weight in last_stage(clip.visual):
        weight.requires_grad_(True)
    alpha = 0.0 if args.whole_image else 0.5
    kappa = 0.0 if args.no_context else 0.3
    return CBSA(clip.visual, where, what, scale, member, alpha, kappa)

def make_loaders(args, images, y, labelled, unlabelled):
    """Loaders of strong views of the labelled and, if any, of the unlabelled rows, whose batches
    are one together; and a loader of weak views of all. The labelled share of a batch is that of
    the data, but never under an eighth."""
    weak = common.make_transform(args.size, args.crops)
    erase = v2.RandomErasing(0.5, (0.02, args.erase))
    strong = v2.Compose([v2.RandAugment(**args.augment), weak, erase])
    weak_loader = common.make_loader(common.ImageDataset(images, y, weak), args)
    share = max(1 / 8, len(labelled) / len(y))
    P = common.PROCESSES
    size = P * max(1, round(share * args.batch_size / P))
    sizes = (size, max(P, args.batch_size - size))
    loaders = []
    for rows, size in zip((labelled, unlabelled), sizes, strict=True):
        if len(rows) > 0:
            data = common.ImageDataset(images, y, strong)
            data.epoch = torch.tensor(0).share_memory_()  # one that passes within an epoch change
            loaders.append(common.make_loader(Subset(data, rows), args, True, size))
    return loaders, weak_loader

def make_optimizer(net, args, steps):
    """AdamW on two groups, the tower and what is not, and one cycle of their rates."""
    tower = [p for p in net.visual.parameters() if p.requires_grad]
    head = [net.scale, net.bias, net.alpha, net.kappa, *net.context.parameters()]
    groups = [dict(params=tower, lr=args.lr), dict(params=head, lr=args.head_lr, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, fused=True)
    rates = [args.lr, args.head_lr]
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)

def zero_shot(net, task, loader, prior, precision):
    """Set the biases, and return the log entry of the network before training: its mAP with f
    alone, with h without f, and as it is."""
    # CLIP's cosines are all positive: the mean of a class's logits becomes that of its prior
    score = lambda images: net.eval()(images)[:1]  # noqa: E731
    logits = common.outputs(score, loader, net.bias.device, precision)[0]
    net.bias.data.copy_(prior.logit() - logits.mean(0))
    entry = dict(epoch=0)
    for name, alpha in dict(mAP_image=0.0, mAP_local=1e6, mAP=None).items():
        entry[name] = evaluate(net, task, precision, alpha)[0]["mAP"]
    print(f"zero-shot: image {entry['mAP_image']:.2f}, local {entry['mAP_local']:.2f}, both:")
    return entry

def make_contexts(y, number, classes):
    """Membership (C, G) of the classes in the contexts of labels y (images, C); prints them."""
    with common.naming(f"--contexts {number} cannot be used"):
        cluster = find_contexts(y.numpy(), number)
    for context in range(cluster.max() + 1):
        names = [classes[c] for c in np.flatnonzero(cluster == context)]
        print(f"context {context}:", ", ".join(names))
    return F.one_hot(torch.tensor(cluster).long()).float()

def main():
    args, state = parse_args()
    device = common.pick_device(args.device)
    torch.manual_seed(args.seed)
    if args.predict:
        net = build(args, state["classes"], state["model"]["module.member"]).to(device)
        return common.predict(lambda images: net(images)[0], net, args, state)
    # data
    task = common.load_task(args, state, "cbsa", common.hide_images)
    if args.eval:
        net = build(args, task.classes, state["model"]["module.member"]).to(device)
        common.load_weights(net, state["model"])
        return common.report(args, task, evaluate(net, task, args.precision)[1])
    y = torch.tensor(task.y)
    is_labelled = (y != 0).any(1)
    labelled = is_labelled.nonzero().flatten()
    unlabelled = (~is_labelled).nonzero().flatten()
    loaders, weak_loader = make_loaders(args, task.images, y, labelled, unlabelled)
    steps = max(map(len, loaders))
    # network
    member = make_contexts(y[labelled], args.contexts, task.classes)  # (C, G)
    net = build(args, task.classes, member).to(device, memory_format=torch.channels_last)
    teacher = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    average = teacher.module
    # optimizer
    optimizer, scheduler = make_optimizer(net, args, args.epochs * steps)
    # loop
    run = common.Run(
        args, task.about, state,
        student=net, model=teacher, optimizer=optimizer, scheduler=scheduler,
    )  # fmt: skip
    if not state:
        run.add(zero_shot(net, task, weak_loader, class_prior(y[labelled]), args.precision))
    logits = evaluate(average, task, args.precision)[1]
    model = common.parallel(net, args.compile)
    known = [y, context_labels(y, net.member.cpu())]  # the contexts of a checkpoint, if resumed
    for epoch in range(run.start, args.epochs + 1):
        warm_up = epoch <= min(args.warm_up, args.epochs - 1)
        use_unlabelled = len(unlabelled) > 0 and not (warm_up or args.no_unlabelled)
        active = loaders if use_unlabelled else loaders[:1]
        run.begin(epoch, *active, steps=steps)
        labels = known
        if use_unlabelled:
            labels = label_the_unlabelled(average, weak_loader, known, labelled, unlabelled, args)
        entry = train_one_epoch(model, teacher, active, steps, optimizer, scheduler, labels, args)
        pseudo = common.pseudo_counts(labels[0], y, torch.tensor(task.truth))
        entry |= common.epoch_entry(dict(pseudo=pseudo), steps)
        metrics, logits = evaluate(average, task, args.precision)
        run.end(entry | metrics)
    run.finish(task, logits)

if __name__ == "__main__":
    common.run_script(main)
