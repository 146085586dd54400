# SPDX-License-Identifier: MIT
"""SCINet's fusion by itself on real labels; run by hand, prints a Markdown table.

    python tests/fusion.py --root DIR --weights FILE [--known 0.1 0.3 0.5] [--lambda-n 0.1 0.3 1]
    python tests/fusion.py --root DIR --clip local-dir:FOLDER --size 160 --c

Hides label entries of the training images and gives the mAP of the hidden entries before and after
the confidence update, by the script's lambdas and by the paper's, mean and standard deviation over
the mask seeds. S, what is updated, is of each kind: the probabilities of linear probes (C is the
inverse of their regularisation) that a MobileNetV2 feeds and that learned the known entries, and,
with --clip, the plain scores of a CLIP that learned nothing but the prior of each class. The
neighbours are those of the features that S comes from.

Features are kept in --cache, one file for each network, size and data set.
"""

import argparse
import hashlib
import statistics
import sys
from collections import defaultdict
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import scinet  # noqa: E402
import sst  # noqa: E402
from tests import toy  # noqa: E402
from tests.ablations import markdown_table  # noqa: E402


def features(score, images, name: str, args) -> torch.Tensor:
    """score(uint8 images) (images, D) of all images, unit; from the cache if they are there."""
    about = repr((name, args.data, args.root, args.size, len(images)))
    file = args.cache / f"{hashlib.sha256(about.encode()).hexdigest()[:12]}.pt"
    if not file.exists():
        transform = common.make_transform(args.size)
        data = common.ImageDataset(images, np.zeros(len(images)), transform)
        loader = common.make_loader(data, argparse.Namespace(batch_size=64, workers=0))
        f = common.outputs(lambda x: (score(x),), loader, torch.device("cpu"))[0]
        args.cache.mkdir(parents=True, exist_ok=True)
        torch.save(normalize(f, dim=-1), file)
    return torch.load(file, weights_only=True)


def hidden_map(p, y, truth) -> float:
    """mAP in percent of confidences p (n, C) for the hidden entries alone."""
    hidden = torch.where(y == 0, truth, 0).numpy()
    return common.multilabel_metrics(p.numpy(), hidden)["mAP"]


def trunk_features(images, args) -> torch.Tensor:
    """The mean over positions of MobileNetV2's last map, (images, 1280)."""
    trunk = sst.load_trunk("mobilenet_v2", args.weights).features.eval()
    score = lambda x: trunk(common.normalise(x)).mean((2, 3))  # noqa: E731
    return features(score, images, f"mobilenet_v2 {args.weights}", args)


@torch.no_grad()
def clip_features(images, classes: list[str], args) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's image features (images, D) and its logits (images, C), by a photo of a {class}."""
    clip, tokenize = common.load_clip(args.clip, "default", args.size)
    score = lambda x: common.clip_features(clip.visual, x)[0]  # noqa: E731
    f = features(score, images, args.clip, args)
    tokens = common.prompt_tokens(tokenize, "a photo of a {}", classes)
    return f, clip.logit_scale.exp() * f @ clip.encode_text(tokens, normalize=True).T


def prior_scores(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """As scinet.py starts: the mean of a class's logits (n, C) becomes that of its known prior."""
    prior = ((y == 1).sum(0) + 0.5) / ((y != 0).sum(0) + 1)
    return torch.sigmoid(logits + prior.logit() - logits.mean(0))


def main() -> None:
    ours = scinet.parse_args([])[0]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="coco")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--weights", default="default", help="state dict of a MobileNetV2")
    parser.add_argument("--clip", help="--arch of a CLIP, whose plain scores are an S of their own")
    parser.add_argument("--size", type=int, default=144)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--known", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--c", type=float, nargs="*", default=[10, 1, 0.1], help="C of the probes")
    parser.add_argument("--lambda-n", type=float, nargs="+", default=[ours.lambda_n])
    parser.add_argument("--lambda-q", type=float, nargs="+", default=[ours.lambda_q])
    parser.add_argument("--cache", type=Path, default=Path("runs/fusion"))
    args = parser.parse_args()
    rows = {"S": (0, 0), "instance graph": (ours.lambda_n, 0), "label graph": (0, ours.lambda_q)}
    rows |= {f"lambdas {n:g}, {q:g}": (n, q) for n, q in product(args.lambda_n, args.lambda_q)}
    rows["lambdas of the paper: 0.1, 0.4"] = (0.1, 0.4)
    classes, (images, labels), _ = common.load_data(args.data, args.root, args.limit)
    truth, kinds, found = torch.tensor(labels), {}, defaultdict(list)
    if args.c:
        f = trunk_features(images, args)

        def probed(y, c):
            logits = toy.linear_probe(f.numpy(), y.numpy(), f.numpy(), c)
            return torch.tensor(logits).sigmoid().float()

        kinds |= {f"probe, C = {c:g}": (f, partial(probed, c=c)) for c in args.c}
    if args.clip:
        g, logits = clip_features(images, classes, args)
        kinds["CLIP"] = g, lambda y: prior_scores(logits, y)
    for kind, (x, score) in kinds.items():
        a_n = scinet.instance_graph(x, ours.neighbours, ours.sigma)
        for known, seed in tqdm([*product(args.known, args.seeds)], kind, disable=None):
            y = torch.tensor(common.hide_entries(labels, known, seed))
            s = score(y)
            a_q = scinet.label_graph(torch.where(y == 0, s, (y == 1).float()), ours.related)
            for row, lambdas in rows.items():
                p = scinet.fuse(s, y, a_n, a_q, *lambdas)
                found[kind, row, known].append(hidden_map(p, y, truth))
    table = []
    for kind, row in product(kinds, rows):
        values = [found[kind, row, known] for known in args.known]
        pairs = [(statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for v in values]
        table.append([f"{kind}: {row}", *(f"{m:.1f} ± {spread:.1f}" for m, spread in pairs)])
    header = ["mAP of hidden entries, %", *(f"{known:.0%} known" for known in args.known)]
    print(markdown_table(header, table))


if __name__ == "__main__":
    common.run_script(main)
