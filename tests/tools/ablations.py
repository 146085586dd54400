# SPDX-License-Identifier: MIT
"""Makes the tables of tests/RESULTS.md: runs each row with each amount and seed, prints Markdown.

    python tests/tools/ablations.py TABLE [--seeds 0 1 2] [--rows 0 3] [--table-only]
    python tests/tools/ablations.py TABLE --photos CACHE SHARED [--images 3000]

With --photos, runs are those of photos.py: SHARED holds coco-mini/, clip-mobilenet/, weights/ and
words/. The mask seed is the seed. A run that finished is never repeated, one that was cut off is
continued. The second table compares each row with the first one seed by seed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# a row: its name, and options of photos.py or variants.py before the script's name, flags of the
# script after it; what stands in braces is filled in
SSGRL = "sst.py --no-ist --no-cst"
KNOWN = "sst.py --pairs both"
GLOVE_50 = "--glove {shared}/words/glove.6B.50d.part.txt"
SST = {
    "SSGRL": SSGRL,
    "IST alone, known pairs": "sst.py --no-cst --pairs both",
    "CST alone": "sst.py --no-ist",
    "SST, known pairs": KNOWN,
    "SST, all pairs": "sst.py --pairs all",
    "SST, known pairs, no guesses": f"{KNOWN} --theta 1",
    "SST, known pairs, L_ist a mean over these": KNOWN + " --lambda-1 {weight}",
    "SSGRL, 50-d vectors": f"{SSGRL} {GLOVE_50}",
    "SST, known pairs, 50-d vectors": f"{KNOWN} {GLOVE_50}",
    "linear probe on the trunk": "--probe {c} sst.py",
}
SUPERVISED = "--warm-up 99"
CBSA = {
    "CLIP before training": "--zero-shot cbsa.py --alpha 0 --kappa 0",
    "linear probe on CLIP's image feature": "--whole-images --probe {c} scinet.py",
    "CLIP fine-tuned, labelled images": f"cbsa.py --alpha 0 --kappa 0 --lambda-c 0 {SUPERVISED}",
    "+ label-specific features": f"cbsa.py --kappa 0 --lambda-c 0 {SUPERVISED}",
    "+ contexts": f"cbsa.py {SUPERVISED}",
    "+ unlabelled images, one threshold": "cbsa.py --one-threshold --no-band",
    "+ a threshold for each class": "cbsa.py --no-band",
    "+ band": "cbsa.py --band",
}
SCINET = {
    "CLIP before training": "--zero-shot scinet.py --rank 0 --beta 0",
    "linear probe on CLIP's image feature": "--probe {c} scinet.py",
    "learned prompt": "scinet.py --rank 0 --beta 0 --lambda-u 0",
    "+ text-dominant half": "scinet.py --beta 0 --lambda-u 0",
    "+ visual-dominant half": "scinet.py --lambda-u 0",
    "+ three views": "scinet.py --lambda-n 0 --lambda-q 0",
    "+ fusion: SCINet": "scinet.py",
}
TABLES = {  # name: amounts known, rows
    "sst": ((0.1, 0.3, 0.5), SST),
    "cbsa": ((0.05,), CBSA),
    "scinet": ((0.1,), SCINET),
    "probes": (
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
        {"trunk": "--probe {c} sst.py", "CLIP": "--probe {c} scinet.py"},
    ),
    "entries": (  # across the methods, by single labels
        (0.01, 0.1, 0.5),
        {
            "CLIP before training": SCINET["CLIP before training"],
            "linear probe on the trunk": "--probe {c} sst.py",
            "linear probe on CLIP's image feature": "--probe {c} scinet.py",
            "SSGRL": SSGRL,
            "SST": "sst.py",
            "SCINet": "scinet.py",
        },
    ),
    "nearer": (  # what brings SST nearer to the probe
        (0.5,),
        {
            "SST": KNOWN,
            "SSGRL": SSGRL,
            "SST, L_ist a mean over known pairs": KNOWN + " --lambda-1 {weight}",
            "SST, width 128": f"{KNOWN} --width 128",
            "SST, width 256": f"{KNOWN} --width 256",
            "SST, twice the epochs": KNOWN + " --epochs {epochs} --lr-step {lr_step}",
            "SST, classifier from zero, bias from prior": f"--variant start_at_prior {KNOWN}",
            "SST, dropout before the classifier": f"--variant drop_out {KNOWN}",
            "SST, graph's input added to its output": f"--variant add_input {KNOWN}",
            "SST, the last three": "--variant start_at_prior --variant drop_out "
            f"--variant add_input {KNOWN}",
            "linear probe on the trunk": "--probe {c} sst.py",
        },
    ),
    "images": (  # across the methods, by whole images
        (0.01, 0.05, 0.2),
        {
            "CLIP before training": SCINET["CLIP before training"],
            "linear probe on the trunk": "--whole-images --probe {c} sst.py",
            "linear probe on CLIP's image feature": "--whole-images --probe {c} scinet.py",
            "SST": "--whole-images sst.py",
            "SCINet": "--whole-images scinet.py",
            "CBSA": "cbsa.py",
        },
    ),
}
# C of the linear probes by the amount known, chosen on held-out training images with mask seed 3
PROBES = {
    "sst.py": {0.01: 0.001},
    "scinet.py": {0.02: 0.001, 0.1: 0.01, 0.2: 0.01, 0.5: 0.01, 1.0: 0.01},
}  # else 0.003


def command(row: str, known: float, seed: int, out: Path, args) -> list[str]:
    """The command line of a run."""
    words = row.split()
    script = next(word for word in words if word.endswith(".py"))
    shared = args.photos[1] if args.photos else ""
    filled = dict(c=PROBES.get(script, {}).get(known, 0.003), weight=10 / known**2, shared=shared)
    filled |= dict(epochs=24, lr_step=18)  # twice those of photos.py
    words = row.format(**filled).split()
    words += f"--known {known} --seed {seed} --mask-seed {seed} --resume auto --out {out}".split()
    place = words.index(script) + 1
    if not args.photos:
        tool = [str(HERE / "variants.py"), *words[: place - 1]] if place > 1 else []
        return [sys.executable, *tool, str(ROOT / script), *words[place:]]
    own = f"--root {shared}/coco-mini".split()
    if script == "sst.py":
        own += f"--weights {shared}/weights/mobilenet_v2_imagenet.pth".split()
    else:
        own += f"--arch local-dir:{shared}/clip-mobilenet".split()
    options = f"{args.photos[0]} --threads {args.threads} --images {args.images}".split()
    options += ["--held-out", str(args.held_out)]
    return [sys.executable, str(HERE / "photos.py"), *options, *words[:place], *own, *words[place:]]


def needs_photos(flags: str) -> bool:
    return "{" in flags or flags.startswith(("--probe", "--whole-images", "--zero-shot"))


def finished(out: Path) -> list[dict] | None:
    """The entries of a run that reached its last epoch, else None."""
    try:
        lines = (out / "log.jsonl").read_text().splitlines()
        first, *entries = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return None
    epochs = first["run"]["args"]["epochs"]
    return entries if entries and entries[-1]["epoch"] == epochs else None


def mean_std(values: list[float]) -> str:
    if not values:
        return "not run"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} ({len(values)})"


def table(title: str, proportions: list[float], rows: dict[str, list[str]]) -> None:
    print(f"\n| {title} | " + " | ".join(f"{known:.0%} known" for known in proportions) + " |")
    print("| --- " * (1 + len(proportions)) + "|")
    for row, cells in rows.items():
        print(f"| {row} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--photos", nargs=2, metavar=("CACHE", "SHARED"))
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--held-out", type=int, default=0, help="as of photos.py")
    parser.add_argument("--runs", type=Path, help="default runs/TABLE or runs/TABLE-IMAGES")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, nargs="+", help="only these, counted from 0")
    parser.add_argument("--known", type=float, nargs="+", help="only these amounts")
    parser.add_argument("--extra", default="", help="flags that all runs get")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    args = parser.parse_args()
    amounts, rows = TABLES[args.table]
    amounts = args.known or amounts
    if not args.photos:  # what needs photos.py
        rows = {row: flags for row, flags in rows.items() if not needs_photos(flags)}
    rows = {row: rows[row] for k, row in enumerate(rows) if args.rows is None or k in args.rows}
    name = f"{args.table}-{args.images}" if args.photos else args.table
    runs = args.runs or Path("runs") / name
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    ends = {}  # row, known, seed: last entry
    for known in amounts:
        for seed in args.seeds:
            for row, flags in rows.items():
                plain = "".join(c if c.isalnum() else "-" for c in row.lower())
                out = runs / f"{plain}-{known}-{seed}"
                if not finished(out) and not args.table_only:
                    given = command(f"{flags} {args.extra}", known, seed, out.resolve(), args)
                    done = subprocess.run(given, capture_output=True, text=True)
                    error = done.stderr.strip()[-500:] if done.returncode else "done"
                    print(f"{out.name}: {error}", file=sys.stderr, flush=True)
                    (out / "last.pt").unlink(missing_ok=True)  # a log is enough
                if log := finished(out):
                    ends[row, known, seed] = log[-1]
    first = next(iter(rows))
    cells = {row: [] for row in rows}
    gains = {row: [] for row in rows}
    for row in rows:
        for known in amounts:
            found = {s: ends[row, known, s] for s in args.seeds if (row, known, s) in ends}
            cell = mean_std([end["mAP"] for end in found.values()])
            guessed = [end for end in found.values() if end.get("pseudo_precision")]
            if guessed:
                right = statistics.mean(100 * end["pseudo_precision"] for end in guessed)
                recall = statistics.mean(100 * end["pseudo_recall"] for end in guessed)
                cell += f"; {right:.0f} / {recall:.0f}"
            cells[row].append(cell)
            shared = [s for s in found if (first, known, s) in ends]
            gain = [found[s]["mAP"] - ends[first, known, s]["mAP"] for s in shared]
            gains[row].append(mean_std(gain))
    print("mAP in percent, mean ± std (seeds); precision / recall of pseudo-labels, last epoch")
    table(name, amounts, cells)
    table(f"{name}: gain over {first}, seed by seed", amounts, gains)


if __name__ == "__main__":
    main()
