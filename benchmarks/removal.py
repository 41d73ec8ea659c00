"""The removal.json of several seeds as one result with its intervals.

Usage: python benchmarks/removal.py runs/without-norms-* > benchmarks/results/remove-norms-cpu.json
"""

import sys
from pathlib import Path

from hf_lnfree.files import json_text
from hf_lnfree.removal.results import RemovalSummary
from hf_lnfree.studies.statistics import estimate

LOSSES = ("loss_before", "loss_after", "loss_plain", "gap")


def gather(folders):
    runs = [RemovalSummary.load(Path(folder)) for folder in folders]
    estimates = {key: estimate([getattr(run, key) for run in runs]) for key in LOSSES}
    return {
        "nats_a_token": {key: {"mean": e.mean, "half_width_95": e.half_width} for key, e in estimates.items()},
        "runs": [{key: value for key, value in vars(run).items() if key not in ("sigma", "more")} for run in runs],
    }


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    print(json_text(gather(sys.argv[1:])))
