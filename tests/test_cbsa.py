# SPDX-License-Identifier: MIT
"""CBSA: model, losses, contexts and pseudo-labels against loops; what a run learns and uses."""

import copy
import inspect
import math
import re
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

import cbsa
from tests.conftest import Batches, double, random_images, random_labels, same, unit
from tests.toy import world

B, C, D, N = 4, 5, 8, 9
CONTEXT = [0, 0, 1, 2, 2]  # of each class
MEMBER = F.one_hot(torch.tensor(CONTEXT)).float()
IMAGES, Y, _ = world.scenes(40, 3)
KEPT = np.random.RandomState(1).permutation(40)[:4]  # --known 0.1


def settings(flags=""):
    return cbsa.parse_args(f"--weights none --size 64 --batch-size 16 {flags}".split())[0]


def network(args, classes=world.CLASSES):
    return cbsa.build(args, classes, torch.tensor(Y[:, : len(classes)]), None)


@pytest.mark.parametrize(("alpha", "kappa"), [(0.5, 0.3), (0.0, 0.0)])
def test_label_features_and_scores_are_those_of_loops(alpha, kappa, rng, monkeypatch):
    f = unit(rng, B, D)
    u = unit(rng, B, N, D)
    monkeypatch.setattr(cbsa, "clip_features", lambda *_: (f, u))
    where = unit(rng, C, D)
    what = unit(rng, C, D)
    net = cbsa.CBSA(None, where, what, torch.tensor(20.0), MEMBER, alpha, kappa).double()
    for p in (net.bias, *net.context.parameters()):
        torch.nn.init.normal_(p)
    h = cbsa.label_features(f, u, where, alpha, 0.1)
    z, r = net(torch.zeros(B, 3, 1, 1))
    for n, k in product(range(B), range(C)):
        weights = [math.exp(where[k] @ u[n, i] / 0.1) for i in range(N)]
        pooled = sum(w / sum(weights) * u[n, i] for i, w in enumerate(weights))
        mixed = f[n] + alpha * pooled
        torch.testing.assert_close(h[n, k], mixed / mixed.norm())
        g = CONTEXT[k]
        torch.testing.assert_close(r[n, g], net.context.weight[g] @ f[n] + net.context.bias[g])
        score = 20 * (h[n, k] @ what[k]) + net.bias[k] + net.kappa * r[n, g]
        torch.testing.assert_close(z[n, k], score, rtol=1e-6, atol=1e-6)


def test_text_features_are_means_over_sentences_of_two_kinds():
    args = settings()
    args.data = "coco"
    clip, tokenize, _ = cbsa.load_clip(args.arch, "none", 64)
    torch.manual_seed(0)  # the same weights
    net = network(args)
    for ours, sentences in ((net.what, cbsa.WHAT), (net.where, cbsa.WHERE)):
        texts = [sentence.format("traffic light") for sentence in sentences]
        mean = clip.encode_text(tokenize(texts), normalize=True).mean(0)
        torch.testing.assert_close(ours[world.CLASSES.index("traffic light")], mean / mean.norm())


@pytest.mark.parametrize(
    ("names", "message"),
    [("tvmonitor dog TV_monitor", "CLIP reads one text in two"), ("0 1 2", "CLIP needs names")],
)
def test_names_that_say_nothing_to_clip_are_refused_in_one_line(names, message):
    with pytest.raises(SystemExit, match=rf"^error: {message}[^\n]*$"):
        network(settings(), names.split())


def test_asymmetric_loss_is_that_of_a_loop(rng):
    x = (3 * double(rng, 6, C)).requires_grad_()
    y = random_labels(rng)
    terms = []
    for n, c in product(range(6), range(C)):
        p = 1 / (1 + torch.exp(-x[n, c]))
        p_m = torch.maximum(p - 0.1, torch.zeros_like(p))
        if y[n, c] == 1:
            terms.append(-torch.log(p))
        elif y[n, c] == -1:
            terms.append(-(p_m.item() ** 2) * torch.log(1 - p_m))  # the focus is a number
    expected = sum(terms) / len(terms)
    loss = cbsa.asymmetric_loss(x, y, gamma=2, margin=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, x) for value in (loss, expected)))


