"""`hf-lnfree remove-norms`: a model, a YAML file and flags into one removal, then its losses."""

from pathlib import Path

from rich.console import Console

from ..data.arguments import DataArguments
from ..errors import SettingsError
from ..pages.finish import describe_run, finish_run
from ..pages.removal import loss_table, write_removal_report
from ..removal.arguments import RemovalArguments
from ..removal.run import PLAIN, remove_norms
from ..training.arguments import LNFreeTrainingArguments
from ..training.settings import parse_settings, read_settings
from .study import rich_table
from .train import DIVERGED, Help

DESCRIPTION = """Take the LayerNorms out of a model by fine-tuning: one after the other becomes a fixed scale while the
model trains on; at the end all is folded, and neither norm nor division is left.

MODEL is a folder or a Hub name, of ours or stock GPT-2 or Pythia. CONFIG.yaml holds any of the fields below; flags win.
For example:

  hf-lnfree remove-norms runs/with-norms examples/remove_norms/removal.yaml --output_dir runs/without-norms
  hf-lnfree remove-norms openai-community/gpt2 examples/remove_norms/gpt2-small.yaml --bf16
"""


def removal_command(arguments: list[str], console: Console) -> int:
    positional = []
    while arguments and not arguments[0].startswith("-"):
        positional.append(arguments[0])
        arguments = arguments[1:]
    file = positional[1] if len(positional) > 1 else ""
    if len(positional) > 2 or (not positional and not {"-h", "--help"} & set(arguments)):
        raise SettingsError(
            f"remove-norms takes MODEL and at most one CONFIG.yaml, got {' '.join(positional) or 'none'}."
        )
    removal, data, training = parse_settings(
        read_settings(Path(file)) if file else {},
        file,
        arguments,
        dataclasses=(RemovalArguments, DataArguments, LNFreeTrainingArguments),
        prog="hf-lnfree remove-norms",
        description=DESCRIPTION,
        usage="hf-lnfree remove-norms MODEL [CONFIG.yaml] [--field value ...]",
        formatter_class=Help,
    )
    summary = remove_norms(positional[0], removal, data, training)
    folder = Path(training.output_dir)
    if training.process_index == 0:
        write_removal_report(folder, summary)
        if removal.baseline:
            describe_run(folder / PLAIN)
        console.print(rich_table(loss_table(summary)))
        console.print(f"Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    finish_run(folder, training)
    return DIVERGED if summary.diverged else 0
