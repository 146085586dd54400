# SPDX-License-Identifier: MIT
"""SCINet: prompter, graphs, fusion and consistency against literal readings and closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import scinet
from tests import toy
from tests.conftest import double, random_images, random_labels, unit

B, C, D, N = 4, 5, 8, 9


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def small_net(flags="", weights="none"):
    torch.manual_seed(0)
    args = scinet.parse_args(f"--weights {weights} {flags}".split())[0]
    return args, scinet.build(args, toy.CLASSES).eval()


# ------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("arch", ["local-dir:tests/toy_clip", "RN50-quickgelu"])
def test_prompt_starts_as_the_text_feature_of_clip(arch):
    torch.manual_seed(0)
    clip, tokenize = common.load_clip(arch, "none", 96)
    tokens = common.prompt_tokens(tokenize, "a photo of a {}", toy.CLASSES)
    expected = clip.encode_text(tokens, normalize=True)
    torch.testing.assert_close(scinet.PromptEncoder(clip, tokens)(), expected)


def test_ranking_at_the_start_is_clips_own_without_the_visual_half(rng):
    _, net = small_net("--no-visual-dominant")
    images = random_images(rng, n=5)
    means = net.visual.preprocess_cfg["mean"], net.visual.preprocess_cfg["std"]
    clip = F.normalize(net.visual(common.normalise(images, *means)), dim=-1)
    torch.testing.assert_close(net(images)[0], net.gamma * clip @ net.prompt().T)
    torch.testing.assert_close(net(images)[1], clip)


def test_logits_at_the_start_against_their_formula(rng):
    """W is 0: one half is CLIP's cosine; beta is 1 and the temperature 0.1: the other attends."""
    _, net = small_net()
    images = random_images(rng, n=2)
    f, z = common.clip_features(net.visual, images)
    t, logits = net.prompt(), net(images)[0]
    assert net.beta == 1
    for i in range(2):
        for c in range(16):
            attended = ((t[c] @ z[i].T / 0.1).softmax(0)[:, None] * z[i]).sum(0)
            half = F.normalize(f[i] + attended, dim=0) @ t[c]
            expected = net.gamma / 2 * (f[i] @ t[c] + half)
            torch.testing.assert_close(logits[i, c], expected, rtol=1e-4, atol=1e-4)


def test_text_dominant_scores_against_loops(rng):
    f, t, w = unit(rng, B, D), unit(rng, C, D), double(rng, B, D)
    ours = scinet.text_dominant_scores(f, t, w)
    for i in range(B):
        for c in range(C):
            t_ic = (t[c] + w[i]) / (t[c] + w[i]).norm()
            torch.testing.assert_close(ours[i, c], f[i] @ t_ic)


def test_visual_dominant_scores_against_loops(rng):
    f, t, z, beta = unit(rng, B, D), unit(rng, C, D), unit(rng, B, N, D), torch.tensor(0.7).double()
    ours = scinet.visual_dominant_scores(f, t, z, beta, 0.1)
    for i in range(B):
        for c in range(C):
            weight = [math.exp(t[c] @ z[i, u] / 0.1) for u in range(N)]
            f_ic = f[i] + beta * sum(a / sum(weight) * z[i, u] for u, a in enumerate(weight))
            torch.testing.assert_close(ours[i, c], f_ic @ t[c] / f_ic.norm())


def test_halves_can_be_switched_off(rng):
    images = random_images(rng)
    for flags, parameter in (
        ("--no-text-dominant", "up.weight"),
        ("--no-visual-dominant", "beta"),
    ):
        _, net = small_net(flags)
        net(images)[0].square().sum().backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        assert gradients[parameter] is None and gradients["bias"] is not None
        assert not net.state_dict()[parameter].any()


def test_what_learns_is_small_and_the_towers_do_not():
    _, net = small_net()
    learned = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learned == {"prompt.context", "down.weight", "up.weight", "beta", "gamma", "bias"}


# ------------------------------------------------------------------------------------------ graphs


def dense_graph(f, k, sigma):
    n = len(f)
    w = torch.zeros(n, n, dtype=f.dtype)
    for i in range(n):
        distance = (f - f[i]).square().sum(1)
        order = [j for j in distance.argsort().tolist() if j != i][:k]
        for j in order:
            w[i, j] = torch.exp(-distance[j] / (2 * sigma**2))
    w = (w + w.T) / 2
    scale = w.sum(1).rsqrt()
    return scale[:, None] * w * scale


