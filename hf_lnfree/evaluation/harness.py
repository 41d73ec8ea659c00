"""lm-evaluation-harness (the extra `eval`) on models of any kind, with this package's own tasks over code."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..errors import SettingsError
from ..files import require_own_file, write_json
from ..loading import find, find_device, load_config, load_model, load_tokenizer, reading
from ..provenance import command, environment

TASKS = ("code_next_line", "code_identifiers", "code_brackets")
BOOTSTRAP = 1000  # of metrics that are no means; without any the harness gives no standard error at all


def tasks_path() -> str:
    """The folder with the tasks: what `lm_eval --include_path` takes."""
    return str(files("hf_lnfree") / "evaluation" / "tasks")


def run_harness(
    models: Sequence[str],
    tasks: Sequence[str] = TASKS,
    limit: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    out: Path | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """
    Scores by model, task and metric, each beside its standard error, as the harness gives them.

    Args:
        models: folders or Hub names.
        tasks: those of this package, or any that the harness has.
        limit: documents a task; all by default.
        device: where the models run, like "cpu"; the accelerator by default, where there is one.
        trust_remote_code: run code that comes with a model.
        revision: of their repositories.
        out: a JSON file for the scores.

    Raises:
        SettingsError: the harness is not installed, or a task is not known.
        ModelError: a model that cannot be loaded.
        RunError: `out` cannot be written, or holds something else.
    """
    if out is not None:
        require_own_file(out, "scores of lm-eval", ("scores", "limit"))
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SettingsError(f"This needs lm-evaluation-harness: pip install 'hf_lnfree[eval]' ({error}).") from error
    manager = TaskManager(include_path=tasks_path())
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise SettingsError(f"The harness has no task {', '.join(unknown)}; those over code are {', '.join(TASKS)}.")
    wanted = find_device(device)
    state = PartialState(cpu=wanted.type == "cpu")
    access: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}

    class CheckedModel(HFLM):
        """The harness's own, but for a checkpoint that is damaged: that is an error here and no warning."""

        def _create_model(self, pretrained: str, **options: Any) -> None:
            self._model = load_model(pretrained, self.AUTO_MODEL_CLASS, device=self._device, **access)

    def score(name: str) -> dict[str, dict[str, float]]:
        """Of one model, which is gone from memory after this."""
        load_config(name, **access)
        tokenizer = load_tokenizer(name, **access)
        with reading(name):
            model = CheckedModel(
                pretrained=find(name),
                tokenizer=tokenizer,
                revision=revision or "main",
                trust_remote_code=trust_remote_code,
                batch_size=batch_size,
                device=str(state.device if wanted.index is None else wanted),
            )
        found: Any = simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=BOOTSTRAP
        )
        return {task: plain(metrics) for task, metrics in found["results"].items()}

    scores = {name: score(name) for name in dict.fromkeys(models)}
    if out is not None:
        record = {"scores": scores, "limit": limit, "environment": environment(wanted), "command": command()}
        write_json(out, record)
    return scores


def plain(metrics: dict[str, Any]) -> dict[str, float]:
    """{"acc,none": x} as {"acc": x}, numbers only; "none" is no filter, and other filters keep their names."""
    return {
        name.removesuffix(",none"): value
        for name, value in metrics.items()
        if "," in name and isinstance(value, (int, float))
    }
