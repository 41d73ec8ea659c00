"""`hf-lnfree train`: a YAML file and flags into dataclasses, then one run."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from pathlib import Path

import yaml
from rich.console import Console
from transformers import HfArgumentParser

from ..training.arguments import LNFreeTrainingArguments, ModelArguments
from ..training.data import DataArguments
from ..training.run import train

DIVERGED = 3  # exit code of a run that ended, though not where it was to end

DESCRIPTION = """Train a model from scratch (a row of arXiv 2410.09637, changed as you like) or from a checkpoint.

CONFIG.yaml holds any of the fields below; flags win over the file, and the file over another that it names as `base`.
For example:

  hf-lnfree train examples/reproduce_paper/gpt2-T128-SM+R.yaml --output_dir runs/relu --seed 1
  hf-lnfree train --row SM+G --config_overrides '{n_layer: 4, n_embd: 64, n_head: 4}' --max_steps 200
"""


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter): ...


def parse_arguments(arguments: list[str]) -> tuple[ModelArguments, DataArguments, LNFreeTrainingArguments]:
    """HfArgumentParser's dataclasses from flags, over the values of a YAML file that may come first."""
    parser = HfArgumentParser(
        [ModelArguments, DataArguments, LNFreeTrainingArguments],  # type: ignore[list-item]
        prog="hf-lnfree train",
        description=DESCRIPTION,
        usage="hf-lnfree train [CONFIG.yaml] [--field value ...]",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    if arguments and not arguments[0].startswith("-"):
        file, *arguments = arguments
        values = read_yaml(Path(file))
        known = {action.dest for action in parser._actions}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{file} has unknown fields: {', '.join(unknown)}. `hf-lnfree train --help` lists all.")
        parser.set_defaults(**values)  # argparse converts those that are text, as PyYAML reads 1e-3
    model, data, training = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return model, data, training  # type: ignore[return-value]


def read_yaml(path: Path, within: tuple[Path, ...] = ()) -> dict:
    """The mapping in a file; `base: other.yaml`, relative to the file, names one whose values it starts from."""
    if not path.is_file():
        raise ValueError(f"There is no configuration file {path}.")
    if path.resolve() in within:
        raise ValueError(f"{path} is its own base.")
    values = yaml.safe_load(path.read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of fields to values.")
    if "base" not in values:
        return values
    base = path.parent / str(values.pop("base"))
    return read_yaml(base, (*within, path.resolve())) | values


def train_command(arguments: list[str], console: Console) -> int:
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
