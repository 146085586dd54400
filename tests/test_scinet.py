# SPDX-License-Identifier: MIT
"""scinet.py against literal loops, its objective, and what short runs leave behind."""

import inspect
import math
import tempfile
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from torch import nn

import scinet
from common import hide_entries
from tests.conftest import Batches, double, random_images, random_labels, same, unit
from tests.toy import world

B, C, D, N = 6, 5, 128, 9  # D: of the toy CLIP
LEARNED = {"clip.token_embedding.context", "down.weight", "up.weight", "beta", "gamma", "bias"}
IMAGES, TRUTH, _ = world.scenes(24, 0)
FLAGS = "--epochs 2 --lambda-s 0.5 --operations 3 --erase 0.5".split()

def uniform(rng, *shape):
    return torch.rand(*shape, generator=rng, dtype=torch.float64)

def new_net(*flags):
    torch.manual_seed(0)
    return scinet.build(scinet.parse_args(flags)[0], world.CLASSES, None, None).eval()

def recorded(calls, function, *given):
    calls.append((given, function(*given)))
    return calls[-1][1]

def train(*flags, truth=TRUTH):
    """A run on 24 scenes: settings, checkpoint, calls of `complete` and of `train_one_epoch`."""
    parts = dict(train=(world.CLASSES, IMAGES, truth), test=(world.CLASSES, IMAGES[:8], TRUTH[:8]))
    calls = dict(complete=[], train_one_epoch=[])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(scinet, "load_data", lambda name, root, part, **_: parts[part])
        for name in calls:
            patch.setattr(scinet, name, partial(recorded, calls[name], getattr(scinet, name)))
        small = "--size 64 --batch-size 8 --epochs 1 --known 0.3".split()
        args, _ = scinet.parse_args([*small, *flags, "--out", f"{folder}/run"])
        scinet.main(args, None)
        return args, torch.load(f"{folder}/run/last.pt", weights_only=True), *calls.values()

@pytest.fixture(scope="module")
def trained():
    return train(*FLAGS)

# ------------------------------------------------------------------------------------------- model
def literal_logits(f, z, t, w, net):
    logits = torch.zeros(len(f), len(t), dtype=f.dtype)
    for i in range(len(f)):
        for c in range(len(t)):
            t_ic = t[c] + w @ f[i]
            weights = [torch.exp(t[c] @ position / 0.1) for position in z[i]]
            attended = sum(a * position for a, position in zip(weights, z[i], strict=True))
            f_ic = f[i] + net.beta * attended / sum(weights)
            halves = f[i] @ t_ic / t_ic.norm() + f_ic @ t[c] / f_ic.norm()
            logits[i, c] = net.gamma / 2 * halves + net.bias[c]
    return logits

def test_logits_are_two_halves_as_in_literal_loops(rng, monkeypatch):
    net = new_net("--rank", "3", "--beta", "0.7").double()
    f, z, t = unit(rng, B, D), unit(rng, B, N, D), unit(rng, 16, D)
    net.up.weight.data = double(rng, D, 3)
    net.bias.data = double(rng, 16)
    monkeypatch.setattr(scinet, "clip_features", lambda visual, images: (f, z))
    expected = literal_logits(f, z, t, net.up.weight @ net.down.weight, net)
    torch.testing.assert_close(net(None, t), (expected, f))

def test_the_prompt_starts_as_clips_text_features_of_a_photo_of_a_class():
    clip, tokenize, _ = scinet.load_clip("local-dir:tests/toy/clip", "openai", 0)
    tokens = tokenize([f"a photo of a {name}" for name in world.CLASSES])
    net = new_net()
    torch.testing.assert_close(net.text(), clip.encode_text(tokens, normalize=True))
    assert net.tokens.shape == (16, 8)  # of 16 positions: start, six words, end

def test_w_starts_at_zero_and_can_leave_it():
    net = new_net()
    assert not net.up.weight.any()
    assert net.down.weight.all()

def test_only_prompt_w_beta_gamma_and_bias_learn_and_the_rest_keeps_its_bits(trained):
    before = new_net("--size", "64")
    assert {name for name, p in before.named_parameters() if p.requires_grad} == LEARNED
    after = trained[1]["model"]
    assert len(trained[1]["optimizer"]["state"]) == len(LEARNED)
    assert {k for k, v in before.state_dict().items() if not torch.equal(v, after[k])} == LEARNED

@pytest.mark.parametrize("flag", ["--rank", "--beta"])
def test_a_half_that_is_switched_off_stays_clips_own_score(flag, rng):
    args, checkpoint, *_ = train(flag, "0")
    net = scinet.build(args, world.CLASSES, None, checkpoint).eval()
    images = random_images(rng, 64)
    f, z = scinet.clip_features(net.clip.visual, images)
    w = torch.zeros(D, D) if flag == "--rank" else net.up.weight @ net.down.weight
    assert flag == "--rank" or net.beta == 0
    expected = literal_logits(f, z, net.text(), w, net)
    torch.testing.assert_close(net(images)[0], expected, rtol=1e-4, atol=1e-4)

