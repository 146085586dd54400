# SPDX-License-Identifier: MIT
"""What all three scripts promise on the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import same

import cbsa
import common
import scinet
import sst

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--weights none --limit 48 --known 0.3 --batch-size 16 --epochs 2".split()
SCRIPTS = {  # name: module, flags that bring its pseudo-labels into the first epochs
    "sst": (sst, []),
    "cbsa": (cbsa, ["--warm-up", "1"]),
    "scinet": (scinet, ["--ramp", "0"]),
}
each = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """call(name, *arguments) runs main() in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            common.run_script(SCRIPTS[name][0].main)
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def small(name):
    return [*SMALL, *SCRIPTS[name][1]]


def load(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def weights(state):
    return {k: v for k, v in state.items() if k not in ("args", "best", "metrics", "generators")}


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


@each
def test_dry_run_from_the_shell_writes_nothing(name, tmp_path):
    command = [sys.executable, str(ROOT / f"{name}.py"), "--dry-run", "--weights", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mAP" in done.stdout and not list(tmp_path.iterdir()) and not done.stderr


@each
def test_stop_and_resume_equals_one_run_bit_for_bit(name, call, tmp_path):
    flags = small(name)
    assert call(name, *flags, "--out", "whole")[0] == 0
    assert call(name, *flags, "--out", "parts", "--stop-after", 1)[0] == 0
    with open("parts/log.jsonl", "a") as file:
        file.write('{"epoch": 2, "killed": "after the log, before the checkpoint"}\n')
    assert call(name, *flags, "--out", "parts", "--resume", "auto")[0] == 0
    whole, parts = load("whole"), load("parts")
    assert same(weights(whole), weights(parts)) and whole["metrics"] == parts["metrics"]
    a, b = ([e for e in lines(d) if e.get("epoch")] for d in ("whole", "parts"))
    times = {"seconds", "images_per_second", "peak_memory_gb"}
    assert [{k: v for k, v in e.items() if k not in times} for e in a] == [
        {k: v for k, v in e.items() if k not in times} for e in b
    ]
    again = call(name, *flags, "--out", "parts", "--resume", "auto")  # nothing is left to do
    assert again[0] == 0 and f"{whole['metrics']['mAP']:.2f}" in again[1]
    assert same(weights(load("parts")), weights(whole))
    assert len(lines("parts")) == len(lines("whole"))
    assert "run" in lines("whole")[0] and Path("whole/samples.png").stat().st_size > 1000

    evaluated = call(name, "--limit", 48, "--eval", "--resume", "whole/last.pt")
    assert evaluated[0] == 0 and f"{whole['metrics']['mAP']:.2f}" in evaluated[1], evaluated
    common.Image.fromarray(common.toy_scenes(1, 5)[0][0]).save("scene.png")
    predicted = call(name, "--predict", "scene.png", "--resume", "whole/last.pt")
    assert predicted[0] == 0 and "probability" in predicted[1], predicted

    Path("not-an-image").write_bytes(b"x" * 100)
    Path("junk.pt").write_bytes(b"x" * 100)
    other = next(n for n in SCRIPTS if n != name)
    for word, arguments in {
        "mask": [*flags, "--out", "parts", "--resume", "auto", "--mask-seed", 3],
        "holds a run": [*flags, "--out", "parts"],
        "epochs": [*flags, "--out", "parts", "--resume", "auto", "--epochs", 3],
        "size": [*flags, "--out", "parts", "--resume", "auto", "--size", 128],
        "not-an-image": ["--predict", "not-an-image", "--resume", "whole/last.pt"],
        "junk.pt": ["--eval", "--resume", "junk.pt"],
    }.items():
        status, _, error = call(name, *arguments)
        assert status == 2 and error.count("\n") == 1 and word in error, (word, error)
    status, _, error = call(other, *small(other), "--resume", "whole/last.pt")
    assert status == 2 and f"{name}.py" in error


@each
def test_no_leak_of_hidden_labels(name, call, monkeypatch, tmp_path):
    """Every hidden label flipped: log, losses, pseudo-labels and weights stay bit-identical."""
    module, hide = SCRIPTS[name][0], common.hide_images if name == "cbsa" else common.hide_entries
    loaded = common.load_data

    def flipped(*arguments):
        data = loaded(*arguments)
        hidden = hide(data.train.y, 0.3, 5) == 0
        assert hidden.any()
        data.train.y = np.where(hidden, -data.train.y, data.train.y)
        return data

    flags = [*small(name), "--mask-seed", 5]
    # lower thresholds, so that there are pseudo-labels in two epochs of a random network
    if name == "sst":
        monkeypatch.setattr(module, "threshold", lambda epoch, lowest: 0.3)
    if name == "scinet":
        monkeypatch.setattr(module, "class_thresholds", lambda count, tau: 0.2 + 0.0 * count)
    assert call(name, *flags, "--out", "as-it-is")[0] == 0
    monkeypatch.setattr(common, "load_data", flipped)
    assert call(name, *flags, "--out", "flipped")[0] == 0
    a, b = load("as-it-is"), load("flipped")
    assert same(weights(a), weights(b)) and a["metrics"] == b["metrics"]
    entry, other = lines("as-it-is")[-1], lines("flipped")[-1]
    diagnostic = ("precision", "recall", "seconds", "per_second", "memory_gb", "hidden_mAP")
    kept = [k for k in entry if not any(word in k for word in diagnostic)]
    assert "loss" in kept and [entry[k] for k in kept] == [other[k] for k in kept]
    assert entry["pseudo_per_image"] > 0
    assert entry["pseudo_precision"] != other["pseudo_precision"]  # the flip was seen there


@each
@pytest.mark.parametrize("flags", ["--precision bf16", "--workers 1"])
def test_options_run(name, flags, call):
    status, out, error = call(name, *small(name), *flags.split(), "--dry-run")
    assert status == 0 and "last epoch" in out, error


BAD = [
    ("--known 0", "--known"),
    ("--known 1.5", "--known"),
    ("--known nan", "--known"),
    ("--known half", "--known"),
    ("--nosuch", "nosuch"),
    ("--data nosuch", "nosuch"),
    ("--data coco", "--root"),
    ("--data coco --root nowhere", "nowhere"),
    ("--data voc2007 --root nowhere", "nowhere"),
    ("--data nuswide --root .", "Groundtruth"),
    ("--arch nosuch", "nosuch"),
    ("--weights nowhere.pth", "nowhere.pth"),
    ("--epochs 0", "--epochs"),
    ("--batch-size -1", "--batch-size"),
    ("--lr 0", "--lr"),
    ("--size 0", "--size"),
    ("--workers -1", "--workers"),
    ("--seed -1", "--seed"),
    ("--mask-seed -1", "--mask-seed"),
    ("--limit 0", "--limit"),
    ("--device nosuch", "nosuch"),
    ("--precision fp8", "fp8"),
    ("--eval", "--resume"),
    ("--predict x.png", "--resume"),
    ("--resume nowhere.pt", "nowhere.pt"),
    ("--resume auto", "--out"),
]
OWN_BAD = {
    "sst": [
        ("--sarl nosuch", "nosuch"),
        ("--arch vit_b_16 --weights none", "spatial"),
        ("--glove nowhere.txt --weights none", "nowhere.txt"),
    ],
    "cbsa": [
        ("--arch ViT-B-16", "spatial"),
        ("--arch RN50", "quickgelu"),
        ("--size 100 --weights none", "32"),
        ("--known 0.0001", "leaves none labelled"),
        ("--contexts 17 --weights none", "--contexts 17"),
        ("--contexts 1 --weights none", "--contexts 1"),
        ("--tau 0", "--tau"),
        ("--ema 2", "--ema"),
        ("--warm-up -3", "--warm-up"),
        ("--warm-up 9 --epochs 9", "--warm-up 9"),
    ],
    "scinet": [
        ("--arch ViT-B-16", "spatial"),
        ("--arch RN101", "quickgelu"),
        ("--size 100 --weights none", "32"),
        ("--lambda-n -1", "--lambda-n"),
        ("--lambda-q -0.1", "--lambda-q"),
        ("--neighbours 48 --limit 48 --weights none", "--neighbours 48"),
        ("--sigma 0", "--sigma"),
    ],
}


@pytest.mark.parametrize(
    ("name", "arguments", "word"),
    [(name, *case) for name in SCRIPTS for case in BAD + OWN_BAD[name]],
)
def test_bad_arguments_give_one_line(name, arguments, word, call, tmp_path):
    status, _, error = call(name, *arguments.split())
    assert status == 2 and error.count("\n") == 1 and word in error, error
    assert not list(tmp_path.iterdir())


def test_class_names_that_are_blank_are_refused_by_name():
    _, tokenize = common.load_clip("toy", "none", 96)
    with pytest.raises(common.InputError, match="class 1 has no name"):
        common.prompt_tokens(tokenize, "a photo of a {}", ["cat", " ", "dog"])


@each
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_training_on_cuda_in_bf16(name, call):
    flags = "--device cuda --precision bf16 --out run".split()
    status, _, error = call(name, *small(name), *flags)
    assert status == 0, error


def test_readme_names_functions_and_lengths_that_are_true():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`(sst|cbsa|scinet|common)\.(\w+)`", text)
    named = [(module, name) for module, name in named if name != "py"]
    assert len(named) > 25
    for module, name in named:
        assert hasattr(sys.modules[module], name), f"{module}.{name}"
    for name in (*SCRIPTS, "common"):
        lines = len((ROOT / f"{name}.py").read_text().splitlines())
        assert re.search(rf"`{name}\.py`.* {lines} (\||lines)|`{name}\.py` \({lines} lines\)", text)


@each
def test_everything_known_is_a_run_too(name, call):
    status, out, error = call(name, *small(name), "--known", 1, "--out", "run")
    assert status == 0 and "last epoch" in out, error
    assert all(json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines())


@each
def test_a_run_killed_before_its_first_checkpoint_starts_its_log_anew(name, call):
    Path("run").mkdir()
    Path("run/log.jsonl").write_text('{"run": {}}\n{"epoch": 0, "mAP": 1}\n{"epoch": 1, "lo')
    status, _, error = call(name, *small(name), "--out", "run", "--resume", "auto")
    assert status == 0, error
    epochs = [entry["epoch"] for entry in lines("run")[1:]]
    assert epochs == sorted(set(epochs)) and epochs[-1] == 2 and lines("run")[0]["run"]["method"]


@each
def test_help_shows_the_defaults_of_the_data_set(name, call):
    status, out, _ = call(name, "--data", "coco", "--help")
    assert status == 0
    for flag in ("--epochs", "--batch-size", "--lr", "--arch", "--size"):
        shown = re.search(rf"\n  {flag} .*?\n  --", out, re.S).group()
        assert "default: " in shown and "default: None" not in shown, shown
