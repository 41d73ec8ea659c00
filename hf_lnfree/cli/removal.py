"""`hf-lnfree remove-norms`: a model, a YAML file and flags into one removal, then its losses."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..data.arguments import DataArguments
from ..errors import SettingsError
from ..pages.removal import loss_table
from ..removal.arguments import RemovalArguments
from ..removal.run import remove_norms
from ..training.arguments import LNFreeTrainingArguments
from ..training.fields import CheckpointArguments
from .study import rich_table
from .train import DIVERGED, parse_arguments

DATACLASSES = (RemovalArguments, DataArguments, LNFreeTrainingArguments, CheckpointArguments)


def removal_command(arguments: Sequence[str], console: Console) -> int:
    if not arguments or arguments[0].startswith("-"):
        raise SettingsError("remove-norms takes MODEL first, a folder or a Hub name.")
    model, *rest = arguments
    removal, data, training, checkpoint = parse_arguments(rest, dataclasses=DATACLASSES)
    summary = remove_norms(model, removal, data, training, checkpoint)
    if training.process_index == 0:
        console.print(rich_table(loss_table(summary)))
        console.print(f"Report: {Path(training.output_dir) / 'report.html'}", highlight=False, soft_wrap=True)
    return 0 if summary["diverged_at"] is None else DIVERGED
