# SPDX-License-Identifier: MIT
"""The files as a reader meets them: short, and with a middle that runs when it is copied."""

import ast
import io
import sys
import tokenize
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from tests.conftest import random_images, random_labels, small_clip, unit
from tests.toy import Trunk

ROOT = Path(__file__).resolve().parent.parent
TOKENS = {"sst": 3900, "cbsa": 3700, "scinet": 3800, "common": 7400, "tests/toy": 3200}
KINDS = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)


def code_tokens(text):
    """The line of each token of the code, docstrings left out."""
    docs = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                docs |= {*range(node.lineno, node.end_lineno + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = [token.start[0] for token in tokens if token.type in KINDS]
    return [line for line in lines if line not in docs]


@pytest.mark.parametrize("name", TOKENS)
def test_every_file_stays_within_what_a_reader_can_take(name):
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    lines = code_tokens(text)
    assert len(lines) <= TOKENS[name]
    assert name == "tests/toy" or len(lines) <= 12 * len({*lines})
    assert max(map(len, text.splitlines())) <= 100
    packed = 0
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            packed += any(isinstance(target, ast.Tuple) for target in node.targets)
        if isinstance(node, ast.FunctionDef):
            inside = [line for line in lines if node.lineno <= line <= node.end_lineno]
            assert len(inside) <= 600, node.name
            given = node.args
            parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            assert len(parameters) <= 8, node.name
    assert packed <= 5


def test_what_is_counted():
    text = '"""Doc, of\ntwo lines."""\n\nx = 1  # no token\ny = f(x, "a")\n'
    assert code_tokens(text) == [4] * 3 + [5] * 8


# --------------------------------------------------------------------------------------- copying


def functions_in(nodes, prefix=""):
    """The qualified names of all functions, methods and functions inside functions."""
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            yield from functions_in(node.body, f"{prefix}{node.name}.")
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name
            yield from functions_in(node.body, f"{prefix}{node.name}.<locals>.")


def copied(script):
    """A module of the classes and functions between the headings "model" and "training" of a
    script, with its imports, but of `common` two functions on images; and their source."""
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    headings = {line.strip("# -"): n for n, line in enumerate(lines, 1) if line.startswith("# ---")}
    pieces = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom) and node.lineno < headings["model"]:
            source = ast.get_source_segment(text, node)
            pieces += [source] * (source != "import common")
        if headings["model"] < node.lineno < headings["training"]:
            assert isinstance(node, ast.ClassDef | ast.FunctionDef), ast.unparse(node)
            first = min([node.lineno, *(part.lineno for part in node.decorator_list)])
            pieces.append("\n".join(lines[first - 1 : node.end_lineno]))
    source = "\n\n".join(pieces)
    module = types.ModuleType("copied")
    two = dict(normalise=common.normalise, clip_features=common.clip_features)
    module.common = types.SimpleNamespace(**two)
    exec(compile(source, f"copy of {script}", "exec"), module.__dict__)
    return module, source


def use_sst(m, rng, folder):
    y = random_labels(rng, 3, 5)
    y[:, 0] = torch.tensor([1, 1, 0])
    classes = ["cat", "tv_monitor", "diningtable", "dog", "owl"]
    words = "cat tv monitor dining table dog owl".split()
    (folder / "words.txt").write_text("".join(f"{word} 1 {k}.5\n" for k, word in enumerate(words)))
    vectors = m.read_words(str(folder / "words.txt"), classes)
    assert vectors[2].tolist() == [1, 4]  # of dining and table
    np.save(folder / "words.npy", vectors.numpy())
    assert torch.equal(m.read_words(str(folder / "words.npy"), classes), vectors)
    for path, names in (("words.txt", ["unicorn"]), ("words.npy", classes[1:])):
        with pytest.raises(ValueError) as error:
            m.read_words(str(folder / path), names)
        assert error.type is ValueError
    with pytest.raises(ValueError) as error:
        m.split_trunk(torch.nn.Linear(1, 1))
    assert error.type is ValueError
    stages = m.split_trunk(Trunk())
    adjacency = m.cooccurrence(y)
    sarl = m.SemanticDecoupling(vectors, 8)
    net = m.SST(*stages, sarl, m.GatedGraph(adjacency, 8), m.PairNet(8, (6, 4)))
    target = m.pair_targets(y)
    images = random_images(rng, 64)
    f, logits, pairs = net.train()(images, target != 0)
    assert f.shape == (3, 5, 8) and logits.shape == (3, 5) and pairs.shape == (3, 5, 5)
    total, number = m.sum_of_cosines(f, y == 1)
    assert total.isfinite() and number >= 2
    completed = m.intra_pseudo_labels(torch.sigmoid(pairs), y, m.threshold(9, 0.1))
    completed = m.cross_pseudo_labels(f, completed, net.prototypes, 0.5)
    loss = m.partial_bce(logits, completed) + m.ist_loss(pairs, target) + m.cst_loss(f, y)
    loss.backward()
    learned = [p for name, p in net.named_parameters() if not name.startswith("frozen")]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)


