# SPDX-License-Identifier: MIT
"""Runs sst.py with changes of its network, which were tried to bring it nearer to a linear probe.

    python tests/tools/variants.py --variant add_input [--variant drop_out] sst.py ARGUMENTS...
"""

import importlib
import sys
from argparse import REMAINDER, ArgumentParser
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def start_at_prior(script) -> None:
    """The classifier starts at zero, its bias at the prior."""
    build = script.build

    def changed(args, classes, y, checkpoint):
        net = build(args, classes, y, checkpoint)
        prior = ((y == 1).sum(0) + 0.5) / ((y != 0).sum(0) + 1)
        net.classifier.data.zero_()
        net.bias.data.copy_(torch.tensor(prior).logit())
        return net

    script.build = changed


def drop_out(script) -> None:
    """Dropout of 0.5 before the classifier."""
    forward = script.GatedGraph.forward
    script.GatedGraph.forward = lambda graph, f: nn.functional.dropout(
        forward(graph, f), 0.5, graph.training
    )


def add_input(script) -> None:
    """The output of the graph is added to its input."""
    forward = script.GatedGraph.forward
    script.GatedGraph.forward = lambda graph, f: f + forward(graph, f)


VARIANTS = {f.__name__: f for f in (start_at_prior, drop_out, add_input)}


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", choices=VARIANTS, action="append", default=[])
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=REMAINDER)
    options = parser.parse_args()
    script = importlib.import_module(Path(options.script).stem)
    for variant in options.variant:
        VARIANTS[variant](script)
    sys.argv = [options.script, *options.arguments]
    script.main(*script.parse_args())


if __name__ == "__main__":
    main()
