# SPDX-License-Identifier: MIT
"""Each equation of SST against a literal loop in float64, and the traps of partial labels."""

import math
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import sst
from tests import toy
from tests.conftest import double, random_images, random_labels, unit

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
    """On the pairs that are asked for, by (i, j) or by (j, i); the others are 0."""
    net = sst.PairNet(D, (4, 3)).double()
    f, asked = double(rng, B, C, D), torch.rand(B, C, C, generator=rng) < 0.3
    logits = net(f, asked)
    one_way = 0
    for n, i, j in product(range(B), range(C), range(C)):
        if i != j and (asked[n, i, j] or asked[n, j, i]):
            left, right = min(i, j), max(i, j)
            h = torch.relu(net.first(torch.cat((f[n, left], f[n, right]))))
            h = net.last(torch.relu(net.second(h)))
            torch.testing.assert_close(h[0], logits[n, i, j])
            one_way += not asked[n, i, j]
        else:
            assert logits[n, i, j] == 0
    assert one_way > 5 and torch.equal(logits, logits.transpose(1, 2))
    every = net(f, torch.ones_like(asked))
    assert torch.equal(every != 0, ~torch.eye(C, dtype=torch.bool).expand(B, C, C))


def test_no_pair_is_computed_that_is_not_asked_for(rng):
    net, rows = sst.PairNet(D, (4, 3)), []
    net.second.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    asked = torch.zeros(B, C, C, dtype=torch.bool)
    asked[0, 1, 2] = asked[0, 2, 1] = asked[3, 4, 0] = asked[5, 2, 2] = True
    for wanted in (asked, torch.zeros_like(asked), torch.ones_like(asked)):
        net(double(rng, B, C, D).float(), wanted)
    assert rows == [2, 0, B * C * (C - 1) // 2]


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


def test_sum_of_cosines_is_the_loop_of_its_docstring(rng):
    u, member = unit(rng, B, C, D), torch.rand(B, C, generator=rng) < 0.6
    member[:, 1], member[1:, 2] = False, False  # in no image, and in one at most
    total, number = 0, 0
    for n, m, c in product(range(B), range(B), range(C)):
        if n != m and member[n, c] and member[m, c]:
            total += u[n, c] @ u[m, c]
            number += 1
    ours = sst.sum_of_cosines(u, member)
    torch.testing.assert_close(ours[0], total)
    assert ours[1] == number > 10


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
    _, train, _ = common.load_data("toy", None, args.limit)
    torch.manual_seed(seed)
    return args, train, sst.build(args, torch.randn(16, 50), torch.rand(16, 16))


def run_epochs(net, args, train, y, epochs=(40, 41), lr=None):  # late: thresholds at their lowest
    """Log entries, and the state at the end."""
    data = common.ImageDataset(train[0], y, common.make_transform(args.size, args.crops))
    loader = common.make_loader(data, args, train=True)
    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, args.lr if lr is None else lr)
    logs = []
    for epoch in epochs:
        seed = epoch if lr is None else 0
        loader.sampler.set_epoch(seed)
        common.EPOCH.fill_(seed)
        truth = torch.tensor(train[1])
        logs.append(sst.train_one_epoch(net, loader, optimizer, truth, epoch, args))
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


def test_gated_graph_has_the_gates_of_ssgrl(rng):
    """Per class and step: message, update and reset gates, candidate, and their mix."""
    adjacency = torch.rand(C, C, generator=rng, dtype=torch.float64)
    module, f = sst.GatedGraph(adjacency, D).double(), double(rng, 2, C, D)
    ours = module(f)
    for b in range(2):
        h = [f[b, c] for c in range(C)]
        for _ in range(3):
            before = list(h)
            for c in range(C):
                out = sum(adjacency[c, k] * before[k] for k in range(C))
                into = sum(adjacency[k, c] * before[k] for k in range(C))
                both = torch.cat((out, into, before[c]))
                z = torch.sigmoid(module.update.weight @ both + module.update.bias)
                r = torch.sigmoid(module.reset.weight @ both + module.reset.bias)
                both = torch.cat((out, into, r * before[c]))
                new = torch.tanh(module.candidate.weight @ both + module.candidate.bias)
                h[c] = (1 - z) * before[c] + z * new
        for c in range(C):
            both = torch.cat((h[c], f[b, c]))
            expected = torch.tanh(module.output.weight @ both + module.output.bias)
            torch.testing.assert_close(ours[b, c], expected)


