"""`hf-lnfree train`: a YAML file and flags into dataclasses, then one run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..pages.finish import finish_run
from ..tables import duration, number
from ..training.checkpoints import has_weights
from ..training.results import RESULTS
from ..training.run import train
from ..training.settings import parse_settings, read_file, read_settings

DIVERGED = 3  # exit code of a run that ended, though not where it was to end


def parse_arguments(arguments: Sequence[str], **options: Any) -> Any:
    """The dataclasses of a run from flags, over the values of a YAML file that may come first."""
    if not arguments or arguments[0].startswith("-"):
        return parse_settings({}, "", arguments, **options)
    file, *flags = arguments
    return parse_settings(read_settings(Path(file)), file, flags, given=read_file(Path(file)), **options)


def train_command(arguments: Sequence[str], console: Console) -> int:
    """One run, its picture and its card; returns the exit code."""
    model_args, data_args, args = parse_arguments(arguments)
    folder = Path(args.output_dir)
    finished = (folder / RESULTS).is_file()
    results = train(model_args, data_args, args)
    if finished:
        console.print(f"The run in {folder} is finished, and is left as it is.", highlight=False, markup=False)
    if args.push_to_hub or not (finished and (folder / "README.md").is_file()):
        finish_run(folder, args)
    console.print(
        f"{results.row}: eval {results.measure} {number(results.score, '.3f')} after {results.tokens:,} tokens "
        f"and {duration(results.train_seconds)}. Everything is in {args.output_dir}",
        highlight=False,
        markup=False,
    )
    if not results.diverged:
        return 0
    event = results.nonfinite_events[-1]
    console.print(
        f"The run diverged at step {results.diverged_at}: {event['verdict']}. First: {event['first']}. "
        f"Last good state: {event['last_good_state']}. See {args.output_dir}/flight_recorder.json."
        + ("" if has_weights(folder) else " No model was saved: no state of the run was finite."),
        style="bold red",
        highlight=False,
        markup=False,
    )
    return DIVERGED
