# SPDX-License-Identifier: MIT
"""A step on "cuda", of fake tensors that have a device and no values: no GPU is needed. And what
needs one."""

import inspect
import json
import types

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

import cbsa
import scinet
import sst
from tests.toy import world

B, C = 8, 16
SCRIPTS = dict(sst=sst, cbsa=cbsa, scinet=scinet)
each = pytest.mark.parametrize("name", SCRIPTS)
READS = {  # what reads a value, or a number of values, from the device
    "_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "_unique2", "unique_dim",
    "repeat_interleave", "equal", "bincount",
}  # fmt: skip


class Finished(Exception):
    """The last step is over."""


class Waits(TorchDispatchMode):
    """Notes each operation for which the CPU waits until the device has caught up."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        on_device = any(is_on_device(x) for x in args)
        waits = name in READS and on_device
        if name in ("index", "index_put", "index_put_"):
            waits |= any(is_on_device(x) and x.dtype == torch.bool for x in args[1])
        if name == "_to_copy":
            goes = torch.device(kwargs.get("device") or args[0].device).type == "cuda"
            waits |= goes != on_device and not (goes and kwargs.get("non_blocking"))
        if name == "copy_":
            apart = is_on_device(args[0]) != is_on_device(args[1])
            waits |= apart and not (is_on_device(args[0]) and args[2:] == (True,))
        if waits:
            self.found.append(name)
        return function(*args, **kwargs)


def is_on_device(x):
    return isinstance(x, torch.Tensor) and x.device.type == "cuda"


class Steps(list):
    """Batches of a loader; between the first and the end, waits are noted."""

    def __init__(self, batches, waits):
        super().__init__(batches)
        self.waits = waits
        self.dataset = range(B)

    def __iter__(self):
        self.waits.__enter__()
        yield from super().__iter__()
        self.waits.__exit__(None, None, None)
        raise Finished


def send(mode, net, stays=""):
    """As net.to("cuda"), but for the parameter or buffer of a name."""
    for module in net.modules():
        for values in (module._parameters, module._buffers):
            for name, x in values.items():
                if x is not None:
                    fake = mode.from_tensor(x, static_shapes=True).detach()
                    moved = fake if name == stays else fake.to("cuda")
                    if isinstance(x, torch.nn.Parameter):
                        moved = torch.nn.Parameter(moved, x.requires_grad)
                    values[name] = moved
    return net


def prepare(name, module, precision, mode, waits):
    """The network, its arguments, and two steps of training and of evaluation."""
    flags = ["--weights", "none", "--precision", precision, "--epochs", "20"]
    if name != "sst":
        flags += ["--size", "64"]
    args, _ = module.parse_args(flags)
    y = torch.randint(-1, 2, (B, C)).to(torch.int8)
    known = y if name == "cbsa" else y.numpy()
    net = module.build(args, world.CLASSES, known, None)
    images = torch.zeros(B, 3, args.size, args.size, dtype=torch.uint8)
    index = torch.arange(B)
    batch = [images, index]
    if name == "sst":
        batch = [images, y, index, *module.choose_pairs(y)]
    if name == "scinet":
        batch = [images, images, images, index]
    fake = [mode.from_tensor(x, static_shapes=True) for x in batch]
    plain = [mode.from_tensor(x, static_shapes=True) for x in (images, index)]
    return args, known, net, Steps([fake] * 2, waits), Steps([plain] * 2, waits)


def train(name, module, net, loader, y, args, mode):
    optimizer = torch.optim.Adam(net.parameters())
    if name == "sst":
        return module.train_one_epoch(net, net, loader, optimizer, 20, args)
    if name == "scinet":
        known = (y, *np.random.rand(2, B, C).astype("float32"))
        return module.train_one_epoch(net, net, loader, optimizer, known, args)
    labels = (y, y[:, : net.member.shape[1]].clone(), torch.ones(B, 1, dtype=torch.int8))
    labels = [mode.from_tensor(x, static_shapes=True) for x in labels]
    teacher = net
    return module.train_one_epoch(net, net, teacher, loader, optimizer, labels, 2, args)


def waits_of(name, precision, monkeypatch, module=None, stays=""):
    """What a training step and a step of the evaluation wait for."""
    module = module or SCRIPTS[name]
    waits = Waits()
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    args, y, net, steps, plain = prepare(name, module, precision, mode, waits)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # needs a device
    monkeypatch.setattr(module, "progress", lambda loader: loader)
    monkeypatch.setattr(module, "make_loader", lambda *given: plain)
    # without a GPU autocast does nothing, but for this
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with mode:
        send(mode, net, stays)
        with pytest.raises(Finished):
            train(name, module, net, steps, y, args, mode)
        with pytest.raises(Finished):
            module.evaluate(net, [""] * B, args)
    return waits.found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@each
def test_no_step_waits_for_the_device(name, precision, monkeypatch):
    assert waits_of(name, precision, monkeypatch) == []


def changed(name, line, place="        optimizer.zero_grad()\n"):
    """The script with a line more at a place in its loop."""
    source = inspect.getsource(SCRIPTS[name])
    assert source.count(place) == 1
    module = types.ModuleType(name)
    module.__file__ = SCRIPTS[name].__file__
    exec(source.replace(place, f"        {line}\n{place}"), vars(module))
    return module


@pytest.mark.parametrize(
    "line",
    [
        "loss.item()",
        "loss.tolist()",
        "loss.cpu()",
        "losses.nonzero()",
        "losses[losses > 0]",
        "torch.zeros(3).to(device)",
        "torch.tensor(0.5, device=device)",
    ],
)
@each
def test_a_wait_within_a_training_step_is_seen(name, line, monkeypatch):
    assert len(waits_of(name, "fp32", monkeypatch, changed(name, line))) == 2  # one a step


@each
def test_a_wait_within_the_evaluation_is_seen(name, monkeypatch):
    module = changed(name, "views.sum().item()", dict(
        sst="        logits[index] = net(views)[0]\n",
        cbsa="        scores[index] = torch.cat(net(views), dim=1)\n",
        scinet="        found[index] = torch.cat(net(views, text), dim=1)\n",
    )[name])  # fmt: skip
    assert len(waits_of(name, "fp32", monkeypatch, module)) == 2


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("sst", "adjacency"),
        ("sst", "prototypes"),
        ("cbsa", "what"),
        ("cbsa", "member"),
        ("scinet", "tokens"),
    ],
)
def test_a_tensor_left_on_the_cpu_is_found(name, stays, monkeypatch):
    with pytest.raises(RuntimeError, match="same device"):
        waits_of(name, "fp32", monkeypatch, stays=stays)


@each
def test_a_device_that_is_not_there_is_named(name, run):
    status, _, error = run(name, "--device", "cuda:9")
    assert status == 1
    assert error.splitlines()[-1].startswith("error: --device cuda:9 cannot be used: ")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("flags", ["--precision fp32", "--precision bf16", "--compile"])
@each
def test_an_epoch_on_a_gpu_ends_near_one_on_the_cpu(name, flags, run, tmp_path):
    ends = {}
    for device in ("cpu", "cuda"):
        given = f"--epochs 1 --device {device} --out {device}".split()
        given += flags.split() if device == "cuda" else []
        status, out, error = run(name, *given)
        assert status == 0, error
        assert out.startswith(f"device: {device}")
        ends[device] = json.loads((tmp_path / device / "log.jsonl").read_text().splitlines()[-1])
    assert abs(ends["cpu"]["mAP"] - ends["cuda"]["mAP"]) < 3
    assert ends["cuda"]["peak_memory_gb"] > 0
