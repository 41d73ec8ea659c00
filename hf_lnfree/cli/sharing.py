"""The commands that hand models on: convert, card, push."""

from pathlib import Path
from typing import Annotated

import typer

from ..choices import Dtype, Encoding, Target
from . import options as o
from .app import command, say
from .help import SHARE


@command("convert", SHARE, "hf-lnfree convert openai-community/gpt2 gpt2-folded --to folded")
def convert(
    source: o.OursOrStock,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not be there.")],
    trust_remote_code: Annotated[
        bool, o.option(o.MODEL, "Compare with the code that comes with a stock checkpoint.", "--trust-remote-code")
    ] = False,
    revision: o.Revision = None,
    to: Annotated[
        Target,
        o.option(
            o.OUTPUT,
            "lnfree: ours, bit for bit; folded: norms in weights; fused: identity MLPs too; stock; onnx.",
        ),
    ] = "lnfree",
    dtype: Annotated[Dtype | None, o.option(o.OUTPUT, "Of the new weights; as they are by default.")] = None,
    cache: Annotated[
        bool, o.option(o.OUTPUT, "ONNX with keys and values of earlier tokens as inputs.", "--cache")
    ] = False,
    encoding: Annotated[
        Encoding | None,
        o.option(
            o.OUTPUT,
            "Of LayerNorms that do nothing in a stock model: epsilon 1e12, as in published checkpoints, or 2^60, which "
            "bfloat16 needs.",
        ),
    ] = None,
    check: Annotated[bool, o.option(o.RUN, "Compare logits before and after; holds both models in memory.")] = True,
    device: Annotated[str, o.option(o.RUN, "Where they are compared: cpu, cuda, ...")] = "cpu",
) -> None:
    """Convert a checkpoint, exactly: stock to ours, norms folded, ours to stock, to ONNX.

    GPT-2s published without LayerNorm (disabled by eps = 1e12, or as identities) become models without any.
    """
    from .convert import convert_command, lines

    access = {"trust_remote_code": trust_remote_code, "revision": revision}
    report = convert_command(source, out, to, dtype, cache, check, device, encoding, access)
    for text in lines(report, out):
        say(text)


@command("card", SHARE, "hf-lnfree card runs/without-norms --repo-id me/without-norms")
def card(
    run: o.RunFolder,
    repo_id: Annotated[str | None, o.option(o.OUTPUT, "The repository that the card's example loads.")] = None,
) -> None:
    """Write the model card of a run from what it recorded: README.md in its folder."""
    from ..sharing.card import write_card

    say(f"Written: {write_card(run, repo_id)}")


@command("push", SHARE, "hf-lnfree push runs/without-norms --repo-id me/without-norms --private")
def push(
    run: o.RunFolder,
    repo_id: Annotated[str, o.option(o.OUTPUT, "The repository, like owner/name; made if it is not there.")],
    private: Annotated[bool, o.option(o.OUTPUT, "Make it private, if it is made.", "--private")] = False,
    revision: Annotated[str | None, o.option(o.OUTPUT, "Branch; made if it is not there.")] = None,
    message: Annotated[str | None, o.option(o.OUTPUT, "Of the commit.")] = None,
) -> None:
    """Push a run to the Hub: weights, code, tokenizer, settings, entropies and card, in one commit."""
    from ..sharing.push import push_run

    say(push_run(run, repo_id, private, revision, message))