def test_pairs_are_computed_where_asked_for_and_not_at_test_time():
    args, (images, y), net = tiny_run("--limit 4 --batch-size 2")
    x = torch.tensor(images).permute(0, 3, 1, 2)
    every = torch.ones(4, 16, 16, dtype=torch.bool)
    assert net.train()(x, every)[2].shape == (4, 16, 16)
    assert net(x)[2] is None
    net.pairs.register_forward_hook(lambda *_: pytest.fail("a pair was computed"))
    data = common.ImageDataset(images, y, common.make_transform(64))
    task = SimpleNamespace(test_loader=common.make_loader(data, args), test_y=y)
    metrics, logits = sst.evaluate(net, task, "fp32")
    assert metrics["mAP"] > 0 and torch.allclose(logits, net(x)[1], atol=1e-5)


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
    frozen, trained = sst.split_trunk(sst.load_trunk(arch, "none"))
    x = torch.zeros(1, 3, 64, 64)
    assert frozen.eval()(x).shape[-1] == 4
    channels = trained.eval()(frozen(x)).shape[1]
    assert trained(frozen(x)).shape[2:] == (2, 2)
    sarl = sst.SemanticDecoupling(torch.randn(C, 50), D)
    net = sst.SST(frozen, trained, sarl, sst.GatedGraph(torch.rand(C, C), D))
    assert net.project[0].in_channels == channels
    assert net.eval()(x.byte())[1].shape == (1, C)


def test_a_trunk_without_a_map_is_refused():
    with pytest.raises(ValueError, match="no spatial trunk"):
        sst.split_trunk(torch.nn.Linear(3, 3))


@pytest.mark.parametrize("width", [50, 300])
def test_glove_vectors_are_means_over_words(tmp_path, width):
    path = tmp_path / "glove.txt"
    path.write_text("\n".join(f"{w} {' '.join([str(v)] * width)}" for w, v in (("a", 1), ("b", 3))))
    words = sst.read_words(str(path), ["a", "A b", "b_a"])
    assert words.shape == (3, width) and words[:, -1].tolist() == [1, 2, 2]
    with pytest.raises(ValueError, match="no vector for: c; --glove none"):
        sst.read_words(str(path), ["a c"])
    with pytest.raises(ValueError, match="no vector for: dining, monitor, table, tv;"):
        sst.read_words(str(path), ["diningtable", "tvmonitor"])


def test_words_of_an_array_are_its_rows(tmp_path, rng):
    path, words = str(tmp_path / "words.npy"), double(rng, C, 7)
    np.save(path, words.numpy())
    assert torch.equal(sst.read_words(path, "abcde"), words.float())
    with pytest.raises(ValueError, match=r"\[5, 7\], not \(4, width\)"):
        sst.read_words(path, "abcd")


def test_the_words_that_come_along_name_every_class_of_toy_coco_and_voc():
    for classes in (toy.CLASSES, common.VOC_CLASSES, COCO_CLASSES.split(", ")):
        words = sst.read_words(sst.GLOVE, classes)
        assert words.shape == (len(classes), 50) and words.any(1).all()


COCO_CLASSES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, "
    "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, "
    "sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, "
    "bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, "
    "carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, "
    "tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, "
    "refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)


