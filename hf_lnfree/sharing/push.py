"""A finished run to the Hub: weights, code, tokenizer, settings, entropies and card, in one commit."""

import json
import logging
import mmap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from ..errors import RunError
from ..redaction import secrets
from .card import write_card

try:  # the client of huggingface_hub from 2.0 on, and before
    from httpx2 import TransportError
except ImportError:
    from httpx import TransportError  # type: ignore[assignment, no-redef]

SHARED = [
    *("*.safetensors", "*.safetensors.index.json", "*.json", "*.jsonl", "*.py", "*.md", "*.svg", "*.png", "*.html"),
    *("*.jinja", "merges.txt", "LICENSE*"),
]
KEPT_BACK = ["checkpoint-*", "*/checkpoint-*", ".*", "plain/*", "training_args.bin", "flight_recorder.json"]
ATTEMPTS, WAIT = 4, 1.0  # seconds before the second attempt, twice as long before each one after

logger = logging.getLogger(__name__)


def push_run(
    run: Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """
    Write the card and push a finished run; checkpoints, pickled arguments and locks stay here.

    What a lost connection interrupts is tried again, up to four times; the commit appears whole or not at all.

    Returns:
        The address of the commit.

    Raises:
        RunError: no finished run, a repo id that is not allowed, or a file that holds a secret of this process.
        OSError: the Hub refuses, or cannot be reached.
    """
    write_card(run, repo_id)
    names = shared_files(run)
    refuse_secrets([run / name for name in names], [token or get_token()])
    api = HfApi(token=token)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with its namespace
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(path_in_repo=name, path_or_fileobj=run / name) for name in names],
                commit_message=message or f"Upload {run.resolve().name}",
                revision=revision,
            )
            return str(commit.commit_url)
        except (TransportError, HfHubHTTPError, LocalTokenNotFoundError) as error:
            if not may_pass(error) or attempt == ATTEMPTS:
                raise OSError(f"{repo_id} could not be pushed: {advice(error)}") from error
            logger.warning("The Hub did not answer (%s); attempt %d of %d.", error, attempt + 1, ATTEMPTS)
            time.sleep(WAIT * 2 ** (attempt - 1))
    raise AssertionError


def may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed: the connection broke, or the server has trouble of its own."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return isinstance(error, TransportError)


def advice(error: Exception) -> str:
    """What to do about a refusal of the Hub."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "no token, or one that is not valid. Set HF_TOKEN, or run `hf auth login`."
    if status == 403:
        return "the token may not write there. Use one with write access, or another repository."
    return f"{error}"


def shared_files(run: Path) -> list[str]:
    """What is pushed of a run, by its path inside: what is checked for secrets is this list, and so is the commit."""
    inside = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    return list(filter_repo_objects(inside, allow_patterns=SHARED, ignore_patterns=KEPT_BACK))


def refuse_secrets(files: Iterable[Path], tokens: Sequence[str | None] = ()) -> None:
    """Raise RunError for a file of any kind that holds one of these tokens, or a secret of this process."""
    known = {*secrets(), *filter(None, tokens)}
    spellings = {text.encode() for secret in known for text in (secret, json.dumps(secret)[1:-1])}
    for path in files:
        with open(path, "rb") as file:
            if not spellings or not path.stat().st_size:  # what is empty cannot be mapped
                continue
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if any(content.find(spelling) >= 0 for spelling in spellings):
                    raise RunError(f"{path} holds a secret of yours (a token, key or password): take it out.")
