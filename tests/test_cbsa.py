# SPDX-License-Identifier: MIT
"""CBSA: attention, contexts, thresholds and losses against loops; teacher and student."""

import json
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_rand_score

import cbsa
import common
from tests import toy
from tests.conftest import double, random_images, random_labels, small_clip, unit

B, C, D, N = 4, 5, 8, 9


# ------------------------------------------------------------------------------------------- model


def test_label_features_against_loops(rng):
    f, u, where = unit(rng, B, D), unit(rng, B, N, D), unit(rng, C, D)
    h, a = cbsa.label_features(f, u, where, 0.7, 0.1)
    torch.testing.assert_close(a.sum(-1), torch.ones(B, C, dtype=torch.float64))
    for n in range(B):
        for k in range(C):
            weight = [math.exp(where[k] @ u[n, i] / 0.1) for i in range(N)]
            pooled = sum(w / sum(weight) * u[n, i] for i, w in enumerate(weight))
            mixed = f[n] + 0.7 * pooled
            torch.testing.assert_close(h[n, k], mixed / mixed.norm())


def test_limits_are_mean_and_best_position_and_the_image_feature(rng):
    f, u, where = unit(rng, B, D), unit(rng, B, N, D), unit(rng, C, D)
    mean = F.normalize(f + 0.7 * u.mean(1), dim=-1)[:, None].expand(B, C, D)
    torch.testing.assert_close(cbsa.label_features(f, u, where, 0.7, 1e9)[0], mean)
    best = (where @ u.transpose(1, 2)).argmax(-1)  # (B, C)
    sharp = cbsa.label_features(f, u, where, 1e12, 1e-6)[0]  # alpha so large that f is lost
    for n in range(B):
        torch.testing.assert_close(sharp[n], u[n, best[n]])
    alone = cbsa.label_features(f, u, where, 0, 0.1)[0]
    torch.testing.assert_close(alone, f[:, None].expand(B, C, D))


def clip_with(pool):
    """A tower that is nothing but an attention pool over the normalised pixels' own channels."""
    resnet = open_clip.modified_resnet.ModifiedResNet
    steps = dict(forward_intermediates=resnet.forward_intermediates)
    tower = type("Tower", (torch.nn.Module,), steps)()
    for name in "stem layer1 layer2 layer3 layer4".split():
        setattr(tower, name, torch.nn.Identity())
    tower.attnpool, tower.preprocess_cfg = pool, dict(mean=(0, 0, 0), std=(1, 1, 1))
    return tower


def test_local_features_are_what_clips_attention_pool_averages(rng):
    """With one query for all heads, its output is the attention-weighted sum of l_i."""
    pool, heads, width = open_clip.modified_resnet.AttentionPool2d(3, 12, 4, 8), 4, 3
    tower, images = clip_with(pool), random_images(rng, 3, B)
    tower.layer4 = torch.nn.Conv2d(3, 12, 1)
    for weight in pool.parameters():
        torch.nn.init.normal_(weight, generator=rng)
    for proj in (pool.q_proj, pool.k_proj):  # every head the same
        proj.weight.data = proj.weight.data[:width].repeat(heads, 1)
        proj.bias.data = proj.bias.data[:width].repeat(heads)
    x = tower.layer4(images / 255)
    tokens = x.flatten(2).transpose(1, 2)  # (B, N, 12)
    mean = tokens.mean(1) + pool.positional_embedding[0]
    key = pool.k_proj(torch.cat((mean[:, None], tokens + pool.positional_embedding[1:]), 1))
    scores = (key[..., :width] @ pool.q_proj(mean)[:, :width, None])[..., 0] / math.sqrt(width)
    a = scores.softmax(-1)
    local = pool.c_proj(pool.v_proj(tokens + pool.positional_embedding[1:]))
    f, u = common.clip_features(tower, images)
    torch.testing.assert_close(u, F.normalize(local, dim=-1))
    whole = a[:, :1] * pool.c_proj(pool.v_proj(mean)) + (a[:, 1:, None] * local).sum(1)
    torch.testing.assert_close(f, F.normalize(whole, dim=-1), rtol=1e-4, atol=1e-5)
    for weight in pool.parameters():  # and with one query a head, as it is
        torch.nn.init.normal_(weight, generator=rng)
    expected = F.normalize(pool(tower.layer4(images / 255)), dim=-1)
    f = common.clip_features(tower, images)[0]
    torch.testing.assert_close(f, expected, rtol=1e-4, atol=1e-5)