def test_asymmetric_loss_is_finite_where_sure_and_wrong_and_0_where_nothing_is_known():
    x = torch.tensor([[-1e4, 1e4, 1e4]], requires_grad=True)
    loss = cbsa.asymmetric_loss(x, torch.tensor([[1, -1, 0]]))
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and x.grad[0, 2] == 0
    assert cbsa.asymmetric_loss(x, torch.zeros(1, 3)) == 0


def test_class_prior_counts_known_labels_only():
    y = torch.tensor([[1, 1, 0], [1, -1, 0], [0, -1, 0]])
    torch.testing.assert_close(cbsa.class_prior(y), torch.tensor([2.5 / 3, 1.5 / 4, 0.5]))


def planted():
    """Labels of one of three groups of four classes at a time; two classes that meet no other."""
    g = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2, 3, 4], [4, 4, 4, 1, 1])
    shown = g.choice(5, size=(400, 1), p=[0.3, 0.3, 0.3, 0.05, 0.05])
    return torch.tensor(np.where((groups == shown) & (g.random((400, 14)) < 0.6), 1, -1))


def test_planted_contexts_are_found_and_no_label_that_meets_none_is_alone():
    member = cbsa.find_contexts(planted(), 3)
    assert adjusted_rand_score(np.repeat([0, 1, 2], 4), member[:12].argmax(1)) == 1
    assert (member.sum(1) == 1).all() and (member.sum(0) >= 4).all()


def test_contexts_are_clusters_of_the_symmetric_smoothed_correlation(monkeypatch):
    y = planted()[:90]
    y[:, 2] = -1  # never present
    given = []
    clustering = SimpleNamespace(fit_predict=lambda a: given.append(a) or np.arange(14) % 3)
    monkeypatch.setattr(cbsa, "SpectralClustering", lambda *_, **more: clustering)
    cbsa.find_contexts(y, 3)
    p = np.zeros((14, 14))
    for i, j in product(range(14), range(14)):
        present = (y[:, j] == 1).double()
        together = present[y[:, i] == 1]
        p[i, j] = (together.sum() + present.mean()) / (len(together) + 1)
    expected = (p + p.T) / 2 + 0.001
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(given[0], expected)


@pytest.mark.parametrize(("classes", "contexts"), [(2, 1), (3, 1), (4, 2), (16, 4), (80, 10)])
def test_contexts_of_labels_that_never_co_occur_are_as_many_as_fit_the_classes(classes, contexts):
    member = cbsa.find_contexts(2 * torch.eye(classes).repeat(3, 1) - 1, 0)
    assert member.shape == (classes, contexts) and (member.sum(0) > 0).all()


@pytest.mark.parametrize(("classes", "number"), [(5, 6), (1, 0)])
def test_a_wrong_number_of_contexts_is_refused_in_one_line(classes, number):
    with pytest.raises(SystemExit, match=rf"--contexts must be from 1 to {classes}; [^\n]*$"):
        cbsa.find_contexts(torch.ones(3, classes), number)


def test_context_labels_are_those_of_a_loop(rng):
    y = random_labels(rng, 60)
    ours = cbsa.context_labels(y, MEMBER)
    for n, g in product(range(60), range(3)):
        inside = [y[n, c].item() for c in range(C) if CONTEXT[c] == g]
        assert ours[n, g] == (1 if 1 in inside else -1 if set(inside) == {-1} else 0)
    assert {-1, 0, 1} == set(ours.flatten().tolist())


