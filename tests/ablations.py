# SPDX-License-Identifier: MIT
"""Runs a script's ablations; prints a Markdown table of mAP over seeds.

    python tests/ablations.py {sst,cbsa,scinet} [--jobs 2] [--seeds 0 1 2] [--table-only]
    python tests/ablations.py sst --photos "CACHE" "--root DIR --weights FILE" --runs FOLDER

On the toy world or, with --photos, on real photographs by tests/photos.py, whose own arguments come
first and those of the script second. The mask seed is the seed. A run that finished is never
repeated, one that was cut off is continued.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent

# row: flags, proportions known. From row to row a module is added (of SST: one, the other, both) up
# to the whole method; the row after it knows all labels and needs no guesses
ROWS = {
    "sst": {
        "SSGRL": ("--no-ist --no-cst", (0.1, 0.3, 0.5)),
        "+ IST": ("--no-cst", (0.1, 0.3, 0.5)),
        "+ CST": ("--no-ist", (0.1, 0.3, 0.5)),
        "SST (both)": ("", (0.1, 0.3, 0.5)),
        "SSGRL, all labels": ("--no-ist --no-cst", (1.0,)),
        "SST, GloVe vectors": ("--glove tests/glove.6B.50d.names.txt", (0.1,)),
        "+ IST, data-set statistics": ("--no-cst --stat-cooc", (0.1, 0.3)),
        "+ IST, Eq. 4 negatives: all but positives": ("--no-cst --pairs all", (0.3,)),
    },
    "cbsa": {
        "CLIP fine-tuned on the labelled images": (
            "--whole-image --no-context --no-unlabelled",
            (0.01, 0.02, 0.05, 0.2),
        ),
        "+ label-specific features": ("--no-context --no-unlabelled", (0.05, 0.2)),
        "+ contexts": ("--no-unlabelled", (0.01, 0.02, 0.05, 0.2)),
        "+ unlabelled images, one threshold": ("--global-threshold --no-band", (0.05, 0.2)),
        "+ a threshold a class": ("--no-band", (0.01, 0.02, 0.05, 0.2)),
        "+ band": ("--band", (0.01, 0.02, 0.05, 0.2)),
        "all labels": ("--no-unlabelled", (1.0,)),
    },
    "scinet": {
        "learned prompt": (
            "--no-text-dominant --no-visual-dominant --no-augment",
            (0.01, 0.02, 0.1, 0.5),
        ),
        "+ text-dominant half": ("--no-visual-dominant --no-augment", (0.1, 0.5)),
        "+ visual-dominant half": ("--no-augment", (0.01, 0.02, 0.1, 0.5)),
        "+ three views": ("--lambda-n 0 --lambda-q 0", (0.1, 0.5)),
        "+ fusion": ("", (0.01, 0.02, 0.1, 0.5)),
        "all labels": ("--no-augment", (1.0,)),
    },
}

# row: which of the rows above, and the key in its log's line of epoch 0, before training
ZERO_SHOT = {
    "cbsa": {
        "zero-shot, image feature": ("+ contexts", "mAP_image"),
        "zero-shot, label-specific features": ("+ contexts", "mAP"),
    },
    "scinet": {"zero-shot": ("learned prompt", "mAP")},
}


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]
    cells = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def folder(runs: Path, script: str, row: str, known: float, seed: int) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in row.lower())
    return runs / script / f"{name}-{known}-{seed}"


def finished(out: Path) -> list[dict] | None:
    """The entries of a run that reached its last epoch, else None."""
    try:
        lines = (out / "log.jsonl").read_text().splitlines()
        first, *entries = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return None
    epochs = first["run"]["args"]["epochs"]
    return entries if entries and entries[-1]["epoch"] == epochs else None


def train(start: str, flags: str, known: float, seed: int, out: Path, jobs: int) -> None:
    command = [sys.executable, *start.split(), *flags.split()]
    command += f"--known {known} --seed {seed} --mask-seed {seed} --resume auto --out".split()
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    done = subprocess.run([*command, str(out)], env=env, capture_output=True, text=True)
    end = "done" if done.returncode == 0 else done.stderr.strip()[-500:]
    print(f"{out.name}: {end}", file=sys.stderr, flush=True)


def mean_std(values: list[float]) -> str:
    if not values:
        return "not run"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} ({len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("script", choices=ROWS)
    parser.add_argument("--runs", type=Path, help="default runs/ablations or runs/photographs")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, nargs="+", help="only these, counted from 0")
    parser.add_argument("--known", type=float, nargs="+", help="only these proportions")
    parser.add_argument("--photos", nargs=2, metavar=("OPTIONS", "ARGUMENTS"))
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    args = parser.parse_args()
    rows, start, world = ROWS[args.script], f"{HERE.parent / args.script}.py", "toy world"
    rows = {row: rows[row] for k, row in enumerate(rows) if args.rows is None or k in args.rows}
    if args.photos:
        world, options, arguments = "photographs", *args.photos
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        start = f"{HERE / 'photos.py'} --threads {threads} {options} {args.script}.py {arguments}"
    runs = args.runs or Path("runs/photographs" if args.photos else "runs/ablations")
    cells = {
        (row, known): [folder(runs, args.script, row, known, seed) for seed in args.seeds]
        for row, (_, proportions) in rows.items()
        for known in proportions
        if args.known is None or known in args.known
    }
    if not args.table_only:
        with ThreadPoolExecutor(args.jobs) as pool:
            for row, known in sorted(cells, key=lambda cell: cell[1]):
                outs = cells[row, known]
                for seed, out in zip(args.seeds, outs, strict=True):
                    if not finished(out):
                        pool.submit(train, start, rows[row][0], known, seed, out, args.jobs)
    proportions = sorted({known for _, known in cells})
    logs = {cell: [log for out in outs if (log := finished(out))] for cell, outs in cells.items()}
    table = []
    for row, (of, key) in ZERO_SHOT.get(args.script, {}).items():
        first = [[log[0][key] for log in logs.get((of, k), ())] for k in proportions]
        table.append([row, *map(mean_std, first)])
    for row in rows:
        line = [row]
        for known in proportions:
            ends = [log[-1] for log in logs.get((row, known), [])]
            line.append(mean_std([end["mAP"] for end in ends]))
            if ends and any(end["pseudo_precision"] for end in ends):
                right = statistics.mean(100 * (end["pseudo_precision"] or 0) for end in ends)
                found = statistics.mean(100 * end["pseudo_recall"] for end in ends)
                line[-1] += f"; {right:.0f} / {found:.0f}"
        table.append(line)
    print("mAP in percent, mean ± std (seeds); precision / recall of pseudo-labels, last epoch\n")
    print(markdown_table([world, *(f"{known:.0%} known" for known in proportions)], table))


if __name__ == "__main__":
    main()