def test_instance_graph_against_a_dense_one(rng):
    f = unit(rng, 40, D).float()
    ours = scinet.instance_graph(f, 4, 0.5).to_dense()
    torch.testing.assert_close(ours, dense_graph(f, 4, 0.5), rtol=1e-4, atol=1e-5)


def check_graph(a):
    torch.testing.assert_close(a, a.T)
    assert (a >= 0).all() and a.isfinite().all()
    assert torch.linalg.eigvalsh(a.double()).abs().max() <= 1 + 1e-5


def test_graphs_are_symmetric_non_negative_and_contract(rng):
    f = unit(rng, 60, D).float()
    f[:5] = f[0]  # the same image five times
    check_graph(scinet.instance_graph(f, 3, 0.3).to_dense())
    far = scinet.instance_graph(f, 3, 0.01).to_dense()  # every other image is too far: weight 0
    check_graph(far)
    p = torch.rand(50, 8, generator=rng)
    p[:, 0], p[:, 1] = 0, 1  # never and always present
    graph = scinet.label_graph(p, 3)
    check_graph(graph)
    assert (graph[:2] == 0).all() and (graph.diagonal() == 0).all() and graph.sum() > 0
    assert ((graph > 0).sum(1) <= 7).all() and scinet.label_graph(p[:, :1], 3).shape == (1, 1)


def test_more_neighbours_than_images_are_refused(rng):
    with pytest.raises(ValueError, match="10 neighbours must be below 10, the images"):
        scinet.instance_graph(unit(rng, 10, D), 10, 0.3)


def test_label_graph_against_numpy(rng):
    """Of each label the two largest positive coefficients; a label that does not vary has none."""
    p = torch.rand(200, C, generator=rng)
    p[:, 1] += p[:, 0]
    p[:, 3] += p[:, 1] - p[:, 2]
    p[:, 4] = 0  # does not vary
    r = np.zeros((C, C))
    for c in range(4):
        for d in range(4):
            r[c, d] = max(0, np.corrcoef(p[:, [c, d]].T.double().numpy())[0, 1]) if c != d else 0
    kept = np.zeros((C, C))
    for c in range(C):
        for d in np.argsort(-r[c])[:2]:
            kept[c, d] = r[c, d]
    kept = (kept + kept.T) / 2
    ours = scinet.label_graph(p, 2)
    for c in range(C):
        for d in range(C):
            both = kept[c].sum() * kept[d].sum()
            expected = kept[c, d] / math.sqrt(both) if both else 0
            assert ours[c, d].item() == pytest.approx(expected, rel=1e-5)
    assert (ours[4] == 0).all() and 0 < (ours > 0).sum() < 12


def test_correlations_come_from_confidences_with_known_labels_filled_in(monkeypatch, tmp_path):
    seen, original = [], scinet.fuse

    def record(s, y, a_n, a_q, *lambdas):
        filled = torch.where(y == 0, s, (y == 1).float())
        assert torch.equal(a_q, scinet.label_graph(filled, 5))
        seen.append((s, original(s, y, a_n, a_q, *lambdas)))
        return seen[-1][1]

    monkeypatch.setattr(scinet, "fuse", record)
    train("", monkeypatch, tmp_path / "run")
    assert len(seen) == 3 and not torch.equal(seen[0][0], seen[1][0])  # S changes, A_q with it


# ------------------------------------------------------------------------------------------ fusion


def fusion_case(rng, n=30):
    f = unit(rng, n, D).float()
    a_n = scinet.instance_graph(f, 4, 0.5)
    y = random_labels(rng, n)
    s = torch.rand(n, C, generator=rng)
    return s, y, a_n, scinet.label_graph(torch.where(y == 0, s, (y == 1).float()), 3)


