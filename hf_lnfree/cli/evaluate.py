"""`hf-lnfree evaluate`: documents and a model into metrics, as text and JSON."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..data.arguments import DataArguments
from ..data.splits import load_splits, whole_corpus
from ..evaluation.run import evaluate
from ..files import require_own_file, write_json
from ..records import with_infinities
from ..tables import number


def evaluate_command(
    model: str,
    data: str,
    metrics: Sequence[str],
    max_documents: int | None,
    text_column: str | None,
    out: Path | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The results of one model on one corpus, written to the file `out` if there is one."""
    if out is not None:
        require_own_file(out, "results of evaluate", ("model", "documents_scored"))
    arguments = DataArguments(data=data, text_column=text_column)
    everything = Path(data).expanduser().is_file()
    corpus = whole_corpus(arguments) if everything else load_splits(arguments)[1]
    results = {"data": data, "data_key": corpus.key}
    texts = itertools.islice(corpus.texts, max_documents)
    results |= evaluate(model, texts, metrics=metrics, progress=True, **options)  # type: ignore[arg-type]
    if out is not None and PartialState().is_main_process:
        write_json(out, with_infinities(results))
    return results


def lines(results: dict[str, Any]) -> Iterator[str]:
    """What the terminal shows: a metric a line."""
    if not PartialState().is_main_process:
        return
    known = results["documents_scored"] > 1  # one document has no interval
    if found := results.get("perplexity"):
        low, high = (number(end, ".3f") for end in found["interval_95"])
        interval = f" (95 % interval {low} to {high})" if known else ""
        loss = f"loss {number(found['loss'], '.4f')}{plus_minus(found, known)} nats a token"
        yield f"perplexity {number(found['perplexity'], '.3f')}{interval}; {loss}"
    if found := results.get("bits_per_byte"):
        yield f"bits per byte {number(found['bits_per_byte'], '.4f')}{plus_minus(found, known)}"
    if found := results.get("entropy"):
        yield f"mean attention entropy {number(found['mean_entropy'], '.3f')} nats"
    if found := results.get("sparsity"):
        yield f"activations that are 0: {number(100 * found['sparsity'], '.1f')} %"
    counts = {name: f"{results[name]:,}" for name in ("documents_scored", "tokens", "bytes")}
    told = "" if known else "; no intervals: two documents are needed"
    yield "{documents_scored} documents, {tokens} predicted tokens, {bytes} bytes".format(**counts) + told


def plus_minus(found: dict[str, Any], known: bool) -> str:
    """The half width of an interval, where there is one."""
    return f" ± {number(found['half_width_95'], '.4f')}" if known else ""
