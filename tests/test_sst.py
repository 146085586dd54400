# SPDX-License-Identifier: MIT
"""The equations of SST against literal loops, the traps of partial labels, words and trunks."""

import copy
import inspect
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor

import sst
from common import hide_entries
from tests.conftest import double, random_images, random_labels, same
from tests.toy import world

B, C, D = 6, 5, 7
IMAGES, TRUTH, _ = world.scenes(16, 0)
SCENES = list(zip(torch.tensor(IMAGES).permute(0, 3, 1, 2), range(16), strict=True))
HALF = torch.tensor(hide_entries(TRUTH, 0.5, 0))
ALONE = F.pad(HALF[2:3], (0, 0, 2, 13))  # nothing is known of the other images


def network(y, *flags):
    """Settings and a new network for labels y, always from the same random numbers."""
    args, _ = sst.parse_args(["--width", "16", "--theta", "0.6", *flags])
    torch.manual_seed(0)
    net = sst.build(args, world.CLASSES, y.numpy(), None)
    net.phi_intra[6].weight.data *= 20  # pairs that differ from the start
    return args, net


def train(args, net, y, size=16, epoch=60):
    """An epoch, a late one, over the scenes, the last ones first: losses, completed labels."""
    collate = partial(sst.collate, y=y, unknown=-1 if args.pairs == "all" else 0)
    loader = DataLoader(SCENES, size, sampler=range(16)[::-1], collate_fn=collate)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    entry, completed = sst.train_one_epoch(net, net, loader, optimizer, epoch, args)
    return {k: entry[k] for k in entry if k.startswith("loss")}, torch.tensor(completed)


def outcome(*flags):
    """What an epoch of a new network gives, and which entries of its state it moves."""
    args, net = network(HALF, *flags)
    before = copy.deepcopy(net.state_dict())
    losses, completed = train(args, net, HALF)
    moved = {k for k, value in net.state_dict().items() if not torch.equal(value, before[k])}
    return losses | dict(completed=completed, prototypes=net.prototypes, moved=moved)


def agree(ours, literal, x):
    """Both functions of x, in float64, have the same value and the same gradient."""
    x.requires_grad_()
    a, b = ours(x), literal(x)
    torch.testing.assert_close((a, *torch.autograd.grad(a, x)), (b, *torch.autograd.grad(b, x)))


def test_semantic_decoupling_is_the_attention_of_ssgrl(rng):
    module = sst.SemanticDecoupling(double(rng, C, 9), D).double()
    x = double(rng, 2, 4, D)
    for b, c in product(range(2), range(C)):
        word = module.word(module.words[c])
        weights = [module.attention(torch.tanh(module.image(z) * word)).exp() for z in x[b]]
        expected = sum(weight * z for weight, z in zip(weights, x[b], strict=True)) / sum(weights)
        torch.testing.assert_close(module(x)[b, c], expected)


def test_gated_graph_has_the_messages_and_gates_of_ssgrl(rng):
    adjacency = torch.rand(C, C, generator=rng, dtype=torch.float64)
    module = sst.GatedGraph(adjacency, D).double()
    f = double(rng, 2, C, D)
    for b in range(2):
        h = f[b]
        for _ in range(3):
            after = []
            for c in range(C):
                out = sum(adjacency[c, k] * h[k] for k in range(C))
                into = sum(adjacency[k, c] * h[k] for k in range(C))
                z, r = torch.sigmoid(module.gates(torch.cat((out, into, h[c])))).split(D)
                new = torch.tanh(module.candidate(torch.cat((out, into, r * h[c]))))
                after.append((1 - z) * h[c] + z * new)
            h = after
        for c in range(C):
            expected = torch.tanh(module.output(torch.cat((h[c], f[b, c]))))
            torch.testing.assert_close(module(f)[b, c], expected)


