"""The arguments and options that several commands have: one idea, one name, one sentence."""

from pathlib import Path
from typing import Annotated, Any

import typer

TEXT, MODEL, RUN, OUTPUT = "Text", "Model", "Run", "Output"
MOST = 10**9
COUNT: dict[str, Any] = {"min": 1, "max": MOST}
"""What a whole number of things may be."""


def option(group: str, help: str, *names: str, **more: Any) -> Any:
    """An option with its help, in a group of the help."""
    return typer.Option(*names, help=help, rich_help_panel=group, **more)


OursOrStock = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or Hub name of a GPT-2, GPT-NeoX (Pythia) or model of ours.")
]
Data = Annotated[
    str,
    option(
        TEXT,
        "A file: text, or a table (.jsonl, .parquet) with a text a row. Or 'stdlib', a folder or a Hub dataset, of "
        "which the held-out part is taken, as train splits it. For models of images as train has them.",
    ),
]
Measured = Annotated[
    list[str],
    typer.Argument(metavar="MODELS", help="Folders or Hub names of transformers models of text or images."),
]
ContextLength = Annotated[int, option(TEXT, "Tokens a window.", min=2, max=MOST)]
TextColumn = Annotated[str | None, option(TEXT, "Column with the text, of a table or a Hub dataset.")]
BatchSize = Annotated[int, option(RUN, "Windows a forward pass.", **COUNT)]
Device = Annotated[
    str | None, option(RUN, "cpu, cuda, cuda:1, ...; the accelerator of this machine by default, if it has one.")
]
TrainingDevice = Annotated[
    str | None, option(RUN, "cpu, or the kind of accelerator of this machine, which is the default.")
]
TrustRemoteCode = Annotated[
    bool, option(MODEL, "Run the code that comes with a model or a tokenizer.", "--trust-remote-code")
]
Revision = Annotated[str | None, option(MODEL, "Branch, tag or commit of a model on the Hub.")]
Seeds = Annotated[
    str | None,
    option(RUN, "Whole numbers with commas; more than one gives intervals. Those of the file by default, or else 0."),
]
Jobs = Annotated[
    str,
    option(
        RUN,
        "Cells trained at once, each in a process with its share of the cores. auto: one a core, or one on an "
        "accelerator.",
    ),
]
CacheDir = Annotated[str | None, option(TEXT, "Where tokenised text is kept; HF_HOME/hf_lnfree by default.")]
Change = Annotated[list[str] | None, option(RUN, "FIELD=VALUE for all rows, any number of times.", "--set")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a finished run.")]


def report_folder(holds: str) -> Any:
    """`--out` of a command that prints its result and, if asked, writes a folder."""
    return option(OUTPUT, f"Folder for {holds}.")
