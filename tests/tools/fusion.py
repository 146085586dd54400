# SPDX-License-Identifier: MIT
"""SCINet's fusion by itself: the mAP of the hidden entries before and after the confidence update.

    python tests/tools/fusion.py CACHE SHARED [--known 0.1 0.3] [--lambda-n 0.1] [--lambda-q 0.03]

Run by hand on the first training images of COCO, of which SHARED holds a part in coco-mini/, beside
a CLIP in clip-mobilenet/; CACHE is that of photos.py. What is fused are the plain scores of that
CLIP, which learned nothing but the prior of each class, and the scores of a linear probe on its
image features that learned the known entries. Rows: by no graph, by either graph, by both with the
script's weights and the paper's. Mean and standard deviation over the mask seeds, as Markdown.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit, logit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import scinet  # noqa: E402
from tests.tools import photos  # noqa: E402


@torch.no_grad()
def clip_scores(images, classes: list[str], folder: str) -> tuple[np.ndarray, np.ndarray]:
    """CLIP's unit image features (n, D), and its logits (n, C) by "a photo of a {class}"."""
    load = photos.looking_up(scinet.load_clip, tuned=False)
    clip, tokenize, size = load(f"local-dir:{folder}", "openai", 0)
    maps = photos.Views(images, size).maps[0][:, 0]
    parts = torch.tensor(maps).split(500)
    f = torch.cat([scinet.clip_features(clip.visual, part.float())[0] for part in parts])
    tokens = scinet.prompt_tokens(tokenize, "a photo of a {}", classes)
    text = clip.encode_text(tokens, normalize=True)
    return f.numpy(), (clip.logit_scale.exp() * f @ text.T).numpy()


def main() -> None:
    ours, _ = scinet.parse_args([])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("shared")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--known", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--c", type=float, default=0.01, help="of the linear probe")
    parser.add_argument("--lambda-n", type=float, default=ours.lambda_n)
    parser.add_argument("--lambda-q", type=float, default=ours.lambda_q)
    args = parser.parse_args()
    n, q = args.lambda_n, args.lambda_q
    lambdas = {"no graph": (0, 0), "instance graph": (n, 0), "label graph": (0, q)}
    lambdas |= {"both graphs": (n, q), "both, by the paper's weights": (0.1, 0.4)}
    photos.Views.cache = args.cache
    classes, images, truth = common.load_data("coco", f"{args.shared}/coco-mini", "train")
    images, truth = images[: args.images], truth[: args.images]
    with photos.patch.object(scinet, "normalise", lambda x, *given: x):
        f, clip = clip_scores(images, classes, f"{args.shared}/clip-mobilenet")
    l_n = scinet.instance_graph(f, ours.neighbours, ours.sigma)
    header = [f"{known:.0%} known" for known in args.known]
    print("| mAP of the hidden entries, % | " + " | ".join(header) + " |")
    print("| --- " * (1 + len(args.known)) + "|")
    for kind in ("CLIP", "linear probe"):
        for row, weights in lambdas.items():
            cells = []
            for known in args.known:
                found = []
                for seed in args.seeds:
                    y = common.hide_entries(truth, known, seed)
                    prior = ((y == 1).sum(0) + 0.5) / ((y != 0).sum(0) + 1)
                    s = expit(clip - clip.mean(0) + logit(prior))
                    if kind == "linear probe":
                        x = f / (f.std(0) + 1e-6)
                        w, b = photos.logistic_regression(x, y, args.c)
                        s = expit(x @ w.numpy() + b.numpy())
                    l_q = scinet.label_graph(np.where(y == 0, s, y == 1))
                    p = scinet.fuse(s, y, l_n, l_q, *weights)
                    hidden = np.where(y == 0, truth, 0)
                    found.append(common.multilabel_metrics(p, hidden, classes)["mAP"])
                cells.append(f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}")
            print(f"| {kind}: {row} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