def test_fixed_point_equals_the_closed_form_without_clamping(rng):
    """S: uniform random scores, of which none is known and none leaves [0, 1]."""
    s, y, a_n, a_q = (v.double() for v in fusion_case(rng))
    y = torch.zeros_like(y).to(torch.int8)
    s = 0.3 + 0.4 * s  # far enough from 0 and 1 to stay inside
    p = scinet.fuse(s, y, a_n, a_q, 1.0, 0.4, steps=200)
    n = len(s)
    # (I (1 + ln + lq) - ln A_n x I - lq I x A_q) vec(P) = vec(S)
    left = 2.4 * torch.eye(n * C).double() - torch.kron(a_n.to_dense(), torch.eye(C).double())
    left -= 0.4 * torch.kron(torch.eye(n).double(), a_q)
    closed = torch.linalg.solve(left, s.flatten()).view(n, C)
    assert 0 < closed.min() and closed.max() < 1
    torch.testing.assert_close(p, closed, rtol=0, atol=1e-6)


def test_fusion_keeps_known_entries_and_stays_in_range(rng):
    s, y, a_n, a_q = fusion_case(rng)
    p = scinet.fuse(s, y, a_n, a_q, 5.0, 5.0)
    assert (p[y == 1] == 1).all() and (p[y == -1] == 0).all() and p.min() >= 0 and p.max() <= 1


def test_fusion_contracts_as_predicted(rng):
    s, y, a_n, a_q = (v.double() for v in fusion_case(rng))
    y = y.to(torch.int8)
    end = scinet.fuse(s, y, a_n, a_q, 0.1, 0.4, steps=100)
    errors = [(scinet.fuse(s, y, a_n, a_q, 0.1, 0.4, k) - end).norm() for k in range(12)]
    assert all(b <= a * (0.5 / 1.5) + 1e-12 for a, b in zip(errors, errors[1:], strict=False))
    assert errors[10] < 1e-4 * errors[0]


def test_without_lambdas_fusion_is_the_score_and_the_known(rng):
    s, y, a_n, a_q = fusion_case(rng)
    p = scinet.fuse(s, y, a_n, a_q, 0.0, 0.0)
    assert torch.equal(p, torch.where(y == 0, s, (y == 1).float()))


def memory_of(s, p, threshold=0.5):
    thresholds = torch.full((s.shape[1],), threshold)
    return scinet.Memory(s, torch.ones(len(s), 1), p, torch.eye(s.shape[1]), thresholds)


def test_diagnostics_against_a_loop(rng):
    """Guesses are of hidden entries; precision and recall leave out what nobody knows."""
    y, truth = random_labels(rng, 50), random_labels(rng, 50)
    s, p = torch.rand(50, C, generator=rng), torch.rand(50, C, generator=rng)
    guessed, judged, right, hidden = 0, 0, 0, 0
    for n in range(50):
        for c in range(C):
            if y[n, c] == 0:
                guess = (s[n, c] + p[n, c]) / 2 >= 0.6
                guessed += guess
                judged += guess and truth[n, c] != 0
                right += guess and truth[n, c] == 1
                hidden += truth[n, c] == 1
    entry = scinet.diagnostics(memory_of(s, p, 0.6), y, truth)
    assert entry["pseudo_per_image"] == pytest.approx((guessed / 50).item())
    assert entry["pseudo_precision"] == pytest.approx((right / judged).item())
    assert entry["pseudo_recall"] == pytest.approx((right / hidden).item())
    other = torch.where(y == 0, truth, -truth)  # the truth of what is known counts not
    assert scinet.diagnostics(memory_of(s, p, 0.6), y, other) == entry
    everything = scinet.diagnostics(memory_of(s, p, 0.6), y.abs() * 2 - 1, truth)
    assert everything["pseudo_per_image"] == 0 and everything["pseudo_recall"] is None


# -------------------------------------------------------------------------------------- the memory


def test_memory_of_an_epoch_against_its_parts(rng):
    """A_q from scores with what is known; P; the sharp graph; thresholds from (P + S) / 2."""
    s, y, a_n, _ = fusion_case(rng)
    s = s.sqrt()  # many high ones
    before = scinet.Memory(s, torch.full((30, 1), 2.0))
    memory = scinet.update_memory(before, y, a_n, 3, 0.1, 0.4, 0.8)
    a_q = scinet.label_graph(torch.where(y == 0, s, (y == 1).float()), 3)
    assert torch.equal(memory.p, scinet.fuse(s, y, a_n, a_q, 0.1, 0.4))
    assert torch.equal(memory.s, s) and torch.equal(memory.seen, before.seen)
    for c in range(C):
        column = [(c == d) + a_q[d, c].item() ** 2 for d in range(C)]
        expected = [value / sum(column) for value in column]
        assert memory.sharp[:, c].tolist() == pytest.approx(expected)
    count = [0] * C
    for n in range(30):
        for c in range(C):
            count[c] += y[n, c] == 0 and (memory.p[n, c] + s[n, c]) / 2 >= 0.8
    assert 0 < sum(count) < (y == 0).sum() and len({int(v) for v in count}) > 1
    expected = scinet.class_thresholds(torch.tensor(count), 0.8)
    torch.testing.assert_close(memory.thresholds, expected)
    assert before.p is None and before.thresholds is None


