"""`hf-lnfree train`: a YAML file and flags into dataclasses, then one run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..training.run import train
from ..training.settings import RunArguments, parse_settings, read_settings

DIVERGED = 3  # exit code of a run that ended, though not where it was to end


def parse_arguments(arguments: Sequence[str], **options: Any) -> RunArguments:
    """The dataclasses of a run from flags, over the values of a YAML file that may come first."""
    if not arguments or arguments[0].startswith("-"):
        return parse_settings({}, "", arguments, **options)
    file, *flags = arguments
    return parse_settings(read_settings(Path(file)), file, flags, **options)


def train_command(arguments: Sequence[str], console: Console) -> int:
    results = train(*parse_arguments(arguments))
    folder = results["arguments"]["training"]["output_dir"]
    console.print(
        f"{results['row']}: eval perplexity {results['eval_perplexity']:.3f} after {results['tokens']:,} tokens. "
        f"Everything is in {folder}",
        highlight=False,
    )
    if results["diverged_at"] is None:
        return 0
    event = results["nonfinite_events"][-1]
    console.print(
        f"[bold red]The run diverged at step {results['diverged_at']}:[/] {event['verdict']}. First: {event['first']}. "
        f"Last good state: {event['last_good_state']}. See {folder}/flight_recorder.json",
        highlight=False,
    )
    return DIVERGED
