# SPDX-License-Identifier: MIT
"""A training step on "cuda", of fake tensors that have a device and no values: no GPU is needed."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import cbsa
import common
import scinet
import sst
from tests import toy

B, C, G = 4, 16, 4


class Nothing:
    """Optimizer, scheduler and teacher that stay as they are."""

    def zero_grad(self):
        pass

    def step(self):
        pass

    def update_parameters(self, net):
        pass


class World:
    """One step of each script, on fake tensors."""

    def __init__(self):
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.y = torch.randint(-1, 2, (B, C)).to(torch.int8)

    def fake(self, x):
        return self.mode.from_tensor(x, static_shapes=True)

    def send(self, net, left):
        """As net.to("cuda"), but for the parameter or buffer called `left`."""
        for module in net.modules():
            for name, x in module._buffers.items():
                module._buffers[name] = self.moved(x, name == left)
            for name, x in module._parameters.items():
                if x is not None:
                    moved = self.moved(x, name == left)
                    module._parameters[name] = torch.nn.Parameter(moved, x.requires_grad)

    def moved(self, x, stays):
        fake = self.fake(x).detach()
        return fake if stays else fake.to("cuda")

    def batch(self, views, size):
        images = self.fake(torch.zeros(B, 3, size, size, dtype=torch.uint8))
        return (*[images] * views, self.fake(self.y), self.fake(torch.arange(B)))

    def sst(self, left=None):
        args = sst.parse_args(["--weights", "none"])[0]
        net = sst.build(args, torch.randn(C, 50), torch.rand(C, C))
        truth = self.fake(self.y)
        loader = [self.batch(1, args.size)]
        with self.mode:
            self.send(net, left)
            sst.train_one_epoch(net, loader, Nothing(), truth.to("cuda"), 40, args)

    def cbsa(self, left=None):
        args = cbsa.parse_args(["--weights", "none"])[0]
        net = cbsa.build(args, toy.CLASSES, F.one_hot(torch.arange(C) % G).float())
        labels = self.fake(self.y), self.fake(self.y[:, :G])
        loaders = [[self.batch(1, args.size)] for _ in range(2)]
        with self.mode:
            self.send(net, left)
            more = Nothing(), Nothing(), labels, args
            cbsa.train_one_epoch(net, Nothing(), loaders, 1, *more)

    def scinet(self, left=None):
        args = scinet.parse_args(["--weights", "none"])[0]
        net = scinet.build(args, toy.CLASSES)
        p, seen = self.fake(torch.rand(B, C)), self.fake(torch.ones(B, 1))
        sharp, thresholds = self.fake(torch.rand(C, C)), self.fake(torch.rand(C))
        memory = scinet.Memory(p, seen, p, sharp, thresholds)
        loader = [self.batch(3, args.size)]
        with self.mode:
            self.send(net, left)
            more = memory, 2, args
            _, memory = scinet.train_one_epoch(net, loader, Nothing(), Nothing(), *more)
        assert memory.s.device.type == "cpu"  # where it is fused


@pytest.fixture
def totals(monkeypatch):
    """What the steps add up; a fake tensor has no value for the log, and no gradient here."""
    found = []
    monkeypatch.setattr(common, "epoch_entry", lambda sums, steps: found.append(sums))
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: found.append(self))
    monkeypatch.setattr(cbsa, "endless", iter)
    return found


@pytest.mark.parametrize("name", ["sst", "cbsa", "scinet"])
def test_a_step_on_cuda_leaves_no_tensor_on_the_cpu(name, totals):
    getattr(World(), name)()
    loss, sums = totals
    assert loss.device.type == "cuda" and len(sums) >= 5
    assert {x.device.type for x in sums.values()} == {"cuda"}


@pytest.mark.parametrize(
    ("name", "left"),
    [("sst", "adjacency"), ("sst", "prototypes"), ("cbsa", "what"), ("cbsa", "member"),
     ("scinet", "embedded"), ("scinet", "mask")],
)  # fmt: skip
def test_a_tensor_left_on_the_cpu_is_found(name, left, totals):
    with pytest.raises(RuntimeError, match="same device"):
        getattr(World(), name)(left)