def use_cbsa(m, rng, folder):
    visual = small_clip()[0].visual
    y = torch.tensor([[1, 1, -1, -1, -1]] * 4 + [[-1, -1, 1, 1, 1]] * 4).to(torch.int8)
    contexts = m.find_contexts(y.numpy(), 0)
    assert contexts.tolist() in ([0, 0, 1, 1, 1], [1, 1, 0, 0, 0])
    affinity = np.kron(np.eye(2), np.ones((2, 2))) + 0.01
    assert m.eigengap(affinity) == 2
    with pytest.raises(ValueError) as error:
        m.find_contexts(y.numpy(), 6)
    assert error.type is ValueError
    member = torch.nn.functional.one_hot(torch.tensor(contexts).long()).float()
    D = common.clip_features(visual, random_images(rng, 64))[0].shape[1]
    texts = [unit(rng, 5, D).float() for _ in range(2)]
    net = m.CBSA(visual, *texts, torch.tensor(9.0), member)
    logits, r, attention = net(random_images(rng, 64))
    assert logits.shape == (3, 5) and r.shape == (3, 2) and attention.shape[:2] == (3, 5)
    f = unit(rng, 3, 6)
    h, a = m.label_features(f, unit(rng, 3, 4, 6), unit(rng, 5, 6), 0.5, 0.1)
    assert h.shape == (3, 5, 6) and a.shape == (3, 5, 4)
    assert m.class_prior(y).shape == (5,)
    pseudo = m.pseudo_labels(logits.detach(), y, band=True)
    loss = m.asymmetric_loss(logits, pseudo)
    loss = loss + m.asymmetric_loss(r, m.context_labels(pseudo, member))
    loss.backward()
    assert net.alpha.grad.isfinite() and net.context.weight.grad.isfinite().all()


def use_scinet(m, rng, folder):
    clip, tokenize = small_clip()
    prompt = m.PromptEncoder(clip, tokenize([f"a photo of a {x}" for x in ("cat", "dog", "owl")]))
    net = m.SCINet(clip.visual, prompt, torch.tensor(9.0), rank=2).train()
    logits, f = net(random_images(rng, 64, 5))
    assert logits.shape == (5, 3) and net(random_images(rng, 64), prompt())[0].shape == (3, 3)
    t = prompt().detach()
    assert m.text_dominant_scores(f, t, torch.zeros_like(f)).shape == (5, 3)
    assert m.visual_dominant_scores(f, t, f[:, None], 1.0, 0.1).shape == (5, 3)
    y = random_labels(rng, 5, 3)
    s = torch.sigmoid(logits.detach())
    a_n = m.instance_graph(f.detach(), 2, 0.3)
    with pytest.raises(ValueError) as error:
        m.instance_graph(f.detach(), 5, 0.3)
    assert error.type is ValueError
    memory = m.update_memory(m.Memory(s, torch.ones(5, 1)), y, a_n, 2, 0.1, 0.03, 0.95)
    p = m.fuse(s, y, a_n, m.label_graph(s, 2), 0.1, 0.03)
    assert p.shape == memory.p.shape == (5, 3)
    thresholds = m.class_thresholds(torch.tensor([1, 2, 3]), 0.95)
    guess = m.targets(p, y, thresholds)
    weight = m.difficulty_weight(s, s.flip(0), y)
    loss = m.weighted_bce(logits, (guess == 1).float(), weight)
    loss = loss + m.consistency_loss(logits, s, p, y, thresholds, weight)
    loss.backward()
    assert prompt.context.grad.isfinite().all() and net.bias.grad.isfinite().all()


@pytest.mark.parametrize("script", ["sst", "cbsa", "scinet"])
def test_the_method_runs_when_it_is_copied(script, rng, tmp_path):
    """With every function of it called, also those that come later."""
    module, source = copied(script)
    called = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename == f"copy of {script}":
            called.add(frame.f_code.co_qualname)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        dict(sst=use_sst, cbsa=use_cbsa, scinet=use_scinet)[script](module, rng, tmp_path)
    finally:
        sys.setprofile(before)
    defined = {*functions_in(ast.parse(source).body)}
    assert len(defined) > 5 and not defined - called