def test_eq1_pair_logits_are_three_layers_on_both_features(rng):
    net = network(HALF)[1]
    pairs = torch.randint(3 * 16, (2, 20), generator=rng)
    _, f, logits = net(random_images(rng, 64), pairs)
    layers = [layer.double() for layer in net.phi_intra if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in layers] == [32, 8, 16]
    for logit, i, j in zip(logits, *pairs, strict=True):
        both = torch.cat((f[i // 16, i % 16], f[j // 16, j % 16]))
        expected = layers[2](layers[1](layers[0](both.double()).relu()).relu())
        torch.testing.assert_close(logit.double(), expected[0], rtol=1e-4, atol=1e-5)


def test_each_class_has_a_linear_classifier_of_its_own(rng):
    net = network(HALF)[1]
    net.bias.data.normal_()
    logits, f, pair_logits = net(random_images(rng, 64))
    for c in range(16):
        expected = net.graph(f)[:, c] @ net.classifier[c] + net.bias[c]
        torch.testing.assert_close(logits[:, c], expected)
    assert pair_logits is None


def test_a_large_map_is_averaged_and_a_small_one_is_not(rng):
    net = network(HALF)[1].eval()
    seen = []
    net.sarl.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    for size in (64, 112):  # maps of 8 and of 14 positions a side
        net(random_images(rng, size, 1))
    assert seen == [8 * 8, 7 * 7]


def test_bf16_comes_close_to_fp32(rng):
    given = random_images(rng, 64), torch.randint(3 * 16, (2, 20), generator=rng)
    full = network(HALF)[1](*given)
    half = network(HALF, "--precision", "bf16")[1](*given)
    for a, b in zip(full, half, strict=True):
        assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.05 * a.abs().max()


def test_eq2_guesses_by_the_mean_over_known_positives(rng):
    y = random_labels(rng, 40)
    pairs, _ = sst.choose_pairs(y)
    p = torch.rand(pairs.shape[1], generator=rng)
    ours = sst.intra_pseudo_labels(p, pairs, y, 0.6)
    of_pair = {(i, j): value for i, j, value in zip(*pairs.tolist(), p.tolist(), strict=True)}
    for n, i in product(range(40), range(C)):
        others = [j for j in range(C) if y[n, j] == 1 and y[n, i] == 0]
        values = [of_pair[n * C + min(i, j), n * C + max(i, j)] for j in others]
        guessed = values and sum(values) / len(values) >= 0.6
        assert ours[n, i] == (1 if guessed else y[n, i])
    assert (ours != y).sum() > 5


@pytest.mark.parametrize("unknown", [0, -1])
def test_eq4_has_the_pairs_that_labels_or_eq2_ask_for(rng, unknown):
    y = random_labels(rng, 20)
    batch = [(torch.zeros(1), n) for n in range(20)]
    _, labels, _, pairs, target = sst.collate(batch, y, unknown)
    expected = {}
    for n, i, j in product(range(20), range(C), range(C)):
        a, b = int(y[n, i]), int(y[n, j])
        judged = unknown or (a != 0 and b != 0)
        if i < j and (judged or a == 1 or b == 1):
            expected[n * C + i, n * C + j] = 1 if a == b == 1 else -1 if judged else 0
    assert dict(zip(zip(*pairs.tolist(), strict=True), target.tolist(), strict=True)) == expected
    assert pairs.shape[1] == len(expected) and torch.equal(labels, y)


def test_pairs_are_both_or_all():
    with pytest.raises(SystemExit, match="--pairs is both or all"):
        sst.main(*sst.parse_args(["--pairs", "known"]))


def test_eq3_and_eq4_ist_loss(rng):
    target = random_labels(rng, 1, 60)[0]

    def literal(x):
        p = torch.sigmoid(x)
        p_m = torch.where(p > 0.05, p - 0.05, 0)
        co_occurs = -((1 - p) ** 1) * torch.log(p)
        does_not = -(p_m**2) * torch.log(1 - p_m)
        chosen = [(co_occurs if target[k] == 1 else does_not)[k] for k in range(60) if target[k]]
        return sum(chosen) / (2 * 45)

    agree(lambda x: sst.ist_loss(x, target, 2, 10), literal, 3 * double(rng, 60))


def test_eq7_and_eq8_cst_loss(rng):
    y = random_labels(rng)

    def literal(f):
        kinds = ([], [])
        for n, m, c in product(range(B), range(B), range(C)):
            if n != m and y[n, c] != 0 and y[m, c] != 0:
                s = f[n, c] @ f[m, c] / (f[n, c].norm() * f[m, c].norm())
                both = y[n, c] == 1 and y[m, c] == 1
                kinds[both].append(1 - s if both else 1 + s)
        return sum(sum(terms) / len(terms) for terms in kinds)

    agree(lambda f: sst.cst_loss(F.normalize(f, dim=-1), y), literal, double(rng, B, C, D))


def test_eq6_guesses_by_the_mean_cosine_with_known_positives(rng):
    y = random_labels(rng, 40)
    y[:, 2].clamp_(max=0)
    u = F.normalize(double(rng, 40, C, D) + 0.7, dim=-1)
    banks = [u[y[:, c] == 1, c] for c in range(C)]
    prototypes = torch.stack([bank.sum(0) / max(1, len(bank)) for bank in banks])
    ours = sst.cross_pseudo_labels(u, y, prototypes, 0.3)
    for n, c in product(range(40), range(C)):
        guessed = y[n, c] == 0 and len(banks[c]) and (banks[c] @ u[n, c]).mean() >= 0.3
        assert ours[n, c] == (1 if guessed else y[n, c])
    assert (ours != y).sum() > 5


def test_eq9_partial_bce(rng):
    y = random_labels(rng)
    y[0] = 0

    def literal(x):
        p = torch.sigmoid(x)
        total = 0
        for n, c in product(range(B), range(C)):
            term = {1: torch.log(p), -1: torch.log(1 - p), 0: 0 * p}[int(y[n, c])][n, c]
            total = total - term / max(1, int(y[n].abs().sum()))
        return total / B

    agree(lambda x: sst.partial_bce(x, y), literal, double(rng, B, C))


def test_no_label_is_guessed_before_epoch_6_and_then_the_threshold_falls():
    falling = [0.95, 0.925, 0.9, 0.875, 0.85, 0.825, 0.8, 0.775]
    schedule = [sst.threshold(epoch, 0.75) for epoch in range(1, 21)]
    assert schedule == pytest.approx([np.inf] * 5 + falling + [0.75] * 7)
    assert torch.equal(train(*network(HALF), HALF, epoch=5)[1], HALF)


def test_cooccurrence_counts_known_labels_only(rng):
    y = random_labels(rng, 30)
    y[:, 3:] = torch.tensor([0, -1])
    p = sst.cooccurrence(y)
    for i, j in product(range(C), range(C)):
        seen = [int(row[j]) for row in y if row[i] == 1 and row[j] != 0 and i != j]
        assert p[i, j] == pytest.approx(seen.count(1) / max(1, len(seen)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [sst.partial_bce, lambda x, y: sst.ist_loss(x, y, 3, 3)])
def test_losses_of_large_logits_are_finite(dtype, loss):
    x = torch.tensor([[-1e4, 1e4, 0]] * 3, dtype=dtype, requires_grad=True)
    value = loss(x, torch.tensor([[1] * 3, [0] * 3, [-1] * 3]))
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all()


def test_eq10_and_eq11_are_what_is_logged_and_what_the_gradient_follows():
    args, net = network(HALF, "--lambda-1", "2", "--lambda-2", "0.5")
    train(args, net, HALF)  # leaves prototypes
    twin = copy.deepcopy(net)
    losses, completed = train(args, net, HALF)
    images, y, index, pairs, target = sst.collate(SCENES, HALF, 0)
    twin.zero_grad()
    logits, f, pair_logits = twin(images, pairs)
    u = F.normalize(f, dim=-1)
    intra = sst.intra_pseudo_labels(torch.sigmoid(pair_logits), pairs, y, 0.6)
    cross = sst.cross_pseudo_labels(u, y, twin.prototypes, 0.6)
    loss_cls = sum(sst.partial_bce(logits, labels) for labels in (y, intra, cross))
    loss_ist = sst.ist_loss(pair_logits, target, *y.shape)
    loss_cst = sst.cst_loss(u, y)
    loss = loss_cls + 2 * loss_ist + 0.5 * loss_cst
    loss.backward()
    expected = [loss.item(), loss_cls.item(), loss_ist.item(), loss_cst.item()]
    assert list(losses.values()) == pytest.approx(expected)
    assert torch.equal(completed[index], torch.maximum(intra, cross))
    assert len({int(labels.sum()) for labels in (y, intra, cross, completed)}) == 4
    for ours, literal in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, literal.grad, rtol=1e-3, atol=1e-5)


def test_prototypes_are_the_mean_unit_features_of_the_epoch_before(monkeypatch):
    y = HALF.clone()
    y[:, 3].clamp_(max=0)
    args, net = network(y)
    seen = []
    record = lambda u, y, prototypes, _: seen.append((u, y, prototypes.clone())) or y  # noqa: E731
    monkeypatch.setattr(sst, "cross_pseudo_labels", record)
    for _ in range(2):
        train(args, net, y, size=8)
    for steps, left in ((seen[:2], seen[2][2]), (seen[:2], seen[3][2]), (seen[2:], net.prototypes)):
        for c in range(16):
            bank = [u[n, c] for u, labels, _ in steps for n in range(8) if labels[n, c] == 1]
            torch.testing.assert_close(left[c], sum(bank, torch.zeros(16)) / max(1, len(bank)))
    assert not net.prototypes[3].any() and net.prototypes.any(1).sum() > 10


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--no-ist", {"loss_cst", "prototypes"}),
        ("--no-cst", {"loss_ist", "completed"}),  # in a first epoch no prototype guesses
        ("--pairs all", {"loss_cls", "loss_cst", "completed", "prototypes", "moved"}),
        ("--theta 0.9", {"loss_ist", "loss_cst", "prototypes", "moved"}),
    ],
)
def test_a_flag_changes_what_it_says_and_nothing_else(flags, kept):
    default = outcome()
    other = outcome(*flags.split())
    assert {name for name in default if same(default[name], other[name])} == kept


def test_a_step_moves_what_learns_and_no_more():
    full = outcome()["moved"]
    without = outcome("--no-ist", "--no-cst")["moved"]
    norms = {name.split(".")[0] for name in full if "running" in name}
    assert norms == {"trained", "norm"} and not any("frozen" in name for name in full)
    assert {name.split(".")[0] for name in full - without} == {"phi_intra", "prototypes"}


@pytest.mark.parametrize("y", [HALF * 0, ALONE, HALF.clamp(max=0), HALF.clamp(min=0)])
def test_labels_at_the_edge_leave_losses_and_weights_finite(y):
    args, net = network(y, "--theta", "0.01")
    for _ in range(2):
        losses, completed = train(args, net, y)
    assert np.isfinite(list(losses.values())).all()
    assert all(value.isfinite().all() for value in net.state_dict().values())
    assert (y == 1).any() or torch.equal(completed, y)
    assert y.any() or not any(losses.values())


def test_hidden_labels_do_not_leak_into_training(monkeypatch, tmp_path):
    y = hide_entries(TRUTH, 0.3, 0)
    monkeypatch.setattr(sst, "threshold", lambda epoch, lowest: lowest)
    monkeypatch.setattr(sst, "pseudo_metrics", lambda pseudo, *_: dict(pseudo=pseudo.tolist()))

    def run(truth, out):
        parts = dict(train=truth, test=TRUTH)
        load = lambda data, root, part, **_: (world.CLASSES, IMAGES, parts[part])  # noqa: E731
        monkeypatch.setattr(sst, "load_data", load)
        flags = "--known 0.3 --epochs 2 --width 16 --batch-size 8 --theta 0.4 --device cpu --out"
        sst.main(*sst.parse_args([*flags.split(), out]))
        state = torch.load(f"{out}/last.pt")
        return state["model"], [(entry["loss"], entry["pseudo"]) for entry in state["log"][1:]]

    once = run(TRUTH, f"{tmp_path}/a")
    assert same(once, run(np.where(y == 0, -TRUTH, TRUTH), f"{tmp_path}/b"))
    assert (np.array(once[1][0][1]) != y).any()


def test_pieces_that_are_copied_out_run_alone_and_give_the_same_numbers(monkeypatch):
    whole = outcome()
    pieces = "SemanticDecoupling GatedGraph ist_loss cst_loss partial_bce cooccurrence threshold"
    for name in f"{pieces} choose_pairs intra_pseudo_labels cross_pseudo_labels".split():
        alone = dict(torch=torch, F=F, nn=nn)
        exec(inspect.getsource(getattr(sst, name)), alone)
        monkeypatch.setattr(sst, name, alone[name])
    assert same(outcome(), whole)


@pytest.mark.parametrize("width", [2, 300])
def test_words_of_a_text_are_means_over_the_words_of_a_name(tmp_path, width):
    rows = dict(tv=1, monitor=3, other=9, zebra=5)
    lines = [" ".join([word, *[f"{v}.5"] * width]) for word, v in rows.items()]
    (tmp_path / "words.txt").write_text("\n".join(lines))
    words = sst.read_words(f"{tmp_path}/words.txt", "coco", ["tvmonitor", "Zebra", "tv_other"])
    assert words.tolist() == [[v] * width for v in (2.5, 5.5, 5.5)]


@pytest.mark.parametrize("data", ["coco", "voc2007", "voc2012"])
def test_words_that_come_along_are_the_rows_of_an_array(data):
    file = f"glove.840B.300d.{data.replace('2012', '2007')}.npy"
    rows = torch.tensor(np.load(world.HERE / file))
    assert torch.equal(sst.read_words("auto", data, ["a"] * len(rows)), rows)


@pytest.mark.parametrize(("path", "data"), [("none", "coco"), ("auto", "folder")])
def test_words_are_random_where_there_is_no_file(path, data):
    words = sst.read_words(path, data, ["a"] * 20)
    assert words.shape == (20, 300) and (words.std(1) > 0.8).all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("a.npy", r"\(4, 2\) for 3 classes"), ("b.npy", "1-dimensional"), ("a.txt", "'zebra'")],
)
def test_words_that_do_not_fit_end_in_a_line_that_names_them(tmp_path, name, reason):
    np.save(tmp_path / "a.npy", np.zeros((4, 2)))
    np.save(tmp_path / "b.npy", np.zeros(3))
    (tmp_path / "a.txt").write_text("dog 1 2\ncat 3 4")
    with pytest.raises(SystemExit, match=f"^.*{name}.*{reason}.*$") as end:
        sst.read_words(f"{tmp_path}/{name}", "coco", ["cat", "zebra", "dog"])
    assert "\n" not in str(end.value)