def small_net(flags="", contexts=4, weights="none"):
    torch.manual_seed(0)
    args = cbsa.parse_args(f"--weights {weights} {flags}".split())[0]
    member = F.one_hot(torch.arange(16) % contexts).float()  # (16, contexts)
    return args, cbsa.build(args, toy.CLASSES, member).eval()


def test_logits_against_their_formula(rng):
    args, net = small_net()
    images = random_images(rng, n=2)
    for weight in net.context.parameters():
        torch.nn.init.normal_(weight, generator=rng)
    logits, contexts, attention = net(images)
    assert logits.shape == (2, 16) and contexts.shape == (2, 4) and attention.shape == (2, 16, 16)
    assert (net.alpha.item(), net.kappa.item(), net.tau) == pytest.approx((0.5, 0.3, 0.1))
    f, u = common.clip_features(net.visual, images)
    for n in range(2):
        r = net.context.weight @ f[n] + net.context.bias
        torch.testing.assert_close(contexts[n], r)
        for k in range(16):
            h = F.normalize(f[n] + 0.5 * (attention[n, k, :, None] * u[n]).sum(0), dim=0)
            z = net.scale * (h @ net.what[k]) + net.bias[k] + 0.3 * r[k % 4]
            torch.testing.assert_close(logits[n, k], z, rtol=1e-4, atol=1e-4)


def test_whole_image_scores_are_clips_own_and_those_without_alpha(rng):
    _, net = small_net("--whole-image")
    images = random_images(rng)
    means = net.visual.preprocess_cfg["mean"], net.visual.preprocess_cfg["std"]
    clip = F.normalize(net.visual(common.normalise(images, *means)), dim=-1)
    torch.testing.assert_close(net(images)[0], net.scale * clip @ net.what.T)
    _, mix = small_net()
    assert mix.alpha.requires_grad and not net.alpha.requires_grad
    assert not torch.allclose(mix(images)[0], net(images)[0])
    mix.alpha.data.zero_()
    assert torch.equal(mix(images)[0], net(images)[0])


def test_contexts_start_silent_and_no_context_stays_so(rng, monkeypatch, tmp_path):
    """The zero-shot ranking is CLIP's; afterwards --no-context has learned none of it."""
    images = random_images(rng)
    assert torch.equal(small_net()[1](images)[0], small_net("--no-context")[1](images)[0])
    spoken = train("", monkeypatch, tmp_path / "contexts")["student"]
    silent = train("--no-context", monkeypatch, tmp_path / "none")["student"]
    assert spoken["kappa"] != 0.3 and spoken["context.weight"].abs().max() > 0.01
    assert silent["kappa"] == 0 and not silent["context.weight"].any()


def test_one_prompt_names_and_another_attends():
    _, net = small_net()
    clip, tokenize = small_clip("none", 128)
    for ours, prompt in ((net.what, "a photo of a boat"), (net.where, "the region showing a boat")):
        expected = clip.encode_text(tokenize([prompt]), normalize=True)[0]
        torch.testing.assert_close(ours[toy.CLASSES.index("boat")], expected)


def test_text_features_of_several_prompts_are_unit_means_of_unit_features():
    clip, tokenize = small_clip("default", 128)
    prompts = "a photo of a {}", "the region showing a {}"
    ours = cbsa.text_features(clip, tokenize, prompts, toy.CLASSES)
    for c, name in enumerate(toy.CLASSES):
        both = clip.encode_text(tokenize([prompt.format(name) for prompt in prompts]))
        mean = (both[0] / both[0].norm() + both[1] / both[1].norm()) / 2
        torch.testing.assert_close(ours[c], mean / mean.norm())


def test_a_given_alpha_takes_the_place_of_the_learned_one(rng):
    _, net = small_net()
    images = random_images(rng)
    given = net(images, 0.9)[0]
    assert not torch.allclose(given, net(images)[0]) and net.alpha == 0.5
    net.alpha.data.fill_(0.9)
    assert torch.equal(given, net(images)[0])


