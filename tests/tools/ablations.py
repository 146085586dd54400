# SPDX-License-Identifier: MIT
"""Makes the tables of tests/RESULTS.md: runs each row with each amount and seed, prints Markdown.

    python tests/tools/ablations.py {sst,cbsa,scinet} [--seeds 0 1 2] [--table-only]
    python tests/tools/ablations.py {sst,cbsa,scinet,across-entries,across-images}-photos
        --cache CACHE --data SHARED

The mask seed is the seed. Runs on photographs are those of photos.py; SHARED holds coco-mini/,
clip-mobilenet/ and weights/. A run that finished is never repeated, one that was cut off is
continued. A row is compared with the first one seed by seed.
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
ROOT = HERE.parents[1]
GLOVE_50 = "--glove {data}/words/glove.6B.50d.part.txt"

# table: amounts known, rows. row: options of photos.py, script, flags
SSGRL = "sst.py --no-ist --no-cst"
SST = {
    "SSGRL": SSGRL,
    "IST alone": "sst.py --no-cst",
    "CST alone": "sst.py --no-ist",
    "SST, known pairs": "sst.py --pairs both",
    "SST, all pairs": "sst.py --pairs all",
}
CBSA = {
    "CLIP fine-tuned, labelled images only": "cbsa.py --alpha 0 --kappa 0 --lambda-c 0 --warm-up 99",
    "+ label-specific features": "cbsa.py --kappa 0 --lambda-c 0 --warm-up 99",
    "+ contexts": "cbsa.py --warm-up 99",
    "+ unlabelled images, one threshold": "cbsa.py --one-threshold --no-band",
    "+ a threshold for each class": "cbsa.py --no-band",
    "+ band": "cbsa.py --band",
}
SCINET = {
    "learned prompt": "scinet.py --rank 0 --beta 0 --lambda-u 0",
    "+ text-dominant half": "scinet.py --beta 0 --lambda-u 0",
    "+ visual-dominant half": "scinet.py --lambda-u 0",
    "+ three views": "scinet.py --lambda-n 0 --lambda-q 0",
    "+ fusion: SCINet": "scinet.py",
}
PROBE = "--probe {c} "
ALL = "scinet.py --lambda-u 0"
TABLES = {
    "sst": ((0.1, 0.3, 0.5), SST),
    "cbsa": ((0.05,), CBSA),
    "scinet": ((0.1,), SCINET),
    "sst-photos": (
        (0.1, 0.5),
        SST
        | {
            "SST, known pairs, no guesses": "sst.py --pairs both --theta 1",
            "SST, all pairs, no guesses": "sst.py --pairs all --theta 1",
            "SST, known pairs, L_ist weighed as over all pairs": "",
            "SSGRL, 50-d vectors": f"{SSGRL} {GLOVE_50}",
            "SST, known pairs, 50-d vectors": f"sst.py --pairs both {GLOVE_50}",
        },
    ),
    "cbsa-photos": ((0.01, 0.05, 0.2), CBSA),
    "scinet-photos": ((0.01, 0.1, 0.5), SCINET),
}
