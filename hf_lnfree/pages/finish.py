"""What is done with a run that has ended: its picture, its card, and, where it was asked for, its way to the Hub."""

from pathlib import Path

from transformers import TrainingArguments

from ..analysis.entropy_report import EntropyReport
from ..sharing.card import write_card
from ..sharing.push import push_run
from ..training.results import ENTROPY
from .plots import heatmaps, save


def describe_run(run: Path, repo_id: str | None = None) -> None:
    """
    Draw `entropy.svg` from `entropy.json`, if there is one, and write the card.

    Args:
        run: folder of a finished run.
        repo_id: what the example in the card loads; the folder by default.

    Raises:
        RunError: no finished run there, or a damaged one.
    """
    if (run / ENTROPY).is_file():
        save(heatmaps([EntropyReport.load(run / ENTROPY)]), run / "entropy.svg", [".svg"])
    write_card(run, repo_id)


def finish_run(run: Path, args: TrainingArguments) -> None:
    """
    Picture and card of a run that has ended, and with `args.push_to_hub` the whole run to `args.hub_model_id`.

    Of several processes the first one does it, and the others go on.

    Raises:
        RunError: as `describe_run` and `push_run`.
        OSError: the Hub refuses, or cannot be reached.
    """
    if args.process_index != 0:
        return
    describe_run(run, args.hub_model_id)
    if args.push_to_hub:
        private = bool(args.hub_private_repo)
        push_run(run, args.hub_model_id or run.resolve().name, private, args.hub_revision, token=args.hub_token)
