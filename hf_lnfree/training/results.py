"""What a run came to: `results.json`, which a run writes last, and by which it counts as finished."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..data.objectives import objective_of
from ..records import Record

RESULTS = "results.json"
ENTROPY = "entropy.json"  # the entropy report of the same run


@dataclass(kw_only=True)
class RunResults(Record):
    """
    `results.json`: what one run was given and what it came to. The fields are the keys of the file.

    Losses are means in nats a token over held-out windows, but for `train_loss`. What is not finite is null in the file
    and NaN here.

    Args:
        row: row of the paper, with what `config_overrides` changed of it, or folder or Hub name of the checkpoint that
            the run began with.
        base_model: Hub name of that checkpoint, or of the one that a run in that folder began with; None for others.
        hub_dataset: Hub name of the dataset; None for other data.
        eval_loss: of the model that was saved; NaN when the run diverged.
        eval_perplexity: exp(eval_loss).
        objective: what the model was trained to predict, see `DataArguments`; None, of earlier versions, for "causal".
        eval_accuracy: share of held-out images whose label is the likeliest; None for other objectives.
        train_loss: mean over the last logging interval, nats a token.
        steps: optimiser steps of the whole run, those before a resumption too.
        diverged_at: the step that stopped the run because it was not finite; None when it ran to its end.
        nonfinite_events: every step that was not finite: `step`, `action`, `verdict`, `figures`, `first`, `tensor`,
            `sample`, and `last_good_state` when the run stopped there.
        tokens: trained on, `steps` times the tokens of a step.
        tokens_per_second: over all devices, since the run was begun or resumed.
        train_seconds: likewise.
        resumed_at: step of the checkpoint that the run went on from; 0 if none.
        seed: of weights, order of the data and dropout.
        parameters: of the model that was saved.
        parameters_outside_embeddings: of these, without embeddings of tokens and positions and an output layer of its
            own; None, of earlier versions.
        trainable_parameters: that training moved, adapters and entropy targets among them.
        data: for `train` and `validation` the `meta.json` of their windows: `sha256` of the tokens, `corpus`,
            `corpus_sha256`, `documents`, `cutting`, `windows`, `context_length` (tokens), `dropped_tokens`, `dtype`;
            for `validation` also `used`, how many windows were evaluated on.
        model: the model's configuration.
        choices: `attn_implementation` and `loss`, as in choices.json.
        arguments: all fields of `model`, `data` and `training`.
        environment: versions, device, number of processes.
        command: the command line.
        lora_rank: rank of the adapters, which are merged by now; None without adapters.
        removal: `schedule`, `gate_steps`, `residual_norm_weight`, `events` (every removal with the losses around it)
            and `sigma` (by norm, of the first position and of the others); None when no norm was removed.
        entropy_regularization: `weight`, `tolerance`, `target`, `form` and the learned `targets` [layers][heads], as
            shares of the largest entropy; None without.
        overloaded_heads: share of heads whose mean entropy is above 3/4 of the causal bound; None when not measured.
        collapsed_heads: at or below 1/4 of it.
        more: keys that a procedure of your own reports.
    """

    file: ClassVar[str] = RESULTS

    row: str
    base_model: str | None
    hub_dataset: str | None
    eval_loss: float
    eval_perplexity: float
    train_loss: float
    steps: int
    diverged_at: int | None
    nonfinite_events: list[dict[str, Any]]
    tokens: int
    tokens_per_second: float
    train_seconds: float
    resumed_at: int
    seed: int
    parameters: int
    trainable_parameters: int
    data: dict[str, dict[str, Any]]
    model: dict[str, Any]
    choices: dict[str, str]
    arguments: dict[str, dict[str, Any]]
    environment: dict[str, Any]
    command: str
    parameters_outside_embeddings: int | None = None
    objective: str | None = None
    eval_accuracy: float | None = None
    lora_rank: int | None = None
    removal: dict[str, Any] | None = None
    entropy_regularization: dict[str, Any] | None = None
    overloaded_heads: float | None = None
    collapsed_heads: float | None = None

    @property
    def diverged(self) -> bool:
        return self.diverged_at is not None

    @property
    def name(self) -> str:
        """The row, or the last part of the checkpoint that the run began with."""
        return self.row.rstrip("/").rpartition("/")[2]

    @property
    def context_length(self) -> int:
        """Tokens a window."""
        return self.data["train"]["context_length"]

    @property
    def measure(self) -> str:
        """What the model is judged by: "perplexity" or "accuracy"."""
        return objective_of(self.objective).metric

    @property
    def score(self) -> float:
        """Its value, NaN when the run diverged."""
        value = getattr(self, f"eval_{self.measure}")
        return math.nan if value is None else value
