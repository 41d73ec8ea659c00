"""What came of each test that needs a GPU, kept with the versions and the device of the run."""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
WORKERS = 4  # share the GPU: most of the time is compilation, on the CPU


def outcomes(report: Path) -> dict[str, Counter]:
    """How many cases of each test passed, failed and were skipped, and the seconds that they took together."""
    found: dict[str, Counter] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = "skipped" if "skipped" in bad else "failed" if bad else "passed"
        counts = found.setdefault(case.get("name", "").partition("[")[0], Counter(passed=0, failed=0, skipped=0))
        counts.update({outcome: 1, "seconds": float(case.get("time", 0))})
    return found


def measure_gpu_tests(device: str) -> tuple[str, dict[str, Counter]]:
    """
    Of `tests/test_gpu.py`.

    Raises:
        RuntimeError: no test was run.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "xdist.plugin", "-q", "-n", str(WORKERS)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run([*command, f"--junitxml={report}", "tests/test_gpu.py"], cwd=ROOT, env=environment)
        found = outcomes(report) if report.exists() else {}
    if not any(counts["passed"] or counts["failed"] for counts in found.values()):
        raise RuntimeError(f"No test of tests/test_gpu.py was run (pytest ended with {done.returncode}).")
    return "Cases of each test in tests/test_gpu.py, by what came of them, and their seconds beside one another.", found
