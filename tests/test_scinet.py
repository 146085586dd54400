# SPDX-License-Identifier: MIT
"""SCINet: prompter, graphs, fusion and consistency against literal readings and closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

import common
import scinet
from common import InputError
from tests import toy
from tests.conftest import double, random_images, random_labels, unit

B, C, D, N = 4, 5, 8, 9


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
    """W is 0: one half is CLIP's cosine; beta is 1 and tau_u 0.1: the other attends."""
    args, net = small_net()
    images = random_images(rng, n=2)
    f, z = common.clip_features(net.visual, images)
    t, logits = net.prompt(), net(images)[0]
    assert net.beta == 1 and args.tau_u == 0.1
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
    with pytest.raises(InputError, match="--neighbours 10"):
        scinet.instance_graph(unit(rng, 10, D), 10, 0.3)


def test_pearson_against_numpy(rng):
    p = torch.rand(200, C, generator=rng)
    p[:, 1] += p[:, 0]
    p[:, 4] = 0  # does not vary
    r = scinet.pearson(p)
    for c in range(C):
        for d in range(C):
            if 4 in (c, d):
                assert r[c, d] == 0
            else:
                expected = np.corrcoef(p[:, [c, d]].T.double().numpy())[0, 1]
                assert r[c, d].item() == pytest.approx(expected)


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


def test_hidden_map_looks_at_hidden_entries_only(rng):
    y, truth = random_labels(rng, 50), 2 * torch.randint(2, (50, C), generator=rng) - 1
    p = torch.where(y == 0, (truth == 1).float(), torch.rand(50, C, generator=rng))
    assert scinet.hidden_map(p, y, truth) == pytest.approx(100)
    assert scinet.hidden_map(1 - p, y, truth) < 60


def test_hidden_map_counts_what_nobody_knows_nowhere(rng):
    y, truth = random_labels(rng, 50), random_labels(rng, 50)
    y[:, 0], truth[:, 0] = 0, torch.where(truth[:, 0] == 1, 0, truth[:, 0])  # no positive: left out
    p = torch.rand(50, C, generator=rng)
    value, ap = scinet.hidden_map(p, y, truth), []
    for c in range(1, C):
        judged = (y[:, c] == 0) & (truth[:, c] != 0)
        ap.append(average_precision_score(truth[judged, c] == 1, p[judged, c]))
    assert value == pytest.approx(100 * np.mean(ap))
    other = torch.where(truth == 0, torch.rand(50, C, generator=rng), p)
    assert scinet.hidden_map(other, y, truth) == value


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
    memory = dict(s=start, seen=torch.ones(n, 1), count=torch.zeros(C, dtype=torch.long))
    memory |= dict(p=torch.rand(n, C, generator=rng), sharp=torch.eye(C))
    terms = [[row] for row in start]
    for rows in ([[0, 1, 2], [5, 3, 4]], [[7, 3, 1], [0, 2, 4]]):  # 6 is left out twice
        loader = []
        for index in map(torch.tensor, rows):
            views = [torch.randn(3, C, generator=rng) for _ in range(1 if flags else 3)]
            loader.append((*views, y[index], index))
            for k, row in zip(index, torch.sigmoid(views[0]), strict=True):
                terms[k].append(row)
        scinet.train_one_epoch(net, loader, optimizer, scheduler, memory, y, 1, args)
        expected = torch.stack([torch.stack(some).mean(0) for some in terms])
        torch.testing.assert_close(memory["s"], expected)
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
    frozen = [k for k in state if k.startswith(("visual.", "prompt.tower."))]
    moved = [k for k in ("prompt.context", "up.weight", "beta") if k in state]
    start = before.state_dict()
    assert len(frozen) > 50 and all(torch.equal(state[k], start[k]) for k in frozen)
    assert len(moved) == 3 and not any(torch.equal(state[k], start[k]) for k in moved)


def test_the_easier_view_teaches_and_gets_no_gradient(monkeypatch, tmp_path):
    """Of the logits of L_a only the medium view learns, of L_b only the strong one."""
    seen, original = [], scinet.weighted_bce

    def record(logits, target, weight):
        assert not target.requires_grad and not weight.requires_grad
        seen.append(logits)
        return original(logits, target, weight)

    monkeypatch.setattr(scinet, "weighted_bce", record)
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
    assert "loss_known" in lines and "loss_a" not in lines
