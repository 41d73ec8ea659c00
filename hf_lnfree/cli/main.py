"""`hf-lnfree`: train, entropy and demo."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from ..analysis.capture import Method

app = typer.Typer(
    name="hf-lnfree",
    help="LayerNorm-free language models: train them, measure their attention entropy, see the paper's rows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)

# What a wrong argument, file or checkpoint raises; anything else is a defect and shows its traceback.
USER_ERRORS = (ValueError, OSError, RuntimeError, SafetensorError)


@app.callback()
def common(
    context: typer.Context,
    traceback: Annotated[bool, typer.Option(help="Show the whole traceback of an error.")] = False,
) -> None:
    context.obj = traceback


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a model: hf-lnfree train CONFIG.yaml [--field value ...]. --help lists every field."""
    from .train import train_command

    raise typer.Exit(train_command(context.args, console))


@app.command()
def entropy(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub names of any transformers text models.")],
    data: Annotated[
        str,
        typer.Option(
            help="A file of text; or the held-out part of 'stdlib', a folder or a Hub dataset, as train splits it."
        ),
    ] = "stdlib",
    context_length: Annotated[int, typer.Option(help="Tokens a window.", min=2)] = 128,
    windows: Annotated[int, typer.Option(help="How many windows to average over.", min=1)] = 256,
    batch_size: Annotated[int, typer.Option(help="Windows a forward pass.", min=1)] = 16,
    method: Annotated[Method, typer.Option(help="fused: O(T) memory; attentions: eager maps.")] = "auto",
    maximum: Annotated[
        str, typer.Option(help="The entropy that counts as 100 %: causal, observed, log_length, or nats.")
    ] = "causal",
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, pictures, JSON and safetensors.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; the accelerator if there is one.")] = "",
    trust_remote_code: Annotated[bool, typer.Option(help="Run modeling code that comes with the checkpoint.")] = False,
) -> None:
    """Measure the attention entropy of every head, in nats, with its uncertainty; compare several models.

    Example: hf-lnfree entropy runs/demo/SM+G/seed-0 runs/demo/SM+R/seed-0 --out entropy-report
    """
    from .entropy import entropy_command, lines, parse_maximum

    top = parse_maximum(maximum)
    reports = entropy_command(
        models, data, context_length, windows, batch_size, method, top, out, device, trust_remote_code
    )
    for text in lines(reports, top):
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    if out is not None:
        console.print(f"Report: {out / 'report.html'}")


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Checkpoints, logs and report.html.")] = Path("runs/demo"),
    seeds: Annotated[str, typer.Option(help="Comma-separated; more than one gives intervals.")] = "0",
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps a row; the default fits ten minutes.", min=1)
    ] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Where tokenised data is kept.")] = None,
    use_cpu: Annotated[bool, typer.Option(help="Train on the CPU also where there is a GPU.")] = False,
) -> None:
    """Train the paper's four rows from scratch on real text and write a report.

    Rows: SM+LN+G, SM+LN+R (LayerNorm) and SM+G, SM+R (without), with GELU and ReLU. Finished rows are kept when the
    command is run again.
    """
    from dataclasses import replace

    from ..training.demo import DemoSettings, run_demo
    from ..training.demo_report import summary_table

    settings = DemoSettings() if steps is None else replace(DemoSettings(), steps=steps)
    runs = run_demo(
        output_dir, parse_seeds(seeds), settings=settings, cache_dir=cache_dir, use_cpu=use_cpu, announce=console.print
    )
    summary = summary_table(runs)
    table = Table(box=SIMPLE_HEAD)
    for heading in summary.header:
        table.add_column(heading, no_wrap=True)
    for row in summary.rows:
        table.add_row(*row)
    console.print(table)
    console.print(summary.note, highlight=False)
    console.print(f"Report: {output_dir / 'report.html'}")


def parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds must be whole numbers with commas between them, like 0,1,2; got {text!r}.") from None
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds names a seed twice: {text}.")
    return seeds


def main(arguments: list[str] | None = None) -> int:
    """The console script. Exit codes: 0 done, 1 wrong input, 2 wrong usage, 3 a run diverged, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.utils.data")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_lnfree").setLevel(logging.INFO)
    try:
        return app(args=arguments, standalone_mode=False) or 0
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return 130
    except KeyboardInterrupt:
        errors.print("Interrupted.")
        return 130
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            error.show()  # type: ignore[attr-defined]
            return 2
        if "--traceback" in arguments or not isinstance(error, USER_ERRORS):
            raise
        errors.print(f"[bold red]error:[/] {one_line(error)}", highlight=False, soft_wrap=True)
        return 1


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