# ------------------------------------------------------------------------------------------ losses
def test_weighted_bce_is_a_mean_over_the_entries_that_have_a_weight(rng):
    logits, target, weight = double(rng, B, C), uniform(rng, B, C), uniform(rng, B, C)
    weight[weight < 0.5] = 0
    total = 0
    for x, q, w in zip(logits.flatten(), target.flatten(), weight.flatten(), strict=True):
        p = 1 / (1 + math.exp(-x))
        total -= w * (q * math.log(p) + (1 - q) * math.log(1 - p))
    ours = scinet.weighted_bce(logits, target, weight)
    torch.testing.assert_close(ours, total / (weight > 0).sum())
    assert scinet.weighted_bce(logits, target, 0 * weight) == 0

def test_consistency_loss_against_a_literal_loop(rng):
    student, y, thresholds = double(rng, 20, C), random_labels(rng, 20), torch.linspace(0.5, 0.9, C)
    teacher, fused, weight = uniform(rng, 3, 20, C)
    target, kept = torch.zeros(2, 20, C, dtype=torch.float64)
    for i in range(20):
        for c in range(C):
            q = (fused[i, c] + teacher[i, c]) / 2
            target[i, c] = q if y[i, c] == 0 else y[i, c] == 1
            if y[i, c] != 0 or q >= thresholds[c] or 1 - q > thresholds[c]:
                kept[i, c] = weight[i, c]
    ours = scinet.consistency_loss(student, teacher, fused, y, thresholds, weight)
    torch.testing.assert_close(ours, scinet.weighted_bce(student, target, kept))

def test_difficulty_weight_falls_with_the_jensen_shannon_divergence_on_unknown_entries(rng):
    p, q = uniform(rng, 2, B, C).numpy()
    p[0, :2] = 0
    q[0, :2] = 1
    y = random_labels(rng)
    d = np.mean(jensenshannon([p, 1 - p], [q, 1 - q]) ** 2, axis=1, keepdims=True)
    ours = scinet.difficulty_weight(torch.tensor(p), torch.tensor(q), y)
    assert ours.numpy() == pytest.approx(np.where(y == 0, 1 - d / math.log(2), 1))

# --------------------------------------------------------------------------------- graphs, fusion
@pytest.mark.parametrize(("n", "neighbours"), [(40, 4), (4, 10)])
def test_instance_graph_is_a_normalised_gaussian_of_the_nearest(n, neighbours, rng):
    f = unit(rng, n, 8).numpy()
    f[1] = f[0]  # the same image twice: neighbours at distance 0
    w = np.zeros((n, n))
    for i in range(n):
        distance = np.linalg.norm(f - f[i], axis=1)
        nearest = [j for j in np.argsort(distance) if j != i][:neighbours]
        w[i, nearest] = np.exp(-(distance[nearest] ** 2) / (2 * 0.5**2))
    w = (w + w.T) / 2
    expected = np.eye(n) - w / np.sqrt(np.outer(w.sum(0), w.sum(0)))
    ours = scinet.instance_graph(f, neighbours, 0.5).toarray()
    assert ours == pytest.approx(expected, abs=1e-9)

def test_label_graph_is_of_the_positive_correlations(rng):
    p = uniform(rng, 200, C).numpy()
    p[:, 1] += p[:, 0]
    p[:, 3] += p[:, 1] - p[:, 2]
    r = np.corrcoef(p.T).clip(min=0) * (1 - np.eye(C))
    expected = np.eye(C) - r / np.sqrt(np.outer(r.sum(0), r.sum(0)))
    assert scinet.label_graph(p) == pytest.approx(expected)

@pytest.mark.parametrize("labels", [slice(0, 2), slice(2, 3)])
def test_what_resembles_nothing_keeps_its_scores(labels, rng):
    """Images far from all others; labels that do not vary, and one that is alone."""
    s = uniform(rng, 20, C).numpy()
    s[:, :2] = 0, 1
    s = s[:, labels]
    l_n = scinet.instance_graph(unit(rng, 20, 8).numpy(), 4, sigma=0.001)
    assert scinet.fuse(s, 0 * s, l_n, scinet.label_graph(s), 0.5, 0.5) == pytest.approx(s)

def case(rng, n=30):
    """Scores, labels and both graphs."""
    s = uniform(rng, n, C).numpy()
    y = random_labels(rng, n).numpy()
    l_q = scinet.label_graph(np.where(y == 0, s, y == 1))
    return s, y, scinet.instance_graph(unit(rng, n, 8).numpy(), 4, 0.5), l_q