@pytest.mark.parametrize("case", ["toy default", "resnet18 none", "resnet18 file"])
def test_a_trunk_is_split_before_its_last_stage(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arch, weights = case.split()
    torch.manual_seed(0)
    whole = world.load_trunk() if arch == "toy" else get_model(arch)
    torch.save(whole.state_dict(), "file")
    torch.manual_seed(weights == "file")  # none: the random weights of whole
    frozen, trained = sst.load_trunk(arch, weights)
    x = torch.rand(1, 3, 64, 64)
    expected = create_feature_extractor(whole.eval(), ["layer4"])(x)["layer4"]
    assert torch.equal(trained.eval()(frozen.eval()(x)), expected)
    assert same(trained.state_dict(), whole.layer4.state_dict())


@pytest.mark.parametrize("case", ["shufflenet_v2_x0_5 none", "resnet18 damaged"])
def test_a_trunk_that_cannot_be_used_is_refused_in_a_line(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").write_text("no weights")
    arch, weights = case.split()
    with pytest.raises(SystemExit, match=f"--arch {arch} --weights {weights} cannot be") as end:
        sst.load_trunk(arch, weights)
    assert "\n" not in str(end.value)


def test_a_checkpoint_needs_no_weights_of_a_trunk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, _ = sst.parse_args("--data coco --glove none --arch resnet18 --weights file".split())
    torch.save(get_model("resnet18").state_dict(), "file")
    net = sst.build(args, ["cat", "dog"], HALF[:, :2].numpy(), None)
    (tmp_path / "file").unlink()
    again = sst.build(args, ["cat", "dog"], None, dict(model=net.state_dict()))
    assert same(again.state_dict(), net.state_dict())
