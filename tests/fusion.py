# SPDX-License-Identifier: MIT
"""SCINet's fusion by itself on real labels; run by hand, prints a Markdown table.

    python tests/fusion.py --data coco --root DIR [--weights FILE] [--known 0.1 0.3 0.5]

Hides label entries of the training images, scores the images by a linear probe that a MobileNetV2
feeds and that learned the known entries, and gives the mAP of the hidden entries before and after
the confidence update, mean and standard deviation over the mask seeds. C is the inverse of the
probe's regularisation.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import scinet  # noqa: E402
import sst  # noqa: E402
from tests.ablations import markdown_table  # noqa: E402

ROWS = {  # lambda_n, lambda_q
    "probe": (0, 0),
    "instance graph": (1, 0),
    "label graph": (0, 0.1),
    "both": (1, 0.1),
    "both, lambdas of the paper": (0.1, 0.4),
}


@torch.no_grad()
def features(images, size: int, weights: str) -> torch.Tensor:
    """Unit features (images, 1280): the mean over positions of MobileNetV2's last map."""
    frozen, trained, _ = sst.build_trunk("mobilenet_v2", weights)
    trunk = torch.nn.Sequential(frozen, trained).eval()
    data = common.ImageDataset(images, np.zeros(len(images)), common.make_transform(size))
    loader = common.make_loader(data, argparse.Namespace(batch_size=64, workers=0))
    score = lambda x: (trunk(common.normalise(x)).mean((2, 3)),)  # noqa: E731
    f = common.outputs(score, loader, torch.device("cpu"))[0]
    return torch.nn.functional.normalize(f, dim=-1)


def probe(f: torch.Tensor, y: torch.Tensor, c: float) -> torch.Tensor:
    """Scores (n, C) of logistic regressions, one a class, fitted to its known entries."""
    s, x = torch.zeros(y.shape), f.numpy()
    for k in range(y.shape[1]):
        known, present = (y[:, k] != 0).numpy(), (y[:, k] == 1).numpy()
        if present.any():
            model = LogisticRegression(C=c, max_iter=200).fit(x[known], present[known])
            s[:, k] = torch.tensor(model.predict_proba(x)[:, 1])
    return s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="coco")
    parser.add_argument("--root", required=True)
    parser.add_argument("--weights", default="default", help="state dict of a MobileNetV2")
    parser.add_argument("--size", type=int, default=144)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--known", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--c", type=float, nargs="+", default=[100, 10], help="C of the probe")
    parser.add_argument("--kappa", type=float, default=20)
    parser.add_argument("--related", type=int, default=5)
    args = parser.parse_args()
    _, (images, labels), _ = common.load_data(args.data, args.root, args.limit)
    f, truth = features(images, args.size, args.weights), torch.tensor(labels)
    a_n = scinet.instance_graph(f, 10, 0.3)
    found = defaultdict(list)
    for c, known, seed in tqdm([*product(args.c, args.known, args.seeds)], "probes", disable=None):
        y = torch.tensor(common.hide_entries(labels, known, seed))
        s, a_q = probe(f, y, c), scinet.label_graph(y, args.kappa, args.related)
        for row, (lambda_n, lambda_q) in ROWS.items():
            p = scinet.fuse(s, y, a_n, a_q, lambda_n, lambda_q)
            found[c, row, known].append(scinet.hidden_map(p, y, truth))
    table = []
    for c, row in product(args.c, ROWS):
        values = [found[c, row, known] for known in args.known]
        pairs = [(statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for v in values]
        table.append([f"C = {c:g}: {row}", *(f"{m:.1f} ± {spread:.1f}" for m, spread in pairs)])
    header = ["mAP of hidden entries, %", *(f"{known:.0%} known" for known in args.known)]
    print(markdown_table(header, table))


if __name__ == "__main__":
    common.run_script(main)
