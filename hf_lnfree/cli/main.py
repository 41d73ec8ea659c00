"""`hf-lnfree`: every command, its arguments and its help."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError

from ..analysis.capture import Method
from ..conversion.run import Target
from ..errors import SettingsError

app = typer.Typer(
    name="hf-lnfree",
    help="LayerNorm-free language models: train them, run studies, measure attention entropy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Seeds = Annotated[str, typer.Option(help="Comma-separated; more than one gives intervals.")]
FOLDER = typer.Option(help="Checkpoints, logs, tables and report.html.")
CacheDir = Annotated[str | None, typer.Option(help="Where tokenised data is kept.")]
UseCPU = Annotated[bool, typer.Option(help="Train on the CPU also where there is a GPU.")]
Change = Annotated[list[str] | None, typer.Option("--set", help="field=value for all rows; may be given repeatedly.")]

console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of several processes the first one speaks
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


@app.command(
    name="remove-norms",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def remove_norms(context: typer.Context) -> None:
    """Remove LayerNorms by fine-tuning: hf-lnfree remove-norms MODEL [CONFIG.yaml] [--field value ...]."""
    from .removal import removal_command

    raise typer.Exit(removal_command(context.args, console))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub name of a GPT-2, GPT-NeoX (Pythia) or model of ours.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not be there.")],
    to: Annotated[
        Target,
        typer.Option(
            help="lnfree: ours, bit for bit; folded: norms in weights; fused: identity MLPs too; stock; onnx."
        ),
    ] = "lnfree",
    dtype: Annotated[str | None, typer.Option(help="Of the new weights: float32, bfloat16, ...; as they are.")] = None,
    cache: Annotated[bool, typer.Option(help="ONNX with keys and values of earlier tokens as inputs.")] = False,
    check: Annotated[bool, typer.Option(help="Compare logits before and after; holds both models in memory.")] = True,
    revision: Annotated[str | None, typer.Option(help="Of a Hub repository.")] = None,
) -> None:
    """Convert a checkpoint, exactly: stock to ours, norms folded, ours to stock, to ONNX.

    GPT-2s published without LayerNorm (disabled by eps = 1e12, or as identities) become models without any.

    Example: hf-lnfree convert openai-community/gpt2 gpt2-folded --to folded
    """
    from .convert import convert_command, lines

    report = convert_command(source, out, to, dtype, cache, check, revision)
    for text in lines(report, out):
        console.print(text, highlight=False, soft_wrap=True, markup=False)


@app.command()
def attribute(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a GPT-2, GPT-NeoX (Pythia) or model of ours.")],
    prompt: Annotated[str, typer.Option(help="The text before the token that is explained.")],
    target: Annotated[str | None, typer.Option(help="That token; the one that the model predicts.")] = None,
    top: Annotated[int, typer.Option(help="Components to show.", min=1)] = 12,
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, picture and JSON.")] = None,
    dtype: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
) -> None:
    """Attribute the logit of a token to embeddings, heads, MLPs and biases, and certify how exact that is.

    Example: hf-lnfree attribute runs/without-norms --prompt "import os" --out attribution
    """
    from ..pages.attribution import attribution_table, certificate
    from .attribute import attribute_command
    from .study import rich_table

    found, text = attribute_command(model, prompt, target, top, out, dtype)
    console.print(f"Logit of {text!r} after {prompt!r}:", highlight=False, markup=False)
    console.print(rich_table(attribution_table(found, top)))
    for sentence in certificate(found):
        console.print(sentence, highlight=False, markup=False)
    if out is not None:
        console.print(f"Report: {out / 'report.html'}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of any causal language model.")],
    data: Annotated[
        str,
        typer.Option(
            help="A file (text, or .jsonl with a text a line); or the held-out part of 'stdlib', a folder, a Hub set."
        ),
    ] = "stdlib",
    metrics: Annotated[str, typer.Option(help="perplexity, bits_per_byte, entropy, sparsity; with commas.")] = (
        "perplexity,bits_per_byte"
    ),
    context_length: Annotated[int | None, typer.Option(help="Tokens a window; the model's positions, to 1024.")] = None,
    stride: Annotated[int | None, typer.Option(help="Between windows of a long document; half a window.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows a forward pass.", min=1)] = 8,
    first_token: Annotated[
        bool, typer.Option(help="Put BOS (or EOS) before each document, to predict all of it.")
    ] = False,
    max_documents: Annotated[int | None, typer.Option(help="Stop after so many.", min=1)] = None,
    text_column: Annotated[str | None, typer.Option(help="Of a .jsonl file or a Hub dataset.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the results.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run modeling code that comes with the checkpoint.")] = False,
) -> None:
    """Perplexity, bits per byte, attention entropy and sparsity of a model, with intervals over documents.

    Each document counts by itself and every token of it but the first is scored once. With torchrun each process takes
    its share. Example: hf-lnfree evaluate runs/demo/SM+R/seed-0 --data stdlib --out results.json
    """
    from .evaluate import evaluate_command, lines

    asked = [name.strip() for name in metrics.split(",") if name.strip()]
    options = {"context_length": context_length, "stride": stride, "batch_size": batch_size}
    options |= {"first_token": first_token, "trust_remote_code": trust_remote_code}
    results = evaluate_command(model, data, asked, max_documents, text_column, out, options)
    for text in lines(results):
        console.print(text, highlight=False, soft_wrap=True, markup=False)


@app.command(name="lm-eval")
def lm_eval(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub names of causal language models.")],
    tasks: Annotated[str, typer.Option(help="With commas; any of the harness.")] = (
        "code_next_line,code_identifiers,code_brackets"
    ),
    limit: Annotated[int | None, typer.Option(help="Documents a task; all.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Requests a forward pass.", min=1)] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the accelerator if there is one.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run modeling code that comes with the checkpoint.")] = False,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the scores.")] = None,
) -> None:
    """Run lm-evaluation-harness, by default on multiple choice over Python code that needs no network.

    Example: hf-lnfree lm-eval runs/demo/SM+G/seed-0 runs/demo/SM+R/seed-0
    """
    from ..evaluation.harness import run_harness
    from .lm_eval import table
    from .study import rich_table

    asked = [name.strip() for name in tasks.split(",") if name.strip()]
    scores = run_harness(models, asked, limit, batch_size, device, trust_remote_code, out)
    console.print(rich_table(table(scores)))


@app.command()
def card(
    run: Annotated[Path, typer.Argument(help="Output folder of a finished run.")],
    repo_id: Annotated[str | None, typer.Option(help="The repository that the card's example loads.")] = None,
) -> None:
    """Write the model card of a run from what it recorded: README.md in its folder."""
    from ..sharing.card import write_card

    console.print(f"Written: {write_card(run, repo_id)}", highlight=False, soft_wrap=True)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="Output folder of a finished run.")],
    repo_id: Annotated[str, typer.Option(help="The repository, like name/model; made if it is not there.")],
    private: Annotated[bool, typer.Option(help="Make it private, if it is made.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it is not there.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Push a run to the Hub: weights, code, tokenizer, settings, entropies and card, in one commit."""
    from ..sharing.push import push_run

    console.print(push_run(run, repo_id, private, revision, message), highlight=False, soft_wrap=True)