@pytest.mark.parametrize("band", [False, True])
def test_labels_by_rank_are_those_of_a_loop(band, rng):
    scores = torch.randint(4, (21, 6), generator=rng)  # many ties
    number = torch.tensor([0, 1, 5, 10, 20, 21])
    ours = cbsa.label_by_rank(scores, number, band)
    for c, k in enumerate(number.tolist()):
        positives = math.ceil(k / 2) if band else k
        negatives = 21 - min(2 * k, k + (21 - k) // 2) if band else 21 - k
        expected = [1] * positives + [0] * (21 - positives - negatives) + [-1] * negatives
        first = sorted(range(21), key=lambda n: (-scores[n, c].item(), n))  # noqa: B023
        assert ours[first, c].tolist() == expected
        assert -1 in expected or k == 21  # a band leaves negatives


@pytest.fixture
def taught(rng):
    """Scores, highest for class 0, and labels: of class 0 never present, 1 always, 2 rarely."""
    y = 2 * torch.randint(2, (30, C), generator=rng) - 1
    y[:, 0] = -1
    y[:, 1] = 1
    y[2:, 2] = -1
    return double(rng, 101, C) + torch.tensor([9, 0, 0, 0, 0]), y


@pytest.mark.parametrize("band", [False, True])
def test_pseudo_labels_are_as_many_as_the_labelled_images_suggest(band, taught):
    scores, y = taught
    ours = cbsa.pseudo_labels(scores, y, band=band)
    assert not ours[:, :2].any()  # not seen both present and absent
    for c in range(2, C):
        number = round(((y[:, c] == 1).sum().item() + 0.5) / 31 * 101)
        expected = cbsa.label_by_rank(scores[:, [c]], torch.tensor([number]), band)
        assert torch.equal(ours[:, [c]], expected) and (expected == 1).any()


def test_one_threshold_gives_as_many_positives_in_total(taught):
    each = cbsa.pseudo_labels(*taught)
    one = cbsa.pseudo_labels(*taught, one_threshold=True)
    assert (one == 1).sum() == (each == 1).sum() and not torch.equal(one, each)
    assert not one[:, :2].any()
    assert taught[0][one == 1].min() > taught[0][one == -1].max()


def test_one_threshold_without_a_class_that_is_taught_or_with_one_image(taught):
    scores, y = taught
    assert not cbsa.pseudo_labels(scores, y[:, :2].repeat(1, 3)[:, :C], one_threshold=True).any()
    often = torch.where(torch.arange(30)[:, None] == 0, -1, 1).expand(30, C)
    assert (cbsa.pseudo_labels(scores[:1], often, one_threshold=True) == 1).all()


def test_losses_and_pseudo_labels_run_alone_when_they_are_copied(rng, taught):
    section = re.split("# -{9,} .*", inspect.getsource(cbsa))[2]
    alone = dict(torch=torch, F=F, need=cbsa.need, SpectralClustering=SpectralClustering)
    exec(section, alone)
    for name, given in dict(
        asymmetric_loss=(double(rng, 6, C), random_labels(rng)),
        find_contexts=(planted(), 3),
        context_labels=(random_labels(rng), MEMBER),
        pseudo_labels=(*taught, False, True),
    ).items():
        assert torch.equal(alone[name](*given), getattr(cbsa, name)(*given))


def test_nothing_is_erased_if_erase_is_0():
    view = cbsa.ImageDataset(IMAGES, 64, strengths=[(0, 0.5, 0.0)])
    assert all(torch.equal(view[0][0], torch.tensor(IMAGES[0]).permute(2, 0, 1)) for _ in range(9))


@pytest.mark.parametrize(("number", "share"), [(1, 1 / 8), (100, 1 / 8), (500, 1 / 2)])
def test_an_eighth_of_what_is_drawn_or_the_part_of_all_is_labelled(number, share):
    own = torch.arange(1000) < number
    drawn = own[[*cbsa.mixed_sampler(own, mixed=True)]]
    assert len(drawn) == 1000 and abs(drawn.double().mean() - share) < 0.04


def test_unlabelled_images_alone_get_labels_by_the_teachers_scores_of_crops(rng, monkeypatch):
    y = random_labels(rng, 40) * (torch.rand(40, 1, generator=rng) < 0.4)
    own = (y != 0).any(1)
    scores = [double(rng, 40, C), double(rng, 40, 3)]
    asked = []
    monkeypatch.setattr(cbsa, "evaluate", lambda *given: asked.append(given) or scores)
    given = SimpleNamespace(member=MEMBER), "images", y, settings("--band --smallest-crop 384")
    *labels, marks = cbsa.guess_labels(*given, mixed=True)
    assert asked == [(*given[:2], given[3], 384)]
    assert torch.equal(marks[:, 0] == 1, own)
    for ours, known, score in zip(labels, (y, cbsa.context_labels(y, MEMBER)), scores, strict=True):
        assert torch.equal(ours[own], known[own])
        expected = cbsa.pseudo_labels(score[~own], known[own], band=True)
        assert torch.equal(ours[~own], expected) and expected.any()


def test_the_loss_is_the_weighted_sum_of_four(rng):
    net = network(settings()).eval()
    torch.nn.init.normal_(net.context.weight)
    images = random_images(rng, 64, 6)
    y = random_labels(rng, 6, 16)
    contexts = random_labels(rng, 6, 4)
    own = torch.tensor([1, 1, 0, 0, 0, 0])[:, None]
    z, r = net(images)
    pairs = (z[:2], y[:2]), (z[2:], y[2:]), (r[:2], contexts[:2]), (r[2:], contexts[2:])
    parts = [cbsa.asymmetric_loss(*pair).item() for pair in pairs]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    given = optimizer, (y, contexts, own), 1, settings("--lambda-u 0.7 --lambda-c 0.3")
    loader = Batches([(images, torch.arange(6))])
    entry = cbsa.train_one_epoch(net, net, copy.deepcopy(net), loader, *given)
    names = ["loss_lab", "loss_unl", "loss_ctx_lab", "loss_ctx_unl", "loss"]
    parts.append(parts[0] + 0.7 * parts[1] + 0.3 * (parts[2] + 0.7 * parts[3]))
    assert [entry[name] for name in names] == pytest.approx(parts, rel=1e-4)


def run(folder, flags="", truth=Y):
    """Two epochs of main, of 3 steps each, on 40 images, 4 of them labelled: what was drawn, the
    targets, the log, the student after each step, the networks at the start and at the end."""
    done = SimpleNamespace(drawn=[], targets=[], students=[])
    train = cbsa.train_one_epoch

    def record(model, net, teacher, loader, optimizer, targets, *rest):
        batches = Batches(loader)
        done.drawn.append(torch.cat([index for _, index in batches]).tolist())
        done.targets.append(targets)
        done.start = getattr(done, "start", copy.deepcopy(net))
        done.net, done.teacher, done.data = net, teacher, loader.dataset
        add = done.students.append
        hook = optimizer.register_step_post_hook(lambda *_: add(copy.deepcopy(net)))
        entry = train(model, net, teacher, batches, optimizer, targets, *rest)
        hook.remove()
        return entry

    always = "--epochs 2 --known 0.1 --smallest-crop 0 --operations 1 --ema 0.75"
    done.args = settings(f"{always} --out {folder} {flags}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cbsa, "load_data", lambda *_, **more: (world.CLASSES, IMAGES, truth))
        patch.setattr(cbsa, "train_one_epoch", record)
        patch.setattr(cbsa, "save_pictures", lambda *_: None)
        cbsa.main(done.args, None)
    done.checkpoint = torch.load(folder / "last.pt", weights_only=True)
    done.log = done.checkpoint["log"][1:]
    return done


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run(tmp_path_factory.mktemp("done") / "out")


def test_warm_up_draws_labelled_images_only(done):
    warm, mixed = done.drawn
    assert {*warm} <= {*KEPT} < {*KEPT, *mixed} and len(warm) == len(mixed) == 40


def test_the_student_sees_strong_views(done):
    *_, operations, _, erasing = done.data.views[0].transforms
    assert (operations.num_ops, erasing.p, erasing.scale) == (1, 0.5, (0.02, 0.1))


def test_mean_logits_start_at_the_labelled_prior_and_contexts_at_nothing(done):
    logits, contexts = cbsa.evaluate(done.start, IMAGES, done.args)
    prior = cbsa.class_prior(torch.tensor(Y[KEPT]))
    torch.testing.assert_close(logits.mean(0), prior.logit(), rtol=0, atol=1e-3)
    assert not contexts.any()


def test_what_learns_is_the_last_stage_and_the_head(done):
    start, end = (net.state_dict() for net in (done.start, done.net))
    moved = {".".join(name.split(".")[:2]) for name in start if not same(start[name], end[name])}
    head = {"scale", "bias", "alpha", "kappa", "context.weight", "context.bias"}
    assert moved == {"visual.layer4", "visual.attnpool"} | head


def test_statistics_of_the_tower_stay(done):
    start = dict(done.start.named_buffers())
    assert same(dict(done.net.named_buffers()), start) and "visual.bn1.running_var" in start
    assert same(dict(done.teacher.named_buffers()), start)


def test_the_teacher_shares_no_memory_with_the_student(done):
    tensors = ([*net.parameters(), *net.buffers()] for net in (done.net, done.teacher))
    ours, theirs = ({x.data_ptr() for x in each} for each in tensors)
    assert not ours & theirs


def test_the_teacher_is_a_plain_mean_at_first_and_decays_later(done):
    weights = [0.75**2 / 4] * 4 + [0.25 * 0.75, 0.25]  # at step 4 a mean decays as much
    networks = (net.parameters() for net in (done.teacher, *done.students))
    for average, *each in zip(*networks, strict=True):
        expected = sum(w * p for w, p in zip(weights, each, strict=True))
        torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-5)


def test_the_checkpoint_holds_the_teacher_that_was_evaluated(done):
    net = cbsa.build(done.args, world.CLASSES, None, done.checkpoint)
    logits, _ = net.eval()(torch.tensor(IMAGES).permute(0, 3, 1, 2))  # whole, in their order
    metrics = cbsa.multilabel_metrics(logits.detach(), Y, world.CLASSES)
    assert metrics["AP"] == pytest.approx(done.log[-1]["AP"])


def test_classes_without_a_positive_or_a_negative_leave_the_losses_finite(done):
    single = (Y[KEPT] == Y[KEPT[0]]).all(0)
    hidden = np.delete(done.targets[1][0].numpy(), KEPT, axis=0)
    assert not hidden[:, single].any() and 0 < single.sum() < 16
    losses = [v for entry in done.log for name, v in entry.items() if name.startswith("loss")]
    assert np.isfinite(losses).all()


def test_hidden_labels_change_nothing_that_is_learned(done, tmp_path):
    truth = -Y
    truth[KEPT] = Y[KEPT]
    other = run(tmp_path / "out", truth=truth)
    assert same(done.targets, other.targets)
    for name in ("student", "model", "optimizer"):
        assert same(done.checkpoint[name], other.checkpoint[name])
    assert [entry["loss"] for entry in done.log] == [entry["loss"] for entry in other.log]
    assert done.log[1]["pseudo_precision"] != other.log[1]["pseudo_precision"]


def test_all_images_labelled_and_alpha_and_kappa_fixed_at_0(tmp_path):
    every = run(tmp_path / "out", "--known 1 --warm-up 0 --alpha 0 --kappa 0")
    assert same(every.targets[1][0], torch.tensor(Y))
    assert every.log[1]["loss_lab"] > 0 == every.log[1]["loss_unl"]
    assert every.net.alpha == every.teacher.alpha == every.net.kappa == every.teacher.kappa == 0
