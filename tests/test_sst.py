# SPDX-License-Identifier: MIT
"""Each equation of SST against a literal loop in float64, and the traps of partial labels."""

import math
import sys

import numpy as np
import pytest
import torch

import common
import sst
from tests.conftest import double, random_images, random_labels

B, C, D = 6, 5, 7


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def same_value_and_gradient(ours, literal, x):
    """Both functions of x (a leaf in float64) agree in value and in gradient."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    value_a, value_b = ours(a), literal(b)
    torch.testing.assert_close(value_a, value_b, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(v, leaf)[0] for v, leaf in ((value_a, a), (value_b, b))]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
    assert gradients[0].abs().sum() > 0


# ------------------------------------------------------------------------------------------ Eq. 1-4


def test_eq1_pair_net_equals_layers_on_concatenation(rng):
    net = sst.PairNet(C, D, (4, 3)).double()
    f = double(rng, B, C, D)
    logits = net(f)
    for n in range(B):
        for i in range(C):
            for j in range(i + 1, C):
                h = net.rest(net.first(torch.cat((f[n, i], f[n, j]))))
                torch.testing.assert_close(h[0], logits[n, i, j])
                assert logits[n, i, j] == logits[n, j, i]
    assert (logits.diagonal(dim1=1, dim2=2) == 0).all()


def test_eq2_intra_pseudo_labels(rng):
    y, p = random_labels(rng, 50), torch.rand(50, C, C, generator=rng, dtype=torch.float64)
    y[0] = 0  # nothing known
    ours, found = sst.intra_pseudo_labels(p, y, 0.6), 0
    for n in range(50):
        for i in range(C):
            positives = [j for j in range(C) if y[n, j] == 1]
            score = sum(p[n, i, j].item() for j in positives) / max(len(positives), 1)
            expected = 1 if y[n, i] == 0 and positives and score >= 0.6 else y[n, i].item()
            assert ours[n, i] == expected
            found += expected == 1 and y[n, i] == 0
    assert found > 5
    assert torch.equal(sst.intra_pseudo_labels(torch.ones_like(p), y, 1.0), y)


@pytest.mark.parametrize("negatives", ["both", "all"])
def test_eq4_pair_targets(rng, negatives):
    y = random_labels(rng, 40)
    target = sst.pair_targets(y, negatives)
    for n in range(40):
        for i in range(C):
            for j in range(C):
                a, b = y[n, i].item(), y[n, j].item()
                expected = 1 if a == b == 1 else -1 if negatives == "all" or a * b != 0 else 0
                assert target[n, i, j] == (0 if i == j else expected)


def test_eq3_eq4_ist_loss(rng):
    target = random_labels(rng, B, 10)

    def literal(x):
        terms = []
        for n in range(B):
            for k in range(10):
                p = 1 / (1 + torch.exp(-x[n, k]))
                if target[n, k] == 1:
                    terms.append(-((1 - p) ** 1) * torch.log(p))
                elif target[n, k] == -1:
                    p_m = torch.maximum(p - 0.05, torch.zeros_like(p))
                    terms.append(-(p_m**2) * torch.log(1 - p_m))
        return sum(terms) / len(terms)

    x = 3 * double(rng, B, 10)
    assert (torch.sigmoid(x) < 0.05).any()  # the clamp is at work
    same_value_and_gradient(lambda z: sst.ist_loss(z, target), literal, x)


@pytest.mark.parametrize("value", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_ist_loss_is_finite_at_extreme_logits(value):
    x = torch.full((2, 3), value, requires_grad=True)
    loss = sst.ist_loss(x, torch.tensor([[1, -1, 0]] * 2))
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


# ------------------------------------------------------------------------------------------ Eq. 5-8


def test_eq5_to_eq8_cst_loss(rng):
    y = random_labels(rng)

    def literal(f):
        attract, repel = [], []
        for n in range(B):
            for m in range(B):
                for c in range(C):
                    if n == m or y[n, c] == 0 or y[m, c] == 0:
                        continue
                    s = f[n, c] @ f[m, c] / (f[n, c].norm() * f[m, c].norm())
                    both = y[n, c] == 1 and y[m, c] == 1
                    (attract if both else repel).append(1 - s if both else 1 + s)
        return sum(attract) / len(attract) + sum(repel) / len(repel)

    same_value_and_gradient(lambda f: sst.cst_loss(f, y), literal, double(rng, B, C, D))


def test_eq6_cross_pseudo_labels(rng):
    y, f = random_labels(rng, 40), double(rng, 40, C, D) + 0.7
    y[y[:, 2] == 1, 2] = 0  # class 2 has no known positive
    positive = (y == 1).double()
    unit = torch.nn.functional.normalize(f, dim=-1)
    prototype = torch.einsum("bc,bcd->cd", positive, unit) / positive.sum(0).clamp(min=1)[:, None]
    ours, found = sst.cross_pseudo_labels(f, y, prototype, 0.3), 0
    for n in range(40):
        for c in range(C):
            bank = [f[m, c] for m in range(40) if y[m, c] == 1]
            cosines = [(f[n, c] @ g / (f[n, c].norm() * g.norm())).item() for g in bank]
            hit = y[n, c] == 0 and bank and sum(cosines) / len(cosines) >= 0.3
            assert ours[n, c] == (1 if hit else y[n, c])
            found += bool(hit)
    assert found > 5 and (ours[:, 2] == y[:, 2]).all()
    assert torch.equal(sst.cross_pseudo_labels(f, y, prototype, 1.0), y)


# ----------------------------------------------------------------------------------------- Eq. 9-11


def test_eq9_partial_bce(rng):
    y = random_labels(rng)
    y[0] = 0

    def literal(x):
        total = 0
        for n in range(B):
            known = sum(abs(int(v)) for v in y[n])
            for c in range(C):
                p = 1 / (1 + torch.exp(-x[n, c]))
                if y[n, c] == 1:
                    total = total - torch.log(p) / known
                elif y[n, c] == -1:
                    total = total - torch.log(1 - p) / known
        return total / B

    same_value_and_gradient(lambda x: sst.partial_bce(x, y), literal, double(rng, B, C))


def test_losses_without_labels_or_pairs_are_zero_not_nan(rng):
    f, logits = double(rng, B, C, D).requires_grad_(), double(rng, B, C).requires_grad_()
    pairs = double(rng, B, C, C).requires_grad_()
    nothing = torch.zeros(B, C, dtype=torch.int8)
    target = sst.pair_targets(nothing)
    losses = sst.partial_bce(logits, nothing), sst.cst_loss(f, nothing), sst.ist_loss(pairs, target)
    sum(losses).backward()
    assert all(loss == 0 for loss in losses)
    assert all((x.grad == 0).all() for x in (f, logits, pairs))
    one = nothing.clone()
    one[0, 0] = 1  # a single known positive makes no pair
    assert sst.cst_loss(f, one) == 0


def test_eq10_eq11_total_loss_of_a_step():
    """The logged loss is L_cls + lambda_1 L_ist + lambda_2 L_cst, and L_cls a sum over labels."""
    args, train, net = tiny_run("--batch-size 8 --limit 16 --lambdas 2 0.5")
    logs, _ = run_epochs(net, args, train, common.hide_entries(train[1], 0.5, 0), (14,), lr=0.0)
    log = logs[0]
    assert log["loss"] == pytest.approx(
        log["loss_cls"] + 2 * log["loss_ist"] + 0.5 * log["loss_cst"], rel=1e-5
    )
    assert log["loss_ist"] > 0 and log["loss_cst"] > 0
    args.no_ist = args.no_cst = True
    alone = run_epochs(net, args, train, common.hide_entries(train[1], 0.5, 0), (1,), lr=0.0)[0][0]
    args.no_ist = args.no_cst = False
    three = run_epochs(net, args, train, common.hide_entries(train[1], 0.5, 0), (1,), lr=0.0)[0][0]
    assert three["loss_cls"] == pytest.approx(3 * alone["loss"], rel=1e-5)  # no pseudo-label yet


def test_threshold_schedule():
    schedule = [sst.threshold(epoch, 0.75) for epoch in range(1, 21)]
    expected = [1.0] * 5 + [0.95 - 0.025 * k for k in range(8)] + [0.75] * 7
    assert schedule == pytest.approx(expected)


def test_cooccurrence_counts_known_labels_only(rng):
    y = random_labels(rng, 30)
    y[:, 3] = 0  # never known
    y[:, 4] = -1  # never present
    p = sst.cooccurrence(y)
    for i in range(C):
        for j in range(C):
            seen = sum(1 for r in y if r[i] == 1 and r[j] != 0)
            both = sum(1 for r in y if r[i] == 1 and r[j] == 1)
            assert p[i, j] == pytest.approx(0 if i == j or not seen else both / seen)
    assert p.isfinite().all()


# -------------------------------------------------------------------------------------------- model


def tiny_run(flags="", seed=0):
    """Arguments, training images and labels, and a network with random weights."""
    args = sst.parse_args([*flags.split(), "--weights", "none"])[0]
    classes, train, _ = common.load_data("toy", None, args.limit)
    torch.manual_seed(seed)
    return args, train, sst.build(args, classes, torch.rand(16, 16))


def run_epochs(net, args, train, y, epochs=(40, 41), lr=None):  # late: thresholds at their lowest
    """Log entries, and the state at the end."""
    data = common.ImageDataset(train[0], y, common.make_transform(args.size, args.crops))
    loader = common.make_loader(data, args, train=True)
    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, args.lr if lr is None else lr)
    logs = []
    for epoch in epochs:
        torch.manual_seed(epoch if lr is None else 0)
        more = torch.tensor(train[1]), epoch, args
        logs.append(sst.train_one_epoch(net, loader, optimizer, *more))
    return logs, net.state_dict()


def test_semantic_decoupling_attends_over_positions(rng):
    module = sst.SemanticDecoupling(torch.randn(C, 300), D).double()
    x = double(rng, 2, 4, D)
    f = module(x)
    for b in range(2):
        for c in range(C):
            word = module.word.weight @ module.words[c]
            scores = [
                module.attention(torch.tanh(module.image.weight @ x[b, n] * word)) for n in range(4)
            ]
            weight = torch.softmax(torch.cat(scores), 0)
            expected = sum(weight[n] * x[b, n] for n in range(4))
            torch.testing.assert_close(f[b, c], expected)


def test_pairs_are_not_computed_at_test_time():
    _, train, net = tiny_run("--limit 4")
    images = torch.tensor(train[0]).permute(0, 3, 1, 2)
    assert net.train()(images)[2].shape == (4, 16, 16)
    assert net.eval()(images)[2] is None


@pytest.mark.parametrize("learns", ["last", "all", "none"])
def test_stages_of_the_trunk_learn_as_told(learns):
    _, _, net = tiny_run(f"--limit 4 --train-trunk {learns}")
    assert [len(net.frozen), len(net.trained)] == dict(last=[3, 2], all=[0, 5], none=[5, 0])[learns]
    assert not any(p.requires_grad for p in net.frozen.parameters())
    assert all(p.requires_grad for p in net.trained.parameters())
    net.train()  # the toy recipe keeps the batch statistics
    assert not any(m.training for part in (net.frozen, net.trained) for m in part.modules())


def test_batch_norms_of_the_trained_stage_follow_the_flag():
    _, _, net = tiny_run("--limit 4")
    net.frozen_bn = False  # the recipe of real data
    net.train()
    assert all(m.training for m in net.trained)
    assert not any(m.training for m in net.frozen.modules())
    assert not any(m.training for m in net.eval().trained.modules())


def test_a_large_map_is_pooled_and_a_small_one_is_not(rng):
    args, _, net = tiny_run("--limit 4 --pool 2")
    seen = []
    net.sarl.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    for size in (64, 48):  # maps of 8 and of 6 positions a side
        net.eval()(random_images(rng, size, 1))
    assert seen == [16, 36]


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "resnet50"])
def test_torchvision_trunks_split_at_the_last_stage(arch):
    frozen, trained, channels = sst.build_trunk(arch, "none")
    shape = trained(frozen(torch.zeros(1, 3, 64, 64))).shape
    assert shape == (1, channels, 2, 2) and frozen(torch.zeros(1, 3, 64, 64)).shape[-1] == 4


def test_glove_vectors_are_means_over_words(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text("\n".join(f"{w} {' '.join([str(v)] * 300)}" for w, v in (("a", 1), ("b", 3))))
    assert sst.read_glove(str(path), ["a", "A b"])[:, 0].tolist() == [1, 2]
    with pytest.raises(common.InputError, match="no 300-d vector for: c"):
        sst.read_glove(str(path), ["a c"])
    with pytest.raises(common.InputError, match="no 300-d vector for: dining, monitor, table, tv"):
        sst.read_glove(str(path), ["diningtable", "tvmonitor"])


def test_a_run_without_word_vectors_says_so(capsys):
    flags = "--data coco --arch resnet18 --weights none --size 64 --width 8"
    args = sst.parse_args(flags.split())[0]
    for fresh, lines in ((True, 1), (False, 0)):
        sst.build(args, ["cat", "dog"], torch.zeros(2, 2), fresh)
        error = capsys.readouterr().err
        assert error.count("\n") == lines and ("--glove" in error) == fresh


def test_word_vectors_are_learned_without_decay(monkeypatch, tmp_path):
    groups, adam = [], torch.optim.Adam
    record = lambda g, *more, **options: groups.extend(g) or adam(g, *more, **options)  # noqa: E731
    monkeypatch.setattr(torch.optim, "Adam", record)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", "sst.py --dry-run --weights none --batch-size 8".split())
    sst.main()
    assert [p.shape for p in groups[1]["params"]] == [(16, 300)] and groups[1]["weight_decay"] == 0


# ------------------------------------------------------------------------------------------- traps


def test_no_gradient_hangs_on_the_order_of_threads(rng):
    """The gradient of indexing adds up as threads come, on a CPU; bits would change with load."""
    _, logits, pair_logits = tiny_run("--limit 64")[2](random_images(rng, 64, 4))
    todo, seen = [logits.grad_fn, pair_logits.grad_fn], set()
    while todo:
        node = todo.pop()
        seen.add(node)
        todo += [before for before, _ in node.next_functions if before and before not in seen]
    names = {node.name() for node in seen}
    assert "IndexSelectBackward0" in names and "IndexBackward0" not in names, names


def test_no_leak_of_hidden_labels():
    """Every hidden label flipped: losses, pseudo-labels and weights stay bit-identical."""
    ends = []
    for flip in (False, True):
        args, (images, truth), net = tiny_run("--limit 64 --batch-size 16 --theta 0.1 0.1")
        y = common.hide_entries(truth, 0.3, 0)
        truth = np.where(y == 0, -truth, truth) if flip else truth
        y = common.hide_entries(truth, 0.3, 0)
        net.graph.adjacency.copy_(sst.cooccurrence(torch.tensor(y)))
        ends.append(run_epochs(net, args, (images, truth), y))
    (logs_a, state_a), (logs_b, state_b) = ends
    for a, b in zip(logs_a, logs_b, strict=True):
        kept = a.keys() - {"pseudo_precision", "pseudo_recall"}
        assert {k: a[k] for k in kept} == {k: b[k] for k in kept}
    assert logs_a[1]["pseudo_per_image"] > 0
    assert logs_a[1]["pseudo_precision"] != logs_b[1]["pseudo_precision"]  # the flip was seen there
    assert all(torch.equal(state_a[k], state_b[k]) for k in state_a)


def test_class_without_known_positive_stays_harmless():
    args, train, net = tiny_run("--limit 64 --batch-size 16 --theta 0.1 0.1")
    y = common.hide_entries(train[1], 0.5, 0)
    y[:, 3] = np.where(y[:, 3] == 1, 0, y[:, 3])
    logs, state = run_epochs(net, args, train, y)
    assert all(math.isfinite(v) for v in logs[1].values() if v is not None)
    assert (state["prototypes"][3] == 0).all()


@pytest.mark.parametrize("shrink", [0, 5])
def test_prototypes_are_the_mean_unit_features_of_known_positives(monkeypatch, shrink):
    args, train, net = tiny_run(f"--limit 32 --batch-size 8 --shrink {shrink}")
    y = common.hide_entries(train[1], 0.5, 0)
    seen, original = [], sst.cross_pseudo_labels

    def record(f, labels, prototype, theta):
        seen.append((f.detach().clone(), labels.clone(), prototype.clone()))
        return original(f, labels, prototype, theta)

    monkeypatch.setattr(sst, "cross_pseudo_labels", record)
    _, state = run_epochs(net, args, train, y, epochs=(1, 2))
    for c in range(16):
        for steps, prototype in ((seen[:4], seen[4][2]), (seen[4:], state["prototypes"])):
            bank = [f[n, c] / f[n, c].norm() for f, v, _ in steps for n in range(8) if v[n, c] == 1]
            expected = torch.stack(bank).mean(0) if bank else torch.zeros(args.width)
            expected = expected * len(bank) / max(len(bank) + shrink, 1)
            torch.testing.assert_close(prototype[c], expected)


# ------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "flags",
    ["--no-ist --no-cst", "--no-cst --stat-cooc", "--no-ist", "--no-cst --lambdas 0 0.2",
     "--no-ist --lambdas 3 0", "--pairs all", "--train-trunk all", "--train-trunk none"],
)  # fmt: skip
def test_every_row_of_table_2_runs(flags, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["sst.py", *flags.split(), *"--dry-run --weights none --batch-size 8".split()]
    )
    sst.main()
    assert "last epoch" in capsys.readouterr().out