@app.command()
def demo(
    output_dir: Annotated[Path, FOLDER] = Path("runs/demo"),
    seeds: Seeds = "0",
    cache_dir: CacheDir = None,
    use_cpu: UseCPU = False,
    change: Change = None,
) -> None:
    """Train the paper's four rows from scratch on real text and write a report.

    Rows: SM+LN+G, SM+LN+R (LayerNorm) and SM+G, SM+R (without), with GELU and ReLU. Finished rows are kept when the
    command is run again.
    """
    from .study import DEMO, study_command

    local = {"cache_dir": cache_dir, "use_cpu": use_cpu}
    raise typer.Exit(study_command(DEMO, None, parse_seeds(seeds), output_dir, None, False, change, local, console))


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="A study, like examples/reproduce_paper/study-gpt2-T128.yaml.")],
    scale: Annotated[str | None, typer.Option(help="A scale of the file: cpu, gpu or paper; the first.")] = None,
    seeds: Seeds = "0",
    output_dir: Annotated[Path | None, FOLDER] = None,
    rows: Annotated[str | None, typer.Option(help="Only these rows, with commas between them.")] = None,
    search: Annotated[
        str | None, typer.Option(help="Two activations, like relu,gelu: find which layers are to have the first.")
    ] = None,
    budget: Annotated[int, typer.Option(help="Steps that a search may take for each seed.", min=1)] = 20_000,
    dry_run: Annotated[bool, typer.Option(help="Show the state of every cell and stop.")] = False,
    cache_dir: CacheDir = None,
    use_cpu: UseCPU = False,
    change: Change = None,
) -> None:
    """Train rows x seeds of a study and write tables, pictures and a report.

    Finished cells are kept, interrupted ones go on, and a cell that diverges is recorded as such; may be interrupted at
    any moment. Several processes may share an output folder. Exit code 3: a cell diverged. With --search each layer of
    one row gets one of two activations, by sequential halving that begins with the layers whose heads are overloaded.

    Example: hf-lnfree study examples/reproduce_paper/study-gpt2-T128.yaml --scale cpu --seeds 0,1,2
    """
    from .study import search_command, study_command

    chosen = None if rows is None else [row.strip() for row in rows.split(",")]
    local = {"cache_dir": cache_dir, "use_cpu": use_cpu}
    folder = output_dir or Path("runs") / "-".join(filter(None, (file.stem, scale, "search" if search else None)))
    if search is not None:
        if dry_run:
            raise SettingsError("--dry-run shows the cells of a study; those of a --search are found on the way.")
        raise typer.Exit(
            search_command(file, scale, chosen, search, budget, parse_seeds(seeds), folder, change, local, console)
        )
    raise typer.Exit(study_command(file, scale, parse_seeds(seeds), folder, chosen, dry_run, change, local, console))


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="Output folder of a study.")],
    other: Annotated[Path, typer.Argument(help="Output folder of another.")],
    out: Annotated[Path | None, typer.Option(help="Folder for comparison.md and comparison.tex.")] = None,
) -> None:
    """Compare two studies row by row, paired by seed."""
    from .study import compare_command

    compare_command(one, other, out, console)


def parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except SettingsError:
        raise SettingsError(
            f"--seeds must be whole numbers with commas between them, like 0,1,2; got {text!r}."
        ) from None
    if len(set(seeds)) != len(seeds):
        raise SettingsError(f"--seeds names a seed twice: {text}.")
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
        errors.print(f"[bold red]error:[/] {escape(one_line(error))}", highlight=False, soft_wrap=True)
        return 1


def leave_process_group() -> None:
    """Before the interpreter ends: a group that is taken down by it may abort the process."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    code = main()
    leave_process_group()
    sys.exit(code)