def test_memory_starts_with_scores_whose_mean_logit_is_that_of_the_prior(rng):
    y, logits = random_labels(rng, 40), torch.randn(40, C, generator=rng) + 3
    net = Given()
    memory = scinet.start_memory(net, logits, y)
    for c in range(C):
        known = [v for v in y[:, c].tolist() if v != 0]
        prior = (known.count(1) + 0.5) / (len(known) + 1)
        bias = math.log(prior / (1 - prior)) - logits[:, c].mean()
        assert net.bias[c].item() == pytest.approx(bias.item(), abs=1e-5)
        torch.testing.assert_close(memory.s[:, c], torch.sigmoid(logits[:, c] + bias))
    assert torch.equal(memory.seen, torch.ones(40, 1))


# ------------------------------------------------------------------------------------- consistency


def test_class_thresholds_against_a_loop():
    count = torch.tensor([0.0, 10, 50, 100])
    ours = scinet.class_thresholds(count, 0.95)
    for c in range(4):
        a = count[c] / 100
        assert ours[c] == pytest.approx(max(0.5, 0.95 * a / (2 - a)))
    assert (scinet.class_thresholds(torch.zeros(4), 0.95) == 0.5).all()


def test_targets_against_a_loop(rng):
    q, y = torch.rand(20, C, generator=rng), random_labels(rng, 20)
    threshold = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.95])
    ours = scinet.targets(q, y, threshold)
    for n in range(20):
        for c in range(C):
            guess = 1 if q[n, c] >= threshold[c] else -1 if 1 - q[n, c] > threshold[c] else 0
            assert ours[n, c] == (y[n, c] if y[n, c] != 0 else guess)


def test_difficulty_weight_against_a_loop(rng):
    p, q = torch.rand(B, C, generator=rng).double(), torch.rand(B, C, generator=rng).double()
    p[0, 0], q[0, 0] = 0, 1
    y = random_labels(rng, B)
    ours = scinet.difficulty_weight(p, q, y)

    def kl(a, b):
        return sum(x * math.log(x / z) for x, z in ((a, b), (1 - a, 1 - b)) if x > 0)

    for n in range(B):
        d = 0
        for c in range(C):
            a, b = p[n, c].item(), q[n, c].item()
            d += (kl(a, (a + b) / 2) + kl(b, (a + b) / 2)) / 2 / C
        for c in range(C):
            assert ours[n, c] == pytest.approx(1 if y[n, c] != 0 else 1 - d / math.log(2))
    assert torch.equal(scinet.difficulty_weight(p, p, y), torch.ones_like(p))


def test_weighted_bce_against_a_loop(rng):
    x, target = double(rng, B, C), torch.rand(B, C, generator=rng, dtype=torch.float64)
    weight = torch.rand(B, C, generator=rng, dtype=torch.float64)
    weight[0] = 0
    total, number = 0, 0
    for n in range(B):
        for c in range(C):
            p = 1 / (1 + math.exp(-x[n, c]))
            t = target[n, c].item()
            total += -weight[n, c].item() * (t * math.log(p) + (1 - t) * math.log(1 - p))
            number += weight[n, c].item() > 0
    assert scinet.weighted_bce(x, target, weight).item() == pytest.approx(total / number)
    assert scinet.weighted_bce(x, target, weight * 0) == 0