def test_fusion_is_the_least_of_its_objective_between_zero_and_one(rng):
    """Where a bound does not bind, the gradient in P of the objective is 0."""
    s, y, l_n, l_q = case(rng)
    p = torch.tensor(scinet.fuse(s, y, l_n, l_q, 2.0, 0.8, steps=300), requires_grad=True)
    s, y, l_n, l_q = map(torch.tensor, (s, y, l_n.toarray(), l_q))
    near = (p - s).square().sum()
    smooth = 2.0 * (p.T @ l_n @ p).trace() + 0.8 * (p @ l_q @ p.T).trace()
    ((near + smooth) / 2).backward()
    unknown = y == 0
    torch.testing.assert_close((p - p.grad).clip(0, 1)[unknown], p[unknown])
    assert 0 < (p[unknown] == 1).sum() < unknown.sum() / 2
    assert torch.equal(p[~unknown], (y == 1)[~unknown].double())

def test_a_step_of_fusion_leaves_at_most_the_stated_part_of_the_error(rng):
    s, y, l_n, l_q = case(rng)
    end = scinet.fuse(s, y, l_n, l_q, 0.3, 0.4, steps=100)
    errors = [np.linalg.norm(scinet.fuse(s, y, l_n, l_q, 0.3, 0.4, k) - end) for k in range(12)]
    assert errors[0] > 0.1
    assert all(b <= a * 0.7 / 1.7 + 1e-12 for a, b in zip(errors, errors[1:], strict=False))

@pytest.mark.parametrize("tau", [0.8, 1.0])
def test_class_thresholds_follow_their_formula_and_are_never_under_a_half(tau, rng):
    y = random_labels(rng, 200).numpy()
    q = uniform(rng, 200, C).numpy() ** np.array([0.1, 0.12, 0.2, 2, 9])
    count = [sum(q[i, c] >= tau and y[i, c] == 0 for i in range(200)) for c in range(C)]
    a = [number / max(1, *count) for number in count]
    expected = [max(0.5, tau * part / (2 - part)) for part in a]
    assert scinet.class_thresholds(q, y, tau) == pytest.approx(expected)
    assert len({*expected}) == (4 if tau < 1 else 1)  # no belief reaches 1

def test_complete_fuses_by_correlations_with_the_known_labels_filled_in(rng):
    s, y, l_n, l_q = case(rng, 200)
    args = Namespace(lambda_n=0.6, lambda_q=0.2, tau=0.6)
    fused, q, thresholds = scinet.complete(s, y, l_n, args)
    assert fused == pytest.approx(scinet.fuse(s, y, l_n, l_q, 0.6, 0.2), abs=1e-6)
    assert q == pytest.approx((fused + s) / 2)
    assert (thresholds == scinet.class_thresholds(q, y, 0.6)).all()

# ---------------------------------------------------------------------------------------- training
class Given(nn.Module):
    """A network whose logits are its images, with a number that learns for each view."""

    def __init__(self):
        super().__init__()
        self.clip = nn.Identity()
        self.bias = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, images):
        return (images.unflatten(0, (3, -1)) + self.bias).flatten(0, 1), None

def step(rng, *flags):
    """A step of SGD on given views: losses and gradients, and what they should be."""
    views = torch.randn(3, B, C, generator=rng)
    fused = torch.rand(B, C, generator=rng)
    y = random_labels(rng)
    index = torch.arange(B).flip(0)
    args, _ = scinet.parse_args(["--lambda-u", "0.7", *flags])
    net = Given()
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    known = (y.numpy(), fused.numpy(), np.full(C, 0.6))
    loader = Batches([(*views, index)])
    entry, scores = scinet.train_one_epoch(net, net, loader, optimizer, known, args)
    p = torch.sigmoid(views)
    assert same(torch.tensor(scores), p[0].flip(0))
    added = torch.zeros(3, 1, 1, requires_grad=True)
    weak, medium, strong = views + added
    y = y.flip(0)
    weight = scinet.difficulty_weight(p[0], p[2], y)
    given = (fused.flip(0), y, 0.6, weight)
    losses = dict(
        loss_known=F.binary_cross_entropy_with_logits(weak[y != 0], (y[y != 0] == 1).float()),
        loss_medium=scinet.consistency_loss(medium, p[0], *given),
        loss_strong=scinet.consistency_loss(strong, p[1], *given),
        loss_self=scinet.weighted_bce(weak, (p[0] + p[1] + p[2]) / 3, weight * (y == 0)),
    )
    loss = losses["loss_known"] + 0.7 * (losses["loss_medium"] + losses["loss_strong"])
    (loss + args.lambda_s * losses["loss_self"]).backward()
    return entry, losses, -net.bias.detach(), added.grad

