"""The commands that measure models: entropy, geometry, evaluate, lm-eval, attribute, explore."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..choices import Method, Precision
from . import options as o
from .app import command, console, names, say
from .help import MEASURE


@command("entropy", MEASURE, "hf-lnfree entropy openai-community/gpt2 runs/without-norms --out runs/entropy")
def entropy(
    models: o.Measured,
    data: o.Data = "stdlib",
    text_column: o.TextColumn = None,
    context_length: o.ContextLength = 128,
    max_windows: Annotated[int, o.option(o.TEXT, "How many windows to average over.", **o.COUNT)] = 256,
    trust_remote_code: o.TrustRemoteCode = False,
    revision: o.Revision = None,
    method: Annotated[Method, o.option(o.RUN, "fused: O(T) memory; attentions: eager maps.")] = "auto",
    statistics: Annotated[
        bool, o.option(o.RUN, "Also measure logits, attention sinks and the norms of heads' outputs.", "--statistics")
    ] = False,
    batch_size: o.BatchSize = 16,
    device: o.Device = None,
    maximum: Annotated[
        str, o.option(o.OUTPUT, "The entropy that counts as 100 %: causal, observed, log_length, or nats.")
    ] = "causal",
    out: Annotated[Path | None, o.report_folder("report.html, pictures, JSON and safetensors")] = None,
) -> None:
    """Measure the attention entropy of every head, in nats, with its uncertainty; compare several models."""
    from .entropy import entropy_command, lines, parse_maximum

    top = parse_maximum(maximum)
    access = {"trust_remote_code": trust_remote_code, "revision": revision}
    reports = entropy_command(
        models, data, text_column, context_length, max_windows, batch_size, method, statistics, top, out, device, access
    )
    for text in lines(reports, top):
        say(text)
    if out is not None:
        say(f"Report: {out / 'report.html'}")


@command("geometry", MEASURE, "hf-lnfree geometry runs/with-norms runs/without-norms --out runs/geometry")
def geometry(
    models: o.Measured,
    data: o.Data = "stdlib",
    text_column: o.TextColumn = None,
    context_length: o.ContextLength = 128,
    max_windows: Annotated[int, o.option(o.TEXT, "How many windows or images to read.", **o.COUNT)] = 256,
    trust_remote_code: o.TrustRemoteCode = False,
    revision: o.Revision = None,
    classes: Annotated[
        str | None,
        o.option(
            o.RUN,
            "What units tell apart, with commas: next_token, position, token_kind (of Python), label (of images).",
            show_default="next_token,position; label for images",
        ),
    ] = None,
    groups: Annotated[int, o.option(o.RUN, "Of documents, for standard errors; 1 for none.", **o.COUNT)] = 10,
    only: Annotated[str, o.option(o.RUN, "A pattern for the names of the MLPs to record; all by default.")] = "",
    batch_size: o.BatchSize = 16,
    device: o.Device = None,
    out: Annotated[Path | None, o.report_folder("report.html, pictures, JSON and safetensors")] = None,
) -> None:
    """Measure what the units of every MLP do: spectra, firing, selectivity, alignment; compare several models."""
    from .geometry import geometry_command, lines

    access = {"trust_remote_code": trust_remote_code, "revision": revision}
    kinds = None if classes is None else names(classes)
    reports = geometry_command(
        models,
        data,
        text_column,
        context_length,
        max_windows,
        batch_size,
        kinds,
        groups,
        only,
        out,
        device,
        access,
    )
    for text in lines(reports):
        say(text)
    if out is not None:
        say(f"Report: {out / 'report.html'}")


@command("evaluate", MEASURE, "hf-lnfree evaluate runs/demo/SM+R/seed-0 --data stdlib --out results.json")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name of any causal language model.")],
    data: o.Data = "stdlib",
    text_column: o.TextColumn = None,
    max_documents: Annotated[int | None, o.option(o.TEXT, "Stop after so many.", **o.COUNT)] = None,
    context_length: Annotated[
        int | None, o.option(o.TEXT, "Tokens a window; what the model has positions for by default, up to 1024.")
    ] = None,
    stride: Annotated[
        int | None, o.option(o.TEXT, "Tokens between windows of a long document; half a window by default.")
    ] = None,
    first_token: Annotated[
        bool, o.option(o.TEXT, "Put BOS (or EOS) before each document, to predict all of it.", "--first-token")
    ] = False,
    trust_remote_code: o.TrustRemoteCode = False,
    revision: o.Revision = None,
    metrics: Annotated[str, o.option(o.RUN, "perplexity, bits_per_byte, entropy, sparsity; with commas.")] = (
        "perplexity,bits_per_byte"
    ),
    batch_size: o.BatchSize = 8,
    device: o.Device = None,
    out: Annotated[Path | None, o.option(o.OUTPUT, "A JSON file for the results.")] = None,
) -> None:
    """Perplexity, bits per byte, attention entropy and sparsity of a model, with intervals over documents.

    Each document counts by itself and every token of it but the first is scored once. With torchrun each process takes
    its share.
    """
    from .evaluate import evaluate_command, lines

    options: dict[str, Any] = {"context_length": context_length, "stride": stride, "batch_size": batch_size}
    options |= {"first_token": first_token, "device": device}
    options |= {"trust_remote_code": trust_remote_code, "revision": revision}
    results = evaluate_command(model, data, names(metrics), max_documents, text_column, out, options)
    for text in lines(results):
        say(text)


@command("lm-eval", MEASURE, "hf-lnfree lm-eval runs/demo/SM+G/seed-0 runs/demo/SM+R/seed-0")
def lm_eval(
    models: Annotated[
        list[str], typer.Argument(metavar="MODELS", help="Folders or Hub names of causal language models.")
    ],
    trust_remote_code: o.TrustRemoteCode = False,
    revision: o.Revision = None,
    tasks: Annotated[
        str, o.option(o.RUN, "With commas, any of the harness.", show_default="the three over Python code")
    ] = "code_next_line,code_identifiers,code_brackets",
    limit: Annotated[int | None, o.option(o.RUN, "Documents a task; all by default.", **o.COUNT)] = None,
    batch_size: Annotated[int, o.option(o.RUN, "Requests a forward pass.", **o.COUNT)] = 16,
    device: o.Device = None,
    out: Annotated[Path | None, o.option(o.OUTPUT, "A JSON file for the scores.")] = None,
) -> None:
    """Run lm-evaluation-harness, by default on multiple choice over Python code that needs no network."""
    from ..evaluation.harness import run_harness
    from .lm_eval import table
    from .tables import rich_table

    access = {"trust_remote_code": trust_remote_code, "revision": revision}
    scores = run_harness(models, names(tasks), limit, batch_size, device, out=out, **access)  # type: ignore[arg-type]
    console.print(rich_table(table(scores)))


@command("attribute", MEASURE, "hf-lnfree attribute runs/without-norms --prompt 'import os' --out attribution")
def attribute(
    model: o.OursOrStock,
    prompt: Annotated[str, o.option(o.TEXT, "The text before the token that is explained.")],
    target: Annotated[str | None, o.option(o.TEXT, "That token; the one that the model predicts by default.")] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    revision: o.Revision = None,
    dtype: Annotated[Precision, o.option(o.RUN, "What is computed in.")] = "float64",
    device: o.Device = None,
    top: Annotated[int, o.option(o.OUTPUT, "Components to show.", **o.COUNT)] = 12,
    out: Annotated[Path | None, o.report_folder("report.html, picture and JSON")] = None,
) -> None:
    """Attribute the logit of a token to embeddings, heads, MLPs and biases, and certify how exact that is."""
    from ..pages.attribution import verdict
    from .attribute import attribute_command
    from .tables import rich_table

    access = {"trust_remote_code": trust_remote_code, "revision": revision}
    found, text = attribute_command(model, prompt, target, top, out, dtype, device, access)
    answer = verdict(found, prompt, text)
    say(answer.said)
    console.print(rich_table(found.largest(top)))
    say(answer.limits)
    if out is not None:
        say(f"Report: {out / 'report.html'}")


@command("explore", MEASURE, "hf-lnfree explore runs/with-norms runs/without-norms")
def explore(
    models: Annotated[
        list[str], typer.Argument(metavar="MODELS", help="Folders or Hub names of causal models or encoders.")
    ],
    trust_remote_code: o.TrustRemoteCode = False,
    revision: o.Revision = None,
    device: o.Device = None,
    host: Annotated[str, o.option(o.OUTPUT, "Where the page is served; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, o.option(o.OUTPUT, "The first free one from 7860 on by default.", min=1, max=65535)
    ] = None,
    no_browser: Annotated[bool, o.option(o.OUTPUT, "Do not open the page in a browser.", "--no-browser")] = False,
) -> None:
    """Type a text into a local page: entropies of heads, the map of one, next tokens, attribution; models side by side.

    Needs the extra `app`. Nothing is sent anywhere or fetched from elsewhere.
    """
    from .explore import explore_command

    access = {"trust_remote_code": trust_remote_code, "revision": revision}
    explore_command(models, host, port, not no_browser, device, access, say)
