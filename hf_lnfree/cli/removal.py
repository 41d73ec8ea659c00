"""`hf-lnfree remove-norms`: a model, a YAML file and flags into one removal, then its losses."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..data.arguments import DataArguments
from ..errors import SettingsError
from ..pages.finish import describe_run, finish_run
from ..pages.removal import loss_table, write_removal_report
from ..removal.arguments import RemovalArguments
from ..removal.run import PLAIN, remove_norms
from ..training.arguments import LNFreeTrainingArguments
from ..training.fields import CheckpointArguments
from .tables import rich_table
from .train import DIVERGED, parse_arguments

DATACLASSES = (RemovalArguments, DataArguments, LNFreeTrainingArguments, CheckpointArguments)


def removal_command(arguments: Sequence[str], console: Console) -> int:
    """One removal; returns the exit code."""
    if not arguments or arguments[0].startswith("-"):
        raise SettingsError("remove-norms takes MODEL first, a folder or a Hub name.")
    model, *rest = arguments
    removal, data, training, checkpoint = parse_arguments(rest, dataclasses=DATACLASSES)
    summary = remove_norms(model, removal, data, training, checkpoint)
    folder = Path(training.output_dir)
    if training.process_index == 0:
        write_removal_report(folder, summary)
        if removal.baseline:
            describe_run(folder / PLAIN)
        console.print(rich_table(loss_table(summary)))
        console.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True, markup=False)
    finish_run(folder, training)
    return DIVERGED if summary.diverged else 0
