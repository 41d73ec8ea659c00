"""`hf-lnfree convert`: run one conversion and say what became of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..conversion.run import Target, convert
from ..errors import SettingsError

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert_command(
    source: str, out: Path, to: Target, dtype: str | None, cache: bool, check: bool, revision: str | None
) -> dict[str, Any]:
    if dtype is not None and dtype not in DTYPES:
        raise SettingsError(f"--dtype {dtype!r} is not known. Allowed: {', '.join(DTYPES)}.")
    logging.disable_progress_bar()
    return convert(source, out, to, None if dtype is None else DTYPES[dtype], cache, check, True, revision)


def lines(report: dict[str, Any], out: Path) -> Iterator[str]:
    """What the terminal shows of a report."""
    for became, count in report.get("norms", {}).items():
        yield f"{count} norms: {became}"
    if "nonlinear_operators" in report:
        counts = ", ".join(f"{count} {name}" for name, count in report["nonlinear_operators"].items())
        yield f"Nonlinear operators left: {counts}"
    yield from report["notes"]
    if "largest_difference" in report:
        yield (
            f"Logits on random tokens: largest difference {report['largest_difference']:.1e}, at logits up to "
            f"{report['largest_logit']:.3g}"
        )
    yield f"Written to {out}"
