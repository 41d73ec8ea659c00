"""`hf-lnfree train`: a YAML file and flags into dataclasses, then one run."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from pathlib import Path

from rich.console import Console

from ..pages.finish import finish_run
from ..tables import number
from ..training.run import train
from ..training.settings import RunArguments, parse_settings, read_settings

DIVERGED = 3  # exit code of a run that ended, though not where it was to end

DESCRIPTION = """Train a model from scratch (a row of arXiv 2410.09637, changed as you like) or from a checkpoint.

CONFIG.yaml holds any of the fields below; flags win over the file, and the file over another that it names as `base`.
For example:

  hf-lnfree train examples/reproduce_paper/gpt2-T128-SM+R.yaml --output_dir runs/relu --seed 1
  hf-lnfree train --row SM+G --config_overrides '{n_layer: 4, n_embd: 64, n_head: 4}' --max_steps 200
"""


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter): ...


def parse_arguments(arguments: list[str]) -> RunArguments:
    """The dataclasses of a run from flags, over the values of a YAML file that may come first."""
    values, file = {}, ""
    if arguments and not arguments[0].startswith("-"):
        file, *arguments = arguments
        values = read_settings(Path(file))
    return parse_settings(
        values,
        file,
        arguments,
        prog="hf-lnfree train",
        description=DESCRIPTION,
        usage="hf-lnfree train [CONFIG.yaml] [--field value ...]",
        formatter_class=Help,
    )


def train_command(arguments: list[str], console: Console) -> int:
    model_args, data_args, args = parse_arguments(arguments)
    results = train(model_args, data_args, args)
    finish_run(Path(args.output_dir), args)
    console.print(
        f"{results.row}: eval perplexity {number(results.eval_perplexity, '.3f')} after {results.tokens:,} tokens. "
        f"Everything is in {args.output_dir}",
        highlight=False,
    )
    if not results.diverged:
        return 0
    event = results.nonfinite_events[-1]
    console.print(
        f"[bold red]The run diverged at step {results.diverged_at}:[/] {event['verdict']}. First: {event['first']}. "
        f"Last good state: {event['last_good_state']}. See {args.output_dir}/flight_recorder.json",
        highlight=False,
    )
    return DIVERGED