def test_weak_teaches_medium_and_medium_teaches_strong(rng):
    entry, losses, *_ = step(rng)
    for name, loss in losses.items():
        assert entry[name] == pytest.approx(loss.item(), rel=1e-5) != 0

def test_no_gradient_goes_through_the_probabilities_of_a_teacher(rng):
    *_, ours, expected = step(rng, "--lambda-s", "0.5")
    torch.testing.assert_close(ours, expected)

@pytest.mark.parametrize(("flags", "factor"), [([], 0), (["--lambda-s", "0.5"], 0.5)])
def test_lambda_s_adds_the_self_distillation_which_is_off_by_default(flags, factor, rng):
    entry = step(rng, *flags)[0]
    loss = entry["loss_known"] + 0.7 * (entry["loss_medium"] + entry["loss_strong"])
    assert entry["loss"] == pytest.approx(loss + factor * entry["loss_self"])

def test_the_order_of_the_images_depends_on_the_seed(trained):
    orders = []
    for _, _, _, calls in (trained, train("--seed", "1")):
        (_, _, loader, *_), _ = calls[0]
        orders.append([*loader.sampler])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])

def test_medium_and_strong_views_are_ever_harder(trained):
    (_, _, loader, *_), _ = trained[3][0]
    last = [view.transforms[-3::2] for view in loader.dataset.views]
    assert [(augment.num_ops, erase.p) for augment, erase in last] == [(0, 0), (1, 0.25), (3, 0.5)]

def test_at_the_start_the_networks_mean_logits_are_those_of_the_prior_of_known_labels():
    args, checkpoint, completed, _ = train("--lr", "1e-9", "--head-lr", "0")
    (s, y, *_), _ = completed[0]
    net = scinet.build(args, world.CLASSES, None, checkpoint)
    logits = scinet.evaluate(net, IMAGES, args)[0]
    expected = np.log(((y == 1).sum(0) + 0.5) / ((y == -1).sum(0) + 0.5))
    assert logits.numpy().mean(0) == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(torch.sigmoid(logits), torch.tensor(s))

def test_scores_are_a_mean_over_start_and_epochs_which_the_checkpoint_keeps(trained):
    _, checkpoint, completed, epochs = trained
    start, later = (given[0] for given, _ in completed)
    first, second = (result[1] for _, result in epochs)
    assert later == pytest.approx((start + first) / 2)
    assert checkpoint["scores"].numpy() == pytest.approx((start + first + second) / 3)

def outcome(run):
    """Losses, pseudo-labels, weights and scores, as what `same` compares."""
    _, checkpoint, completed, _ = run
    losses = [[entry[k] for k in entry if "loss" in k] for entry in checkpoint["log"]]
    pseudo = [torch.tensor(x) for _, result in completed for x in result]
    return losses, pseudo, [checkpoint[part] for part in ("model", "scores", "optimizer")]

def test_flipping_every_hidden_label_leaves_all_bits_as_they_are(trained):
    y = hide_entries(TRUTH, 0.3, 0)
    flipped = train(*FLAGS, truth=np.where(y == 0, -TRUTH, TRUTH))
    assert same(outcome(flipped), outcome(trained))

@pytest.mark.parametrize("unknown", [0, 1])
def test_everything_known_or_nothing_of_a_class_leaves_losses_and_weights_finite(unknown):
    truth = TRUTH.copy()
    truth[:, :unknown] = 0
    _, checkpoint, *_ = train("--known", "1", "--lambda-s", "0.5", truth=truth)
    losses = [entry[k] for entry in checkpoint["log"] for k in entry if "loss" in k]
    assert np.isfinite(losses).all()
    assert all(value.isfinite().all() for value in checkpoint["model"].values())

def test_losses_and_pseudo_labels_run_alone_when_they_are_copied_out(rng):
    section = inspect.getsource(scinet).split("\n# ---")[2]
    imports = "math np torch F partial kneighbors_graph laplacian normalize".split()
    copied = {name: getattr(scinet, name) for name in imports}
    exec(f"#{section}", copied)
    student, p = double(rng, 20, C), uniform(rng, 20, C)
    y, f = random_labels(rng, 20), unit(rng, 20, 8)
    args = Namespace(lambda_n=0.6, lambda_q=0.2, tau=0.6)
    found = []
    for m in (scinet, Namespace(**copied)):
        l_n = m.instance_graph(f.numpy(), 4, 0.3)
        fused, _, t = map(torch.tensor, m.complete(p.numpy(), y.numpy(), l_n, args))
        weight = m.difficulty_weight(p, fused, y)
        found.append((fused, t, m.consistency_loss(student, p, fused, y, t, weight)))
    assert same(*found)
