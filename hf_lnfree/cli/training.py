"""The commands that train, and what looks at many runs: train, remove-norms, demo, study, compare."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.arguments import DataArguments
from ..errors import SettingsError
from ..removal.arguments import RemovalArguments
from ..training.fields import CheckpointArguments, ModelArguments, TrainingFields
from . import options as o
from .app import command, console, names, say
from .fields import FieldsCommand, takes_fields
from .help import TRAIN


@command(
    "train",
    TRAIN,
    "hf-lnfree train examples/accelerate/small.yaml --seed 1 --out runs/small",
    "hf-lnfree train --row SM+G --config-overrides '{n_layer: 4}' --max-steps 200",
    cls=FieldsCommand,
)
@takes_fields(ModelArguments, DataArguments, TrainingFields)
def train(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG.yaml", help="A YAML file with any of the fields below.")
    ] = None,
    **fields: Any,
) -> None:
    """Train a model: a row of arXiv 2410.09637, changed as you like, or a checkpoint.

    CONFIG.yaml comes first. Its fields are the options below, with underscores; flags win over it, and it wins over
    another file that it names as `base`. Exit code 3: the run diverged.
    """
    from .train import train_command

    raise typer.Exit(train_command(context.args, console))


@command(
    "remove-norms",
    TRAIN,
    "hf-lnfree remove-norms runs/with-norms removal.yaml --out runs/without-norms",
    "hf-lnfree remove-norms openai-community/gpt2 gpt2-small.yaml --bf16",
    cls=FieldsCommand,
)
@takes_fields(RemovalArguments, CheckpointArguments, DataArguments, TrainingFields)
def remove_norms(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder or Hub name, of this package or stock GPT-2, Pythia, OPT, Llama, Qwen3, ViT or T5.",
        ),
    ],
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG.yaml", help="A YAML file with any of the fields below.")
    ] = None,
    **fields: Any,
) -> None:
    """Take the norms out of a model by fine-tuning it, LayerNorms or RMSNorms.

    One after the other becomes a fixed scale while the model trains on; at the end all is folded into the weights, and
    neither norm nor division is left. MODEL and CONFIG.yaml come first; flags win over the file.
    """
    from .removal import removal_command

    raise typer.Exit(removal_command(context.args, console))


@command(
    "estimate",
    TRAIN,
    "hf-lnfree estimate examples/models/gpt2-xl.yaml --devices 8 --gpu-memory 80GB",
    "hf-lnfree estimate examples/models/llama-1.1b.yaml --set loss=chunked",
)
def estimate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A file as train takes it.")],
    change: o.Change = None,
    devices: Annotated[int, o.option(o.RUN, "How many devices train together.", **o.COUNT)] = 1,
    gpu_memory: Annotated[str, o.option(o.RUN, "Memory of each, like 80GB or 24GiB.")] = "80GB",
    fsdp: Annotated[bool, o.option(o.RUN, "Shard weights, gradients and moments.", "--fsdp")] = False,
    checkpointing: Annotated[
        bool, o.option(o.RUN, "Keep the input of every block only, and compute it again.", "--checkpointing")
    ] = False,
    dtype: Annotated[
        str | None, o.option(o.RUN, "bf16, fp16 or float32, of matrix products; that of the file by default.")
    ] = None,
    optim: Annotated[str | None, o.option(o.RUN, "Optimiser; that of the file by default.")] = None,
    tokens: Annotated[
        int | None, o.option(o.RUN, "To train on; those of max_steps by default.", min=1, max=10**18)
    ] = None,
    mfu: Annotated[float, o.option(o.RUN, "Share of the peak speed that is reached.")] = 0.3,
    peak_flops: Annotated[
        float | None,
        o.option(
            o.RUN,
            "FLOP/s of a device at its peak.",
            show_default="an H100's: 989e12 in half precision, 67e12 in float32",
        ),
    ] = None,
    out: Annotated[Path | None, o.option(o.OUTPUT, "A JSON file for the same.")] = None,
) -> None:
    """Say what a training will take: memory of each device, FLOPs, days; nothing is trained.

    CONFIG.yaml and --set are those of a run. Exit code 1: it does not fit; the error says what would make it fit.
    """
    from ..training.plans import Devices
    from .estimate import changes_of, estimate_command, parse_memory
    from .study import parse_changes

    changes = changes_of(parse_changes(change or ()), fsdp, checkpointing, dtype, optim)
    where = Devices(devices, parse_memory(gpu_memory), mfu=mfu, peak_flops=peak_flops)
    for line in estimate_command(config, changes, where, tokens, out):
        say(line)


@command("demo", TRAIN, "hf-lnfree demo --scale evening")
def demo(
    scale: Annotated[
        str | None,
        o.option(o.RUN, "minutes: one seed, 3.1M tokens a row. evening: three seeds, 16M tokens; about two hours."),
    ] = None,
    seeds: o.Seeds = None,
    change: o.Change = None,
    jobs: o.Jobs = "auto",
    device: o.TrainingDevice = None,
    cache_dir: o.CacheDir = None,
    out: Annotated[
        Path | None,
        o.report_folder("checkpoints, logs, tables and report.html; runs/demo by default, and -SCALE if one is named"),
    ] = None,
) -> None:
    """Train the paper's four rows from scratch on real text and write a report.

    Rows: SM+LN+G, SM+LN+R (LayerNorm) and SM+G, SM+R (without), with GELU and ReLU. Finished rows are kept when the
    command is run again.
    """
    begin_importing(jobs)
    from .study import DEMO, parse_jobs, parse_seeds, study_command

    local = {"cache_dir": cache_dir, "device": device}
    numbers, at_once = parse_seeds(seeds), parse_jobs(jobs)
    folder = out or Path("runs") / "-".join(filter(None, ("demo", scale)))
    raise typer.Exit(study_command(DEMO, scale, numbers, folder, None, False, change, at_once, local, console))


@command("study", TRAIN, "hf-lnfree study examples/findings/hybrids.yaml --scale small --seeds 0,1,2")
def study(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A study, like examples/reproduce_paper/study-gpt2-T128.yaml.")
    ],
    scale: Annotated[
        str | None, o.option(o.RUN, "A scale of the file, like small, gpu or paper; the first by default.")
    ] = None,
    seeds: o.Seeds = None,
    rows: Annotated[str | None, o.option(o.RUN, "Only these rows, with commas between them.")] = None,
    change: o.Change = None,
    jobs: o.Jobs = "auto",
    device: o.TrainingDevice = None,
    dry_run: Annotated[bool, o.option(o.RUN, "Show the state of every cell and stop.", "--dry-run")] = False,
    search: Annotated[
        str | None, o.option("Search", "Two activations, like relu,gelu: find which layers are to have the first.")
    ] = None,
    budget: Annotated[int, o.option("Search", "Steps that it may take for each seed.", **o.COUNT)] = 20_000,
    cache_dir: o.CacheDir = None,
    out: Annotated[
        Path | None,
        o.report_folder("checkpoints, logs, tables and report.html; runs/ and the name of the file by default"),
    ] = None,
) -> None:
    """Train rows x seeds of a study and write tables, pictures and a report.

    Finished cells are kept, interrupted ones go on, and a cell that diverges is recorded as such; may be interrupted at
    any moment. Several processes may share an output folder. Exit code 3: a cell diverged. With --search each layer of
    one row gets one of two activations, by sequential halving that begins with the layers whose heads are overloaded.
    """
    if not dry_run:
        begin_importing(jobs)
    from .study import parse_jobs, parse_seeds, search_command, study_command

    numbers, at_once = parse_seeds(seeds), parse_jobs(jobs)
    chosen = None if rows is None else names(rows)
    local = {"cache_dir": cache_dir, "device": device}
    folder = out or Path("runs") / "-".join(filter(None, (file.stem, scale, "search" if search else None)))
    if search is not None:
        if dry_run:
            raise SettingsError("--dry-run shows the cells of a study; those of a --search are found on the way.")
        raise typer.Exit(
            search_command(file, scale, chosen, search, budget, numbers, folder, change, at_once, local, console)
        )
    raise typer.Exit(study_command(file, scale, numbers, folder, chosen, dry_run, change, at_once, local, console))


def begin_importing(jobs: str) -> None:
    """In the process that those of several jobs are forked from."""
    if jobs != "1" and "RANK" not in os.environ:
        from ..studies.server import start_importing

        start_importing()


@command("scaling", TRAIN, "hf-lnfree scaling runs/ladder --pair SM+R,SM+G --out runs/scaling")
def scaling(
    studies: Annotated[
        list[Path], typer.Argument(metavar="STUDY...", help="Output folders of studies at several sizes.")
    ],
    pair: Annotated[
        list[str] | None, o.option(o.RUN, "Two rows whose perplexities to compare: SM+R,SM+G. May be given again.")
    ] = None,
    parameters: Annotated[float, o.option(o.RUN, "Size to foretell: parameters outside embeddings.", min=1)] = 85e6,
    tokens: Annotated[float, o.option(o.RUN, "Tokens that it is trained on.", min=1)] = 2.1e9,
    replicates: Annotated[int, o.option(o.RUN, "Bootstrap replicates behind the laws.", min=0, max=100_000)] = 200,
    out: Annotated[Path | None, o.report_folder("report.html, the picture and scaling.json")] = None,
) -> None:
    """Fit loss over parameters and tokens, and foretell what rows differ by at a larger size."""
    from .scaling import scaling_command

    scaling_command(studies, pair, (parameters, tokens), replicates, out, console)


@command("compare", TRAIN, "hf-lnfree compare runs/demo runs/demo-three --out runs/comparison")
def compare(
    one: Annotated[Path, typer.Argument(metavar="ONE", help="Output folder of a study.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Output folder of another.")],
    out: Annotated[Path | None, o.report_folder("comparison.md and comparison.tex")] = None,
) -> None:
    """Compare two studies row by row, paired by seed."""
    from .study import compare_command

    compare_command(one, other, out, console)