@pytest.mark.parametrize(
    ("arch", "size"), [("RN50-quickgelu", 224), ("RN50-quickgelu", 448), ("RN101-quickgelu", 224)]
)
def test_real_towers_with_random_weights(arch, size, rng):
    _, net = small_net(f"--arch {arch} --size {size}")
    with torch.no_grad():
        logits, _, attention = net(random_images(rng, size, 1))
    assert logits.isfinite().all() and attention.shape == (1, 16, (size // 32) ** 2)


def test_positions_are_interpolated_to_other_sizes():
    small, large = (small_clip(size=size)[0].visual.attnpool for size in (128, 192))
    a, b = small.positional_embedding, large.positional_embedding
    assert a.shape == (17, 512) and b.shape == (37, 512) and torch.equal(a[0], b[0])
    grid = a[1:].T.reshape(1, 512, 4, 4)
    expected = F.interpolate(grid, (6, 6), mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(b[1:], expected)


def test_weights_are_loaded_from_a_file_and_a_folder(tmp_path):
    clip, tokenize = small_clip("default", 128)
    torch.save(clip.state_dict(), tmp_path / "clip.pth")
    for weights in ("default", tmp_path / "clip.pth"):
        _, net = small_net(weights=weights)
        assert torch.equal(net.visual.layer1[0].conv1.weight, clip.visual.layer1[0].conv1.weight)
        expected = clip.encode_text(tokenize(["a photo of a boat"]), normalize=True)[0]
        torch.testing.assert_close(net.what[toy.CLASSES.index("boat")], expected)
    random = small_net()[1].visual.layer1[0].conv1.weight  # of --weights none
    assert not torch.equal(random, clip.visual.layer1[0].conv1.weight)


def test_what_learns_is_chosen_and_batch_statistics_stay(monkeypatch, tmp_path):
    def learned(flags):
        _, net = small_net(flags)
        return {n for n, p in net.visual.named_parameters() if p.requires_grad}

    assert {name.split(".")[0] for name in learned("")} == {"layer4", "attnpool"}
    assert len(learned("--train-trunk all")) == len([*small_net()[1].visual.parameters()])
    before = small_net("--size 64")[1].state_dict()
    after = train("--size 64", monkeypatch, tmp_path / "run")["student"]
    running = [name for name in before if "running" in name]
    assert running and all(torch.equal(before[name], after[name]) for name in running)
    bias = "visual.attnpool.c_proj.bias"
    assert not torch.equal(before[bias], after[bias])


# ------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("gammas", [(4, 0, 0.05), (2, 1, 0.2), (0, 0, 0)])
def test_asymmetric_loss_against_a_loop(rng, gammas):
    gamma_neg, gamma_pos, margin = gammas
    x, y = 3 * double(rng, 6, C), random_labels(rng, 6)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss, terms = cbsa.asymmetric_loss(ours, y, *gammas), []
    for n in range(6):
        for c in range(C):
            p = 1 / (1 + torch.exp(-theirs[n, c]))
            if y[n, c] == 1:
                terms.append(-((1 - p.item()) ** gamma_pos) * torch.log(p))
            elif y[n, c] == -1:
                p_m = torch.maximum(p - margin, torch.zeros_like(p))
                terms.append(-(p_m.item() ** gamma_neg) * torch.log(1 - p_m))
    expected = sum(terms) / len(terms)
    torch.testing.assert_close(loss, expected)
    for value in (loss, expected):
        value.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_asymmetric_loss_without_focus_and_margin_is_bce(rng):
    x, y = double(rng, 6, C), 2 * torch.randint(2, (6, C), generator=rng) - 1
    expected = F.binary_cross_entropy_with_logits(x, (y == 1).double())
    torch.testing.assert_close(cbsa.asymmetric_loss(x, y, 0, 0, 0), expected)


def test_asymmetric_loss_leaves_grad_mode_alone_and_stays_finite():
    with torch.no_grad():
        cbsa.asymmetric_loss(torch.zeros(1, 2), torch.tensor([[1, -1]]))
        assert not torch.is_grad_enabled()
    for value in (-1e4, 1e4):
        x = torch.full((1, 3), value, requires_grad=True)
        loss = cbsa.asymmetric_loss(x, torch.tensor([[1, -1, 0]]))
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()
    assert cbsa.asymmetric_loss(torch.ones(2, 3), torch.zeros(2, 3)) == 0


# ---------------------------------------------------------------------------------------- contexts


def planted(n=400, groups=3, size=4, seed=0):
    """Labels of one group at a time, and two classes that never meet another."""
    g = np.random.default_rng(seed)
    y = -np.ones((n, groups * size + 2), np.int8)
    for row, k in zip(y, g.integers(groups, size=n), strict=True):
        row[k * size : (k + 1) * size] = np.where(g.random(size) < 0.6, 1, -1)
    y[:20] = -1
    y[:10, -1] = y[10:20, -2] = 1
    return y, np.repeat(np.arange(groups), size)


@pytest.mark.parametrize("number", [3, 0])
def test_planted_contexts_are_found_and_no_isolated_label_is_alone(number):
    y, groups = planted()
    found = cbsa.find_contexts(y, number)
    assert adjusted_rand_score(groups, found[:-2]) == 1
    assert all((found == found[k]).sum() > 1 for k in (-1, -2))


def test_contexts_of_labels_never_seen_and_always_seen():
    y, groups = planted()
    y[:, 0], y[:, 5] = -1, 1
    found = cbsa.find_contexts(y, 3)
    assert found.shape == (14,) and set(found) == {0, 1, 2}


def test_one_or_two_classes_are_one_context():
    for classes in (1, 2):
        assert cbsa.find_contexts(planted()[0][:, :classes], 0).tolist() == [0] * classes


@pytest.mark.parametrize("number", [1, 15, -2])
def test_a_number_of_contexts_out_of_range_is_refused(number):
    with pytest.raises(ValueError, match=f"{number} contexts: must be 2 to 14"):
        cbsa.find_contexts(planted()[0], number)


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_eigengap_counts_the_blocks(groups):
    affinity = np.kron(np.eye(groups), np.ones((4, 4))) + 0.01
    np.fill_diagonal(affinity, 0)
    assert cbsa.eigengap(affinity) == groups


def test_contexts_are_a_membership_of_one_each_and_are_printed(capsys):
    y, groups = planted()
    names = [f"class{c}" for c in range(14)]
    member = cbsa.make_contexts(torch.tensor(y), 3, names)
    assert member.shape == (14, 3) and (member.sum(1) == 1).all()
    assert adjusted_rand_score(groups, member.argmax(1)[:-2]) == 1
    printed = capsys.readouterr().out.splitlines()
    for context in range(3):
        inside = [name for name, row in zip(names, member, strict=True) if row[context]]
        assert printed[context] == f"context {context}: {', '.join(inside)}"


def test_context_labels_are_or(rng):
    y, member = random_labels(rng, 60), F.one_hot(torch.tensor([0, 0, 1, 2, 2])).float()
    ours = cbsa.context_labels(y, member)
    for n in range(60):
        for g in range(3):
            inside = [y[n, c].item() for c in range(C) if member[c, g]]
            expected = 1 if 1 in inside else -1 if set(inside) == {-1} else 0
            assert ours[n, g] == expected
    assert {-1, 0, 1} == set(ours.flatten().tolist())


# ----------------------------------------------------------------------------------- pseudo-labels


@pytest.mark.parametrize("ties", [False, True])
def test_class_wise_thresholds_give_exact_counts(rng, ties):
    y = 2 * torch.randint(2, (30, C), generator=rng) - 1
    y[:, 2], y[:, 3] = -1, 1  # never and always seen
    score = double(rng, 101, C)
    score = (score * 0).float() if ties else score
    pseudo = cbsa.pseudo_labels(score, y)
    for c in (0, 1, 3, 4):
        prior = ((y[:, c] == 1).sum().item() + 0.5) / 31
        number = round(prior * 101)
        best = sorted(range(101), key=lambda n: (-score[n, c], n))[:number]
        expected = [1 if n in best else -1 for n in range(101)]
        assert pseudo[:, c].tolist() == expected
    assert (pseudo[:, 2] == 0).all()  # nobody knows what its images score
    assert torch.equal(pseudo, cbsa.pseudo_labels(score, y))


def test_global_threshold_gives_as_many_in_total_by_one_cut(rng):
    y, score = 2 * torch.randint(2, (30, C), generator=rng) - 1, double(rng, 101, C)
    y[:, 1] = -1  # never seen: gets none
    score[:, 1] += 9
    each, one = cbsa.pseudo_labels(score, y), cbsa.pseudo_labels(score, y, one_threshold=True)
    assert (one == 1).sum() == (each == 1).sum() and (one[:, 1] == 0).all()
    seen = [0, 2, 3, 4]
    one, score = one[:, seen], score[:, seen]
    assert score[one == 1].min() > score[one == -1].max()


@pytest.mark.parametrize("one", [False, True])
def test_band_leaves_what_is_near_the_threshold_unknown(rng, one):
    y = 2 * torch.randint(2, (30, C), generator=rng) - 1
    y[:, 2], y[2:, 3], y[:, 4] = -1, -1, 1  # never, rarely and always seen
    score = double(rng, 101, C)
    whole, band = (cbsa.pseudo_labels(score, y, one, band) for band in (False, True))
    seen = [0, 1, 3, 4]
    columns = [(score[:, seen], whole[:, seen], band[:, seen])]
    if not one:
        columns = [(score[:, c], whole[:, c], band[:, c]) for c in seen]
    for values, labels, ours in columns:
        values, labels, ours = values.flatten(), labels.flatten(), ours.flatten()
        count, number = (labels == 1).sum().item(), len(labels)
        best = values.argsort(descending=True).tolist()
        first = min(2 * count, (count + number) // 2)
        expected = [1] * ((count + 1) // 2) + [0] * (first - (count + 1) // 2)
        assert ours[best].tolist() == (expected + [-1] * number)[:number]


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("band", [False, True])
def test_a_class_without_a_positive_makes_no_pseudo_label_and_no_loss(rng, one, band):
    y = 2 * torch.randint(2, (30, C), generator=rng) - 1
    y[:, 2] = -1
    score = double(rng, 101, C)
    score[:, 2] += 9  # whatever the teacher thinks of it
    pseudo = cbsa.pseudo_labels(score, y, one, band)
    rest = [0, 1, 3, 4]
    assert (pseudo[:, 2] == 0).all()
    assert all({-1, 1} <= set(pseudo[:, c].tolist()) for c in rest)
    # the others get what they would get without it
    alone = cbsa.pseudo_labels(score[:, rest], y[:, rest], one, band)
    assert torch.equal(pseudo[:, rest], alone)
    x = double(rng, 101, C).requires_grad_()
    cbsa.asymmetric_loss(x, pseudo).backward()
    assert not x.grad[:, 2].any() and x.grad[:, rest].any()


def test_only_the_unlabelled_rows_are_labelled_by_the_teacher(rng):
    """Pseudo-labels of classes and of contexts, each from the teacher's scores of weak views."""

    class Teacher(torch.nn.Module):
        bias = torch.zeros(C)

        def forward(self, images):
            assert not self.training
            return images, images[:, :3] + 1, None

    n = 40
    score = torch.randn(n, C, generator=rng)
    y, g = random_labels(rng, n), random_labels(rng, n, 3)
    rows = torch.randperm(n, generator=rng)
    labelled, unlabelled = rows[:10], rows[10:]
    y[unlabelled], g[unlabelled] = 0, 0
    known = [y.clone(), g.clone()]
    order = torch.randperm(n, generator=rng).split(8)
    loader = [(score[index], y[index], index) for index in order]
    args = cbsa.parse_args(["--band"])[0]
    labels = cbsa.label_the_unlabelled(Teacher(), loader, known, labelled, unlabelled, args)
    assert torch.equal(known[0], y) and torch.equal(known[1], g)  # as they were
    for ours, before, values in zip(labels, known, (score, score[:, :3] + 1), strict=True):
        expected = cbsa.pseudo_labels(values[unlabelled], before[labelled], False, True)
        assert torch.equal(ours[labelled], before[labelled])
        assert torch.equal(ours[unlabelled], expected) and expected.any()


# ------------------------------------------------------------------------------ teacher and student


SMALL = "--weights none --limit 40 --known 0.3 --batch-size 16 --epochs 3 --warm-up 1 --size 64"


def train(flags, monkeypatch, out):
    monkeypatch.setattr("sys.argv", ["cbsa.py", *SMALL.split(), *flags.split(), "--out", str(out)])
    cbsa.main()
    return torch.load(out / "last.pt", weights_only=True)


def test_student_sees_strong_views_and_teacher_weak_ones(monkeypatch, tmp_path):
    mark = lambda *_: lambda image: torch.full_like(image, 7)  # noqa: E731
    monkeypatch.setattr(cbsa.v2, "RandomErasing", mark)
    seen, forward = {True: [], False: []}, cbsa.CBSA.forward

    def record(self, images, *more):
        seen[torch.is_grad_enabled()] += [(self.training, bool((x == 7).all())) for x in images]
        return forward(self, images, *more)

    monkeypatch.setattr(cbsa.CBSA, "forward", record)
    train("", monkeypatch, tmp_path / "run")
    assert set(seen[True]) == {(True, True)} and set(seen[False]) == {(False, False)}


def batches(monkeypatch, out, flags=""):
    """Indices of the batches of each epoch, and how many of each are labelled."""
    seen, original = [], cbsa.train_one_epoch

    def record(model, teacher, loaders, *rest):
        seen.append([])
        taken = cbsa.endless

        def watch(loader):
            for batch in taken(loader):
                seen[-1].append((loader is loaders[0], batch[-1].tolist()))
                yield batch

        monkeypatch.setattr(cbsa, "endless", watch)
        entry = original(model, teacher, loaders, *rest)
        monkeypatch.setattr(cbsa, "endless", taken)
        return entry

    monkeypatch.setattr(cbsa, "train_one_epoch", record)
    train(flags, monkeypatch, out)
    return seen


@pytest.mark.parametrize(
    ("number", "sizes"),
    [(100, [8, 56]), (500, [16, 48]), (1000, [32, 32]), (1990, [64, 1]), (2000, [64])],
)
def test_batches_are_mostly_unlabelled(number, sizes):
    """Of 64, an eighth is labelled or, where it is more, the part that is in the data."""
    args = cbsa.parse_args([])[0]
    y, rows = torch.ones(2000, 1), torch.arange(2000)
    loaders, weak = cbsa.make_loaders(args, [None] * 2000, y, rows[:number], rows[number:])
    assert [loader.batch_size for loader in loaders] == sizes and len(weak.dataset) == 2000
    parts = [loader.dataset.indices.tolist() for loader in loaders]
    assert sum(parts, []) == rows.tolist() and len(parts[0]) == number


def test_passes_within_an_epoch_have_other_orders_and_views_and_are_repeated():
    args = cbsa.parse_args("--size 32 --batch-size 8".split())[0]
    images, y, _ = toy.scenes(16, 3)
    rows = torch.arange(16)
    (labelled, unlabelled), _ = cbsa.make_loaders(args, images, torch.tensor(y), rows[:8], rows[8:])
    taken = []
    for epoch in (5, 5, 6):
        common.EPOCH.fill_(epoch)
        first, second = cbsa.endless(labelled), cbsa.endless(unlabelled)
        taken.append([])
        for _ in range(6):  # three passes over each, in turn
            taken[-1] += [next(first), next(second)]
    views, others = ({tuple(b[2].tolist()): b[0] for b in part} for part in (taken[0], taken[2]))
    for a, b in zip(taken[0], taken[1], strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
    assert len(views) > 6 and views.keys() != others.keys()  # orders
    seen = {}
    for batch in taken[0]:
        for image, index in zip(batch[0], batch[2].tolist(), strict=True):
            seen.setdefault(index, []).append(image)
    assert sorted(seen) == [*range(16)] and all(len(some) == 3 for some in seen.values())
    changed = 0
    for first, second, third in seen.values():
        changed += (not torch.equal(first, second)) + (not torch.equal(second, third))
    assert changed > 25  # of 32 views


def test_batches_pass_over_the_larger_part(monkeypatch, tmp_path):
    kept = set(np.random.RandomState(1).permutation(40)[:12].tolist())
    for epoch, seen in enumerate(batches(monkeypatch, tmp_path / "run"), start=1):
        labelled = [index for known, index in seen if known]
        others = [index for known, index in seen if not known]
        assert len(labelled) == 2 and all(len(i) == 5 and set(i) <= kept for i in labelled)
        if epoch == 1:  # the warm-up
            assert not others
        else:
            once = sum(others[:2], [])  # without a smaller last batch
            assert len(set(once)) == 22 and not kept & set(once)


def test_supervised_only_never_sees_an_unlabelled_image(monkeypatch, tmp_path):
    seen = batches(monkeypatch, tmp_path / "run", "--no-unlabelled")
    kept = set(np.random.RandomState(1).permutation(40)[:12].tolist())
    assert all(known for epoch in seen for known, _ in epoch)
    assert [len(epoch) for epoch in seen] == [2, 2, 2]  # as many steps as with the unlabelled
    assert {i for epoch in seen for _, index in epoch for i in index} == kept


def test_teacher_is_the_closed_form_of_the_moving_average(monkeypatch, tmp_path):
    students, update = [], cbsa.AveragedModel.update_parameters

    def record(self, net):
        students.append(net.visual.attnpool.c_proj.weight.detach().clone().double())
        update(self, net)

    monkeypatch.setattr(cbsa.AveragedModel, "update_parameters", record)
    state = train("--ema 0.8 --lr 1e-2", monkeypatch, tmp_path / "run")
    last = len(students) - 1
    expected = 0.8**last * students[0]
    expected += sum(0.2 * 0.8 ** (last - t) * students[t] for t in range(1, last + 1))
    average = state["model"]["module.visual.attnpool.c_proj.weight"]
    torch.testing.assert_close(average, expected.float(), rtol=1e-4, atol=1e-5)
    assert state["model"]["n_averaged"] == len(students)
    assert not torch.equal(students[0], students[-1])


def test_learning_rate_cycle_ends_with_the_run(monkeypatch, tmp_path):
    state = train("", monkeypatch, tmp_path / "run")
    assert state["scheduler"]["last_epoch"] == state["scheduler"]["total_steps"] > 0


def test_biases_start_where_the_mean_logit_is_that_of_the_prior(monkeypatch, tmp_path, rng):
    """The three zero-shot mAPs are those of the network with these biases."""
    args, net = small_net("--limit 24 --size 64 --batch-size 10")
    task = common.load_task(args, None, "cbsa", common.hide_images)
    prior = 0.1 + 0.8 * torch.rand(16, generator=rng)
    entry = cbsa.zero_shot(net, task, task.test_loader, prior, "fp32")
    (logits,) = common.outputs(lambda x: net(x)[:1], task.test_loader, net.bias.device)
    torch.testing.assert_close(logits.mean(0), torch.log(prior / (1 - prior)), rtol=1e-4, atol=1e-4)
    for name, alpha in (("mAP_image", 0.0), ("mAP_local", 1e6), ("mAP", 0.5)):
        net.alpha.data.fill_(alpha)
        assert entry[name] == cbsa.evaluate(net, task, "fp32")[0]["mAP"]


def test_zero_shot_order_does_not_hang_on_the_first_biases(rng):
    """The biases move whole columns: each class's AP before training is CLIP's own."""
    _, net = small_net()
    images = random_images(rng, n=6)
    before = net(images)[0].argsort(0)
    net.bias.data.normal_()
    assert torch.equal(net(images)[0].argsort(0), before)


# ------------------------------------------------------------------------------------ the toy CLIP


def test_toy_clip_is_made_as_its_file_says(tmp_path):
    """A few steps of its recipe: a folder that open_clip loads, of the size that is committed."""
    toy.make_clip(tmp_path / "clip", steps=2, number=100, batch=8)
    net, tokenize = common.load_clip(f"local-dir:{tmp_path}/clip", "default", 128)
    words = net.token_embedding.weight.abs().sum(1) > 0
    assert 20 < words.sum() < 100  # rows that no prompt uses are 0
    assert words[common.prompt_tokens(tokenize, toy.REGION, toy.CLASSES)].all()
    committed = Path(toy.__file__).parent / "toy_clip"
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        assert (committed / name).stat().st_size == (tmp_path / "clip" / name).stat().st_size


def test_toy_report_ranks_a_clip_and_its_probes(monkeypatch, capsys):
    world = toy.load(800)
    monkeypatch.setattr(toy, "load", lambda: world)
    toy.report("local-dir:tests/toy_clip")
    lines = dict(line.split(": mAP ") for line in capsys.readouterr().out.splitlines())
    zero_shot, probe, few = map(float, lines.values())
    assert [*lines] == ["zero-shot", "linear probe, 100% known", "linear probe, 10% known"]
    assert 40 < zero_shot < probe and few < probe <= 100


def test_linear_probe_learns_known_entries_only(rng):
    f, y = torch.rand(300, 12, generator=rng).numpy(), random_labels(rng, 300, 4).numpy()
    y[:, 3] = -abs(y[:, 3])  # without a positive
    logits, known = toy.linear_probe(f, y, f[:50], 1), y[:, 0] != 0
    assert (abs(logits[:, :3]) < 100).all() and (logits[:, 3] == -1e4).all()
    x, f[~known] = f[:50].copy(), 0  # what nobody labelled has no part in it
    np.testing.assert_allclose(toy.linear_probe(f, y[:, :1], x, 1), logits[:, :1])


@pytest.fixture(scope="module")
def pictured():
    """The network that a first run starts from; f, u and labels of 300 scenes of no data set."""
    args = cbsa.parse_args([])[0]
    net = cbsa.build(args, toy.CLASSES, torch.zeros(16, 1)).eval()
    images, y, _ = toy.scenes(300, 77)
    data = common.ImageDataset(images, y, common.make_transform(args.size))
    args.batch_size = 50
    features = lambda x: common.clip_features(net.visual, x)  # noqa: E731
    return net, *common.outputs(features, common.make_loader(data, args), net.bias.device), y


def zero_shot(net, f, u, alpha, y):
    h, _ = cbsa.label_features(f, u, net.where, alpha, net.tau)
    return common.average_precision((h * net.what).sum(-1).numpy(), y).mean()


def test_toy_clip_knows_words_and_pictures(pictured):
    """What every first run starts from: a mediocre ranking, zero-shot mAP 72.4 on 1,000 scenes."""
    net, f, u, y = pictured
    assert 60 < zero_shot(net, f, u, 0, y) < 85


def test_the_mix_starts_at_least_at_the_image_feature(pictured):
    net, f, u, y = pictured
    assert zero_shot(net, f, u, net.alpha.item(), y) >= zero_shot(net, f, u, 0, y)


# -------------------------------------------------------------------------- the run as a whole


def test_first_line_has_three_zero_shots_and_eval_gives_the_logits(monkeypatch, tmp_path):
    """Contexts are in the checkpoint: the membership is not made anew, and it matters."""
    found, original = [], cbsa.evaluate

    def record(*arguments):
        found.append(original(*arguments))
        return found[-1]

    monkeypatch.setattr(cbsa, "evaluate", record)
    state = train("", monkeypatch, tmp_path / "run")["model"]
    first = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[1])
    shown = [first[name] for name in ("mAP_image", "mAP_local", "mAP")]
    assert shown == [metrics["mAP"] for metrics, _ in found[:3]] and len(set(shown)) == 3
    member = state["module.member"]
    assert member.shape == (16, 4) and (member.sum(1) == 1).all()
    assert (state["module.kappa"] * state["module.context.weight"]).any()
    monkeypatch.setattr(cbsa, "find_contexts", None)
    again = ["cbsa.py", "--eval", "--resume", str(tmp_path / "run/last.pt")]
    monkeypatch.setattr("sys.argv", again)
    cbsa.main()
    logits = np.load(tmp_path / "run/predictions.npz")["logits"]
    assert len(found) == 8 and np.array_equal(logits, found[6][1]) and len(logits) == 40