@pytest.mark.parametrize(("glove", "width"), [("none", 300), (sst.GLOVE, 50)])
def test_word_vectors_are_learned_without_decay_or_stay(glove, width, monkeypatch, tmp_path):
    groups, adam = [], torch.optim.Adam
    record = lambda g, *more, **options: groups.extend(g) or adam(g, *more, **options)  # noqa: E731
    monkeypatch.setattr(torch.optim, "Adam", record)
    monkeypatch.chdir(tmp_path)
    command = "sst.py --dry-run --weights none --batch-size 8 --glove".split()
    monkeypatch.setattr(sys, "argv", [*command, glove])
    sst.main()
    (words,) = groups[1]["params"]
    assert words.shape == (16, width) and groups[1]["weight_decay"] == 0
    assert words.requires_grad == (glove == "none")
    if glove != "none":
        assert torch.equal(words, sst.read_words(sst.GLOVE, toy.CLASSES))


def test_the_words_that_come_along_are_those_of_the_known_data_sets():
    for data in ("coco", "voc2007", "voc2012"):
        assert sst.parse_args(["--data", data])[0].glove == sst.GLOVE
    for data in ("vg200", "folder"):
        assert sst.parse_args(["--data", data])[0].glove == "none"


# ------------------------------------------------------------------------------------------- traps


def test_no_gradient_hangs_on_the_order_of_threads(rng):
    """The gradient of indexing adds up as threads come, on a CPU; bits would change with load."""
    asked = torch.ones(4, 16, 16, dtype=torch.bool)
    _, logits, pair_logits = tiny_run("--limit 64")[2](random_images(rng, 64, 4), asked)
    todo, seen = [logits.grad_fn, pair_logits.grad_fn], set()
    while todo:
        node = todo.pop()
        seen.add(node)
        todo += [before for before, _ in node.next_functions if before and before not in seen]
    names = {node.name() for node in seen}
    assert "IndexSelectBackward0" in names and "IndexBackward0" not in names, names


@pytest.mark.parametrize("negatives", ["both", "all"])
@pytest.mark.parametrize("known", [0, 0.1, 0.5, 1])
def test_pairs_that_nobody_asks_for_change_nothing(known, negatives, monkeypatch, rng):
    """A step with the pairs that its labels ask for, and one with all of them: the same losses,
    pseudo-labels of Eq. 2 and gradients."""
    args, (images, truth), net = tiny_run(f"--limit 8 --theta 0.4 0.4 --pairs {negatives}")
    shown = torch.rand(8, 16, generator=rng) < known
    truth = torch.tensor(truth)
    x = torch.tensor(images).permute(0, 3, 1, 2)
    loader = [(x, torch.where(shown, truth, 0), torch.arange(8))]
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.0)
    labelled, original = [], sst.intra_pseudo_labels
    record = lambda *some: labelled.append(original(*some)) or labelled[-1]  # noqa: E731
    monkeypatch.setattr(sst, "intra_pseudo_labels", record)
    forward, rows, entries, gradients = net.pairs.forward, [], [], []
    every = lambda f, asked: forward(f, torch.ones_like(asked))  # noqa: E731
    net.pairs.second.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    for compute in (forward, every):
        net.pairs.forward = compute
        net.prototypes = torch.zeros(16, args.width)
        entry = sst.train_one_epoch(net, loader, optimizer, truth, 40, args)
        entries.append({name: value for name, value in entry.items() if value is not None})
        gradients.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    assert "loss_ist" in entries[0] and entries[0] == pytest.approx(entries[1], rel=1e-5)
    assert torch.equal(*labelled)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    all_pairs = 8 * 16 * 15 // 2
    assert rows[1] == all_pairs
    assert rows[0] == all_pairs if known == 1 or negatives == "all" else rows[0] < all_pairs
    if known in (0.1, 0.5):
        assert (labelled[0] != loader[0][1]).sum() > 5 and entries[0]["loss_ist"] > 0


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


def test_prototypes_are_the_mean_unit_features_of_known_positives(monkeypatch):
    args, train, net = tiny_run("--limit 32 --batch-size 8")
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
