# SPDX-License-Identifier: MIT
"""What must hold for any labels: order, scale, one class, one image, all or nothing known."""

import math

import numpy as np
import pytest
import torch

import cbsa
import common
import scinet
import sst
from tests.conftest import double, unit

CASES = 100
SHAPES = [(1, 1), (1, 7), (9, 1), (2, 2), (6, 5), (40, 12)]  # images, classes
DENSITIES = [0.0, 0.1, 0.5, 1.0]  # proportion of labels known


def cases():
    """(generator, y (images, C)) over all shapes and densities."""
    for case in range(CASES):
        rng = torch.Generator().manual_seed(case)
        shape, known = SHAPES[case % len(SHAPES)], DENSITIES[case // len(SHAPES) % len(DENSITIES)]
        y = torch.where(torch.rand(shape, generator=rng) < 0.4, 1, -1)
        yield rng, torch.where(torch.rand(shape, generator=rng) < known, y, 0)


def orders(rng, y):
    return (torch.randperm(n, generator=rng) for n in y.shape)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# logits (B, C), features (B, C, D), y -> scalar
LOSSES = {
    "sst.partial_bce": lambda x, f, y: sst.partial_bce(x, y),
    "sst.cst_loss": lambda x, f, y: sst.cst_loss(f, y),
    "cbsa.asymmetric_loss": lambda x, f, y: cbsa.asymmetric_loss(x, y),
    "scinet.weighted_bce": lambda x, f, y: scinet.weighted_bce(
        x, (y == 1).double(), (y != 0).double()
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_hang_on_the_order_and_see_known_labels_only(name):
    for rng, y in cases():
        x, f = double(rng, *y.shape), double(rng, *y.shape, 3)
        i, c = orders(rng, y)
        loss = LOSSES[name]
        value = loss(x.requires_grad_(), f.requires_grad_(), y)
        assert torch.isfinite(value) and value >= 0
        close(loss(x[i], f[i], y[i]), value)
        close(loss(x[:, c], f[:, c], y[:, c]), value)
        if not (y != 0).any():
            assert value == 0
        gradients = torch.autograd.grad(value, (x, f), allow_unused=True)
        for gradient in gradients:
            assert gradient is None or not gradient[y == 0].any()
        noise = torch.where(y == 0, double(rng, *y.shape) * 1e3, 0)
        close(loss(x + noise, f + noise[..., None], y), value)


def test_sst_pseudo_labels_follow_the_order_and_fill_unknown_entries_only():
    for rng, y in cases():
        f, prototype = double(rng, *y.shape, 3), double(rng, y.shape[1], 3)
        p = torch.rand(len(y), y.shape[1], y.shape[1], generator=rng, dtype=torch.float64)
        i, c = orders(rng, y)
        intra = sst.intra_pseudo_labels(p, y, 0.6)
        cross = sst.cross_pseudo_labels(f, y, prototype, 0.3)
        for guess in (intra, cross):
            assert torch.equal(guess[y != 0], y[y != 0]) and set(guess[y == 0].tolist()) <= {0, 1}
        assert torch.equal(sst.intra_pseudo_labels(p[i], y[i], 0.6), intra[i])
        moved = sst.intra_pseudo_labels(p[:, c][:, :, c], y[:, c], 0.6)
        assert torch.equal(moved, intra[:, c])
        assert torch.equal(sst.cross_pseudo_labels(7 * f[i], y[i], prototype, 0.3), cross[i])
        assert torch.equal(sst.cooccurrence(y[:, c]), sst.cooccurrence(y)[c][:, c])
        assert not y.any() or torch.equal(sst.cooccurrence(y[i]), sst.cooccurrence(y))


def test_cbsa_thresholds_follow_order_and_any_growing_scale():
    for rng, y in cases():
        score = double(rng, 30, y.shape[1])
        i, c = torch.randperm(30, generator=rng), torch.randperm(y.shape[1], generator=rng)
        for one in (False, True):
            guess = cbsa.pseudo_labels(score, y, one)
            assert torch.equal(cbsa.pseudo_labels(score[i], y, one), guess[i])
            assert torch.equal(cbsa.pseudo_labels(score[:, c], y[:, c], one), guess[:, c])
            assert torch.equal(cbsa.pseudo_labels(torch.exp(5 * score), y, one), guess)
            number = (cbsa.class_prior(y) * 30).round() * (y == 1).any(0)
            assert (guess == 1).sum() == number.sum()


def test_fusion_follows_the_order_and_keeps_what_is_known():
    for rng, y in cases():
        n, C = y.shape
        if n < 3:
            continue
        s, f = torch.rand(n, C, generator=rng, dtype=torch.float64), unit(rng, n, 4).float()

        def fused(s, y, f, n=n, **lambdas):
            a_n = scinet.instance_graph(f, min(3, n - 1), 0.3).double()
            filled = torch.where(y == 0, s, (y == 1).double())
            a_q = scinet.label_graph(filled, 5).double()
            return scinet.fuse(s, y, a_n, a_q, **lambdas)

        lambdas = dict(lambda_n=1.0, lambda_q=0.1)
        p = fused(s, y, f, **lambdas)
        assert (p >= 0).all() and (p <= 1).all()
        assert torch.equal(p[y != 0], (y[y != 0] == 1).double())
        assert torch.equal(fused(s, y, f, lambda_n=0, lambda_q=0)[y == 0], s[y == 0])
        i, c = orders(rng, y)
        torch.testing.assert_close(fused(s[i], y[i], f[i], **lambdas), p[i], rtol=0, atol=1e-6)
        moved = fused(s[:, c], y[:, c], f, **lambdas)
        torch.testing.assert_close(moved, p[:, c], rtol=0, atol=1e-6)


def test_ist_loss_does_not_hang_on_the_order():
    for rng, y in cases():
        net, f = sst.PairNet(3, (4, 2)).double(), double(rng, *y.shape, 3)
        i, c = orders(rng, y)
        every = torch.ones(len(y), y.shape[1], y.shape[1], dtype=torch.bool)
        logits = net(f, every)
        for negatives in ("both", "all"):
            target = sst.pair_targets(y, negatives)
            loss = sst.ist_loss(logits, target)
            close(sst.ist_loss(net(f, target != 0), target), loss)
            target_i = sst.pair_targets(y[i], negatives)
            close(sst.ist_loss(net(f[i], every), target_i), loss)
            moved = sst.pair_targets(y[:, c], negatives)
            assert torch.equal(moved, target[:, c][:, :, c])
            close(sst.ist_loss(logits[:, c][:, :, c], moved), loss)


def test_metrics_follow_the_order_and_any_growing_scale():
    for rng, y in cases():
        truth = torch.where(y == 1, 1, -1).numpy()
        logits = double(rng, *y.shape).numpy()
        i, c = (order.numpy() for order in orders(rng, y))
        m = common.multilabel_metrics(logits, truth)
        for values in (
            common.multilabel_metrics(logits[i], truth[i]),
            common.multilabel_metrics(logits[:, c], truth[:, c]),
            common.multilabel_metrics(3 * logits, truth),
        ):
            for name in m:
                assert values[name] == pytest.approx(m[name], nan_ok=True, abs=1e-9), name
        ap = common.average_precision(logits, truth)
        assert np.isnan(ap).sum() == m["empty_classes"] == (truth == -1).all(0).sum()
        assert math.isnan(m["mAP"]) == (truth == -1).all()
        best = common.multilabel_metrics(truth, truth)
        assert math.isnan(best["mAP"]) or best["mAP"] == best["OF1"] == pytest.approx(100)


def test_masks_hide_the_known_proportion_of_anything():
    for case, (_, y) in enumerate(cases()):
        labels, known = torch.where(y == 0, -1, y).numpy().astype(np.int8), (1 + case) / CASES
        hidden = common.hide_entries(labels, known, case)
        kept = hidden != 0
        assert (hidden[kept] == labels[kept]).all() and hidden.shape == labels.shape
        assert ((common.hide_entries(-labels, known, case) != 0) == kept).all()
        more = common.hide_entries(labels, min(1, known + 0.1), case) != 0
        assert (more >= kept).all() and (known < 1 or kept.all())
        rows = common.hide_images(labels, known, case)
        whole = (rows != 0).all(1)
        assert (whole == (rows != 0).any(1)).all() and (rows[whole] == labels[whole]).all()