def test_consistency_loss_against_a_loop(rng):
    student = double(rng, 20, C)
    teacher, confidence, weight = (
        torch.rand(20, C, generator=rng, dtype=torch.float64) for _ in range(3)
    )
    y, threshold = random_labels(rng, 20), torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9])
    total, number, missed = 0, 0, 0
    for n in range(20):
        for c in range(C):
            q = (teacher[n, c].item() + confidence[n, c].item()) / 2
            if y[n, c] != 0:
                q = float(y[n, c] == 1)
            elif not (q >= threshold[c] or 1 - q > threshold[c]):
                missed += 1
                continue
            p = sigmoid(student[n, c].item())
            total -= weight[n, c].item() * (q * math.log(p) + (1 - q) * math.log(1 - p))
            number += 1
    assert missed > 5
    ours = scinet.consistency_loss(student, teacher, confidence, y, threshold, weight)
    assert ours.item() == pytest.approx(total / number)


# ------------------------------------------------------------------------------------------- traps


SMALL = "--weights none --limit 48 --known 0.3 --batch-size 16 --epochs 3 --ramp 1 --size 64"
SMALL = SMALL.split()


def train(flags, monkeypatch, out):
    monkeypatch.setattr("sys.argv", ["scinet.py", *SMALL, *flags.split(), "--out", str(out)])
    scinet.main()
    return torch.load(out / "last.pt", weights_only=True)


class Given(torch.nn.Module):
    """A network whose logits are its images."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(C))

    def forward(self, images):
        return images + self.bias, images


@pytest.mark.parametrize("flags", ["", "--no-augment"])
def test_scores_are_a_running_mean_over_the_views_that_nothing_was_erased_from(rng, flags):
    """S after epochs 1 and 2: the mean of its start and of the weak views, image by image."""
    args, net, n = scinet.parse_args(flags.split())[0], Given(), 8
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
    start, y = torch.rand(n, C, generator=rng), random_labels(rng, n)
    memory = scinet.Memory(start, torch.ones(n, 1))
    terms = [[row] for row in start]
    for rows in ([[0, 1, 2], [5, 3, 4]], [[7, 3, 1], [0, 2, 4]]):  # 6 is left out twice
        loader = []
        for index in map(torch.tensor, rows):
            views = [torch.randn(3, C, generator=rng) for _ in range(1 if flags else 3)]
            loader.append((*views, y[index], index))
            for k, row in zip(index, torch.sigmoid(views[0]), strict=True):
                terms[k].append(row)
        p = torch.rand(n, C, generator=rng)
        memory = replace(memory_of(memory.s, p), seen=memory.seen)
        _, memory = scinet.train_one_epoch(net, loader, optimizer, scheduler, memory, 1, args)
        expected = torch.stack([torch.stack(some).mean(0) for some in terms])
        torch.testing.assert_close(memory.s, expected)
        assert memory.seen[:, 0].tolist() == [len(some) for some in terms]
    assert sorted(map(len, terms)) == [1, 2, 2, 3, 3, 3, 3, 3]


def test_both_halves_move_in_a_toy_run(monkeypatch, tmp_path):
    """At the rates of the recipe; smaller images and batches, so that it is a short run."""
    flags = "--weights default --limit 160 --known 0.1 --epochs 4 --no-augment"
    state = train(flags, monkeypatch, tmp_path / "run")["model"]
    images, _, _ = toy.scenes(40, 3)
    _, net = small_net("--size 64", "default")
    data = common.ImageDataset(images, np.zeros((40, 1)), common.make_transform(64))
    loader = torch.utils.data.DataLoader(data, 40)
    f = common.outputs(net, loader, net.bias.device)[1]
    moved = (f @ state["down.weight"].T @ state["up.weight"].T).norm(dim=1)  # |W f|, |t_c| is 1
    assert abs(state["beta"] - 1) > 0.1 and moved.mean() > 0.05


def test_towers_are_bit_identical_after_training(monkeypatch, tmp_path):
    _, before = small_net("--size 64")
    state = train("", monkeypatch, tmp_path / "run")["model"]
    start = before.state_dict()
    moved = {k for k in start if not torch.equal(state[k], start[k])}
    assert moved == {"prompt.context", "down.weight", "up.weight", "beta", "bias", "gamma"}


def test_the_easier_view_teaches_and_gets_no_gradient(monkeypatch, tmp_path):
    """Of the logits of L_a only the medium view learns, of L_b only the strong one; the teachers
    are the weak view and the medium one."""
    seen, original = [], scinet.weighted_bce

    def record(logits, target, weight):
        assert not target.requires_grad and not weight.requires_grad
        seen.append(logits)
        return original(logits, target, weight)

    monkeypatch.setattr(scinet, "weighted_bce", record)
    teachers, consistency = [], scinet.consistency_loss

    def listen(student, teacher, *rest):
        teachers.append(teacher)
        return consistency(student, teacher, *rest)

    monkeypatch.setattr(scinet, "consistency_loss", listen)
    marks, chunk = [], torch.Tensor.chunk

    def watch(self, number, *rest):
        parts = chunk(self, number, *rest)
        if number == 3 and self.requires_grad and self.dim() == 2:  # logits, no bias of attention
            marks.append(parts)
        return parts

    monkeypatch.setattr(torch.Tensor, "chunk", watch)
    train("", monkeypatch, tmp_path / "run")
    steps = [seen[k : k + 4] for k in range(0, len(seen), 4)]
    assert len(steps) == len(marks) == 9
    for (known, a, b, itself), (weak, medium, strong) in zip(steps, marks, strict=True):
        assert known is weak and a is medium and b is strong and itself is weak
    pairs = zip(teachers[::2], teachers[1::2], strict=True)
    for (of_medium, of_strong), (weak, medium, _) in zip(pairs, marks, strict=True):
        assert torch.equal(of_medium, torch.sigmoid(weak))
        assert torch.equal(of_strong, torch.sigmoid(medium))


def test_views_get_ever_harder(monkeypatch, tmp_path):
    """Mark what each view's own transform did: none, the medium one, the strong one."""
    monkeypatch.setattr(
        scinet.v2, "RandomErasing", lambda p, _: lambda image: torch.full_like(image, int(p * 10))
    )
    batches, original = [], scinet.train_one_epoch

    def record(net, loader, *rest):
        batches.extend(loader)
        return original(net, loader, *rest)

    monkeypatch.setattr(scinet, "train_one_epoch", record)
    train("--epochs 1", monkeypatch, tmp_path / "run")
    for weak, medium, strong, _, _ in batches:
        assert weak.unique().numel() > 2 and (medium == 5).all() and (strong == 10).all()


