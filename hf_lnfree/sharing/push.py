"""A finished run to the Hub: weights, code, tokenizer, settings, entropies and card, in one commit."""

import logging
import time
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

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
        RunError: no finished run, a repo id that is not allowed, or a file that holds a secret of the environment.
        OSError: the Hub refuses, or cannot be reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RunError(str(error)) from error
    write_card(run, repo_id)
    refuse_secrets(run)
    api = HfApi(token=token)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with its namespace
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=run,
                revision=revision,
                allow_patterns=SHARED,
                ignore_patterns=KEPT_BACK,
                commit_message=message or f"Upload {run.resolve().name}",
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


def refuse_secrets(run: Path) -> None:
    """Raise RunError for a text file that holds a secret of this process's environment."""
    known = [secret.encode() for secret in secrets()]
    for path in sorted(run.iterdir()):
        if path.suffix in (".json", ".jsonl", ".md", ".py", ".html", ".svg") and known:
            content = path.read_bytes()
            if any(secret in content for secret in known):
                raise RunError(f"{path} holds a secret of the environment (a token, key or password): take it out.")
