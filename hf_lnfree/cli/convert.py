"""`hf-lnfree convert`: run one conversion and say what became of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..choices import Dtype, Encoding, Target
from ..conversion.run import convert


def convert_command(
    source: str,
    out: Path,
    to: Target,
    dtype: Dtype | None,
    cache: bool,
    check: bool,
    device: str,
    encoding: Encoding | None,
    access: dict[str, Any],
) -> dict[str, Any]:
    """One conversion; returns its report."""
    logging.disable_progress_bar()
    new_dtype = None if dtype is None else getattr(torch, dtype)
    return convert(source, out, to, new_dtype, cache, check, progress=True, device=device, encoding=encoding, **access)


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