def test_known_labels_only_has_one_view_and_no_other_loss(monkeypatch, tmp_path):
    state = train("--no-augment", monkeypatch, tmp_path / "run")
    assert state["epoch"] == 3
    lines = (tmp_path / "run" / "log.jsonl").read_text()
    assert "loss_known" in lines and "loss_medium" not in lines and "loss_self" not in lines


def test_the_losses_of_a_step_add_up(rng):
    """L_known + ramp (lambda_u (L_a + L_b) + lambda_s L_self), each part against its formula."""
    args, net, n = scinet.parse_args(["--ramp", "4"])[0], Given(), 8
    args.lambda_u, args.lambda_s = 0.7, 0.3
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
    y = random_labels(rng, n)
    p = torch.rand(n, C, generator=rng)
    sharp = torch.rand(C, C, generator=rng) / C
    memory = replace(memory_of(p, p, 0.6), sharp=sharp)
    weak, medium, strong = (torch.randn(n, C, generator=rng) for _ in range(3))
    loader = [(weak, medium, strong, y, torch.arange(n))]
    entry, _ = scinet.train_one_epoch(net, loader, optimizer, scheduler, memory, 2, args)
    easy, hard = torch.sigmoid(weak), torch.sigmoid(strong)
    weight = scinet.difficulty_weight(easy, hard, y)
    given = (p, y, memory.thresholds, weight)
    expected = dict(
        loss_known=F.binary_cross_entropy_with_logits(weak[y != 0], (y[y != 0] == 1).float()),
        loss_medium=scinet.consistency_loss(medium, easy, *given),
        loss_strong=scinet.consistency_loss(strong, torch.sigmoid(medium), *given),
        loss_self=scinet.weighted_bce(weak, easy @ sharp, weight * (y == 0)),
    )
    for name, value in expected.items():
        assert entry[name] == pytest.approx(value.item(), rel=1e-5) != 0
    more = 0.7 * (entry["loss_medium"] + entry["loss_strong"]) + 0.3 * entry["loss_self"]
    assert entry["loss"] == pytest.approx(entry["loss_known"] + more / 4, rel=1e-5)
