# SPDX-License-Identifier: MIT
"""Linear probes on the toy world: logistic regressions on what its two networks make of a scene.

    python tests/tools/probe.py

The features are the mean of the trunk's map and CLIP's image feature. C is chosen on the last 500
training scenes with mask seed 3. Prints the mAP of mask seeds 0, 1 and 2 on the test scenes.
"""

import statistics
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import scinet  # noqa: E402
from tests.tools.photos import logistic_regression  # noqa: E402
from tests.toy import world  # noqa: E402

COSTS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
AMOUNTS = {"5% of the images": (common.hide_images, 0.05)}
for part in (0.1, 0.3, 0.5, 1.0):
    AMOUNTS[f"{part:.0%} of the entries"] = (common.hide_entries, part)


@torch.no_grad()
def of_trunk(scenes: np.ndarray) -> np.ndarray:
    trunk = torch.nn.Sequential(*list(world.load_trunk().eval().children())[:-2])
    images = common.normalise(torch.tensor(scenes).permute(0, 3, 1, 2))
    return torch.cat([trunk(part).mean((2, 3)) for part in images.split(100)]).numpy()


def of_clip(scenes: np.ndarray) -> np.ndarray:
    args, _ = scinet.parse_args(["--workers", "0"])
    net = scinet.build(args, world.CLASSES, None, None)
    return scinet.evaluate(net, scenes, args)[1].numpy()


def fitted(x, y, x_test, y_test, c: float) -> float:
    """mAP of a probe that learns from x, y."""
    scale = x.std(0) + 1e-6
    w, b = logistic_regression(x / scale, y, c)
    logits = torch.tensor(x_test / scale) @ w + b
    return common.multilabel_metrics(logits.numpy(), y_test, world.CLASSES)["mAP"]


def main() -> None:
    _, train, truth = world.load("train")
    _, test, y_test = world.load("test")
    for name, features in dict(trunk=of_trunk, CLIP=of_clip).items():
        x = features(train)
        x_test = features(test)
        for amount, (hide, known) in AMOUNTS.items():
            y = hide(truth[:1500], known, 3)
            held_out = {c: fitted(x[:1500], y, x[1500:], truth[1500:], c) for c in COSTS}
            c = max(held_out, key=held_out.get)
            found = [fitted(x, hide(truth, known, seed), x_test, y_test, c) for seed in range(3)]
            spread = f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"
            print(f"{name}, {amount}: {spread}, C {c:g}")


if __name__ == "__main__":
    main()
