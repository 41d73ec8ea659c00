"""`run.json`: what a run was begun with, kept beside its first checkpoint and compared whenever it is resumed."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Self

from ..data.arguments import DataArguments
from ..data.splits import RunData
from ..data.tokenization import tokenizer_hash
from ..errors import RunError
from ..files import strict
from ..provenance import environment
from ..records import Record
from .arguments import LNFreeTrainingArguments, ModelArguments
from .checkpoints import find_checkpoint, goes_on
from .results import RESULTS, RunResults

# Fields that no result depends on: where things are kept, what is logged, measured and saved on the way, the machine.
FREE: tuple[str, ...] = (
    *("output_dir", "cache_dir", "tokenizing_processes", "trust_remote_code", "resume_from_checkpoint", "baseline"),
    *("log_*", "logging_*", "report_to", "run_name", "project", "trackio_*", "disable_tqdm", "recorder_samples"),
    *("attention_report_windows", "include_*", "skip_memory_metrics", "debug", "do_*"),
    *("eval_*", "per_device_eval_batch_size", "prediction_loss_only", "batch_eval_metrics"),
    *("save_*", "enable_jit_checkpoint", "push_to_hub", "hub_*"),
    *("use_cpu", "local_rank", "ddp_backend", "ddp_timeout", "torch_empty_cache_steps", "dataloader_num_workers"),
    *("dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "fsdp", "fsdp_config"),
)
PROCESSES = "processes"
# May be others when their product is the same.
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", PROCESSES)
SHOWN = 12  # characters of a hash in a message

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """A field, a hash or a version that is another now."""

    name: str
    was: Any
    now: Any
    allowed: bool

    def __str__(self) -> str:
        was, now = (value[:SHOWN] if self.name.endswith("sha256") else repr(value) for value in (self.was, self.now))
        return f"{self.name} was {was}, is {now}"


@dataclass(kw_only=True)
class Beginning(Record):
    """
    `run.json`: what a run was begun with. The fields are the keys of the file.

    Args:
        settings: all fields of `model`, `data` and `training`, and what the `procedure` was told.
        environment: versions, device, number of processes.
        content: `train_sha256`, `validation_sha256` and `tokenizer_sha256`, and how many `validation_windows` are used.
        changes: fields and versions that were others when the run was resumed: `step`, `name`, `was`, `is`.
    """

    file: ClassVar[str] = "run.json"

    settings: dict[str, dict[str, Any]]
    environment: dict[str, Any]
    content: dict[str, Any] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def planned(
        cls,
        model_args: ModelArguments,
        data_args: DataArguments,
        args: LNFreeTrainingArguments,
        procedure: dict[str, Any] | None = None,
    ) -> Self:
        """That of a run that would begin now, before its data are read."""
        settings = arguments_of(model_args, data_args, args) | ({"procedure": procedure} if procedure else {})
        return cls(settings=strict(settings), environment=strict(environment(args.device)))

    @classmethod
    def known(cls, folder: Path) -> Self | None:
        """That of the run in a folder; of an earlier version what its results say, or None."""
        if (folder / cls.file).is_file():
            return cls.load(folder)
        if not (folder / RESULTS).is_file():
            return None
        results = RunResults.load(folder)
        return cls(settings=results.arguments, environment=results.environment, content=content_of_meta(**results.data))

    @property
    def windows_a_step(self) -> int:
        """Of all processes; the devices of one process are not told apart."""
        training = self.settings.get("training", {})
        return math.prod({**training, **self.environment}.get(name, 1) for name in BATCH)

    def changes_to(self, now: "Beginning", finished: bool = False) -> Iterator[Change]:
        """What is another in a run that would begin now; what only one of the two knows does not count."""
        free = free_fields(self.settings.get("training", {}), finished)
        if not finished and self.windows_a_step == now.windows_a_step:
            free += BATCH  # checkpoints move between one and several processes
        sections = [(self.settings[key], now.settings[key]) for key in self.settings if key in now.settings]
        for then, today in (*sections, (self.content, now.content)):
            for name in then:
                if name in today and then[name] != today[name]:
                    allowed = any(fnmatchcase(name, pattern) for pattern in free)
                    yield Change(name, then[name], today[name], allowed)
        for name, was in self.environment.items():
            if name in now.environment and was != now.environment[name]:
                yield Change(name, was, now.environment[name], finished or name != PROCESSES or name in free)

    def refuse_changes(self, now: "Beginning", folder: Path, finished: bool = False) -> None:
        """Raise RunError when a run that would begin now is another one than this, which is `finished` or goes on."""
        if refused := [str(change) for change in self.changes_to(now, finished) if not change.allowed]:
            raise RunError(
                f"{folder} holds a run that was begun with other settings ({'; '.join(refused)}). Undo the change, or "
                "give another --out. To continue with other settings, begin a new run from its model, or from a "
                "checkpoint in that folder."
            )

    def resumed(self, now: "Beginning", step: int) -> "Beginning":
        """What is kept of both when a run goes on at a step: the values of now, and which of them are others."""
        found = list(self.changes_to(now))
        if others := [str(change) for change in found if change.name in self.environment]:
            logger.warning("The run goes on with other versions or on another machine: %s.", "; ".join(others))
        changes = [{"step": step, "name": change.name, "was": change.was, "is": change.now} for change in found]
        return Beginning(
            settings=now.settings,
            environment=now.environment,
            content=now.content,
            changes=[*self.changes, *changes],
        )


def free_fields(training: dict[str, Any], finished: bool) -> tuple[str, ...]:
    """Patterns of fields that may be others when a run that was trained so goes on."""
    free: tuple[str, ...] = FREE
    if training.get("on_nonfinite") != "rollback":  # which goes back to the last sample
        free += ("probe_*",)
    whole_warmup = not 0 < float(training.get("warmup_steps") or 0) < 1
    if not finished and str(training.get("lr_scheduler_type")).startswith("constant") and whole_warmup:
        free += ("max_steps", "num_train_epochs")  # it may train on: no step was another for the old end
    return free


def arguments_of(
    model_args: ModelArguments, data_args: DataArguments, args: LNFreeTrainingArguments
) -> dict[str, dict[str, Any]]:
    """All fields, as JSON has them."""
    return {"model": vars(model_args), "data": vars(data_args), "training": json.loads(args.to_json_string())}


def content_of(data: RunData) -> dict[str, Any]:
    """Hashes of what a run reads."""
    return content_of_meta(data.train.meta, data.validation.meta | {"used": len(data.validation)}) | {
        "tokenizer_sha256": tokenizer_hash(data.tokenizer)
    }


def content_of_meta(train: dict[str, Any], validation: dict[str, Any]) -> dict[str, Any]:
    """The same, as far as results.json knows."""
    return {
        "train_sha256": train["sha256"],
        "validation_sha256": validation["sha256"],
        "validation_windows": validation["used"],
    }


def finished_run(folder: Path, begun: Beginning, wanted: str | None) -> RunResults | None:
    """
    What a finished run in the folder came to, when it is asked to go on.

    Raises:
        RunError: it was begun with other settings.
    """
    if not goes_on(wanted) or not (folder / RESULTS).is_file():
        return None
    known = Beginning.known(folder)
    assert known is not None
    known.refuse_changes(begun, folder, finished=True)
    logger.info("%s is finished.", folder)
    return RunResults.load(folder)


def checkpoint_of(folder: Path, begun: Beginning, wanted: str | None) -> tuple[str | None, Beginning | None]:
    """
    The checkpoint to resume from, and what its run was begun with, as far as both are there.

    Raises:
        RunError: as `find_checkpoint`, or its run was begun with other settings.
    """
    checkpoint = find_checkpoint(folder, wanted)
    if checkpoint is None:
        return None, None
    origin = Path(checkpoint).absolute().parent
    known = Beginning.known(origin)
    if known is None:
        logger.warning("%s has no %s, so its settings cannot be compared with those of now.", origin, Beginning.file)
    else:
        known.refuse_changes(begun, origin)
    return checkpoint, known


def refuse_other_data(begun: Beginning, beside: Sequence[Path]) -> None:
    """Raise RunError where a run beside this one named the same data and found other text."""
    for folder in beside:
        known = Beginning.known(folder)
        if known is not None and known.settings["data"] == begun.settings["data"]:
            known_data = Beginning(settings={}, environment={}, content=known.content)
            if changed := [str(change) for change in known_data.changes_to(begun)]:
                raise RunError(
                    f"The data of {folder} has changed since ({'; '.join(changed)}), and runs on two corpora do not "
                    "compare. Bring it back, or give another --out."
                )
