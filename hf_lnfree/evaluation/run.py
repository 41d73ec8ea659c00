"""What `hf-lnfree evaluate` computes: metrics of one causal language model on the documents of one corpus."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.analyzer import AttentionEntropyAnalyzer
from ..analysis.layers import record_layers
from ..analysis.likelihood import Likelihood, document_likelihoods, perplexity
from ..choices import Metric
from ..errors import SettingsError
from ..loading import find_device, load_model, load_tokenizer
from ..provenance import command, environment
from .documents import TokenisedDocuments

LONGEST_DEFAULT = 1024  # tokens


def evaluate(
    model: str | PreTrainedModel,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    metrics: Sequence[Metric] = ("perplexity", "bits_per_byte"),
    context_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    first_token: bool = False,
    attention_documents: int = 64,
    progress: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """
    Metrics of a causal language model on documents; with several processes each takes its share of them.

    Args:
        model: a model, or its folder or Hub name.
        texts: documents, read as a stream. Empty ones predict nothing and are counted.
        tokenizer: that of the model by default.
        metrics: "perplexity" (and loss, in nats a token, over the S-1 predictions of each document), "bits_per_byte",
            "entropy" (of attention) and "sparsity" (share of activations that are 0), the last two on the first
            `attention_documents`.
        context_length: tokens a window; what the model has positions for by default, up to 1024.
        stride: from one window of a long document to the next; half a window by default.
        batch_size: windows a forward pass.
        first_token: put the tokenizer's BOS (or EOS) token before each document, so that all of it is predicted.
        device: where a model that is a name runs, like "cpu"; the accelerator by default, where there is one.
        trust_remote_code: run code that comes with a model that is a name.
        revision: of its repository.

    Returns:
        For each metric its value and the half width of its 95 % interval over documents, and what it rests on.

    Raises:
        SettingsError: no document predicts a token; windows that the model has no positions for; an unknown metric.
        ModelError: a name that cannot be loaded.
    """
    if unknown := set(metrics) - set(get_args(Metric)):
        raise SettingsError(f"Unknown metrics: {', '.join(sorted(unknown))}. Allowed: {', '.join(get_args(Metric))}.")
    wanted = find_device(device)
    state = PartialState(cpu=wanted.type == "cpu")  # forms a group of processes on the CPU too
    name = model if isinstance(model, str) else str(model.config.name_or_path)
    if isinstance(model, str):
        access: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
        place = state.device if wanted.index is None else wanted
        model = load_model(name, device=place, **access)
        tokenizer = tokenizer or load_tokenizer(name, **access)
    assert isinstance(model, PreTrainedModel)
    if tokenizer is None:
        raise SettingsError("A model that is no name needs its tokenizer as well.")
    context_length = window_length(model, context_length)
    first = opening_token(tokenizer) if first_token else None
    mine = itertools.islice(enumerate(texts), state.process_index, None, state.num_processes)
    counted = Counted(mine, attention_documents, progress and state.is_main_process)
    results: dict[str, Any] = {}
    likelihood = score(model, tokenizer, counted, context_length, stride, batch_size, first)
    if {"entropy", "sparsity"} & set(metrics):
        kept = counted.kept
        if dist.is_initialized():  # every process measures the same few documents
            kept = sorted(gather_object(kept))[:attention_documents]
        few = [text for _, text in kept]
        results |= attention_and_activations(model, tokenizer, few, context_length, batch_size, metrics)
    if dist.is_initialized():
        likelihood = sum(gather_object([likelihood]), Likelihood())
        counted.documents = sum(gather_object([counted.documents]))
    if not likelihood.tokens:
        raise SettingsError(
            f"None of the {counted.documents} documents predicts a token: they are empty, or one token long "
            "(--first-token puts one before each)."
        )
    if "perplexity" in metrics:
        results["perplexity"] = perplexity_of(likelihood)
    if "bits_per_byte" in metrics:
        results["bits_per_byte"] = {
            "bits_per_byte": likelihood.bits_per_byte,
            "half_width_95": likelihood.bits_half_width,
        }
    return {
        "model": name,
        **results,
        "documents": counted.documents,
        "documents_scored": int(likelihood.documents),
        "tokens": int(likelihood.tokens),
        "bytes": int(likelihood.bytes),
        "context_length": context_length,
        "stride": stride or context_length // 2,
        "first_token": first,
        "environment": environment(model.device),
        "command": command(),
    }


class Counted:
    """A stream of numbered texts that counts them and keeps the first that are not empty, with their numbers."""

    def __init__(self, texts: Iterable[tuple[int, str]], keep: int, progress: bool):
        self.texts, self.keep, self.progress = texts, keep, progress
        self.documents = 0
        self.kept: list[tuple[int, str]] = []

    def __iter__(self) -> Iterator[str]:
        for number, text in tqdm(self.texts, desc="documents", unit="", disable=not self.progress):
            self.documents += 1
            if len(self.kept) < self.keep and text.strip():
                self.kept.append((number, text))
            yield text


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    context_length: int,
    stride: int | None,
    batch_size: int,
    first: int | None,
) -> Likelihood:
    """The likelihood of this process's documents."""
    documents = TokenisedDocuments(texts, tokenizer, first)
    likelihood, done = Likelihood(), 0
    for number, nats, tokens in document_likelihoods(model, documents, context_length, stride, batch_size):
        for _ in range(number - done):  # documents that predict nothing
            documents.sizes.popleft()
        likelihood.add(nats, tokens, documents.sizes.popleft())
        done = number + 1
    return likelihood


def perplexity_of(likelihood: Likelihood) -> dict[str, Any]:
    """Perplexity and loss with their 95 % intervals."""
    loss, half = likelihood.loss, likelihood.loss_half_width
    ends = [perplexity(loss + sign * half) for sign in (-1, 1)]
    return {"perplexity": likelihood.perplexity, "interval_95": ends, "loss": loss, "half_width_95": half}


def attention_and_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    context_length: int,
    batch_size: int,
    metrics: Sequence[Metric],
) -> dict[str, Any]:
    """On a few documents, each cut after one window."""
    if not texts:
        return {}
    with record_layers(model) as layers:
        report = AttentionEntropyAnalyzer(model).run(
            texts, tokenizer=tokenizer, context_length=context_length, batch_size=batch_size
        )
    found: dict[str, Any] = {}
    if "entropy" in metrics:
        found["entropy"] = report.summary()
    if "sparsity" in metrics:
        mean = sum(layers.sparsity) / len(layers.sparsity)
        found["sparsity"] = {"sparsity": mean, "layers": layers.sparsity, "dead_units": layers.dead_units}
    return found


def window_length(model: PreTrainedModel, wanted: int | None) -> int:
    """Tokens a window: what was asked for, or what the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if wanted is None:
        return min(positions or LONGEST_DEFAULT, LONGEST_DEFAULT)
    if positions is not None and wanted > positions:
        raise SettingsError(f"--context-length {wanted} exceeds the {positions} positions of the model.")
    return wanted


def opening_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before a document so that all of it is predicted: BOS, or EOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise SettingsError("The tokenizer has neither a BOS nor an EOS token to put before each document.")
