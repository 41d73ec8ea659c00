"""Files and folders that appear whole or not at all; JSON that any reader takes; nothing here says a secret.

A folder of a cache is named by the hash of what went into it.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from .errors import DataError, RunError, listed
from .redaction import redactor, shareable

PARTIAL = ".partial-"
FOLDER = f"{PARTIAL}folder-"
YOUNG = 60.0  # seconds: between its making and its lock a folder is nobody's
MONTH = 30 * 24 * 3600.0  # seconds
POLL = 0.5  # seconds


def content_key(*parts: Any) -> str:
    """sha256 over the parts."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of the content of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_state(path: Path) -> tuple[int, ...]:
    """Which file it is, its size, and when it was changed: what tells that it is another one, without reading it."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def atomic_folder(target: Path, or_theirs: bool = True) -> Iterator[Path]:
    """
    A folder to write into; it becomes `target` at the end, and vanishes after an error or an interruption.
    What a process that was killed left beside it vanishes too.

    Args:
        or_theirs: whether that of another process, which was first, is as good.

    Raises:
        RunError: another process was first, and its folder is not.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent, FOLDER)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=FOLDER))
    held = hold(partial)
    try:
        yield partial
        partial.chmod(target.parent.stat().st_mode & 0o777)
        try:
            os.rename(partial, target)
        except OSError:
            if not target.exists():
                raise
            if not or_theirs:
                raise RunError(f"{target} was written by another process meanwhile, and is left as it is.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if held is not None:
            os.close(held)


@contextmanager
def resumable_folder(target: Path, work: Path) -> Iterator[Path | None]:
    """
    A folder to go on writing into, which becomes `target` at the end. After an interruption it stays, for the next
    process with the same work; after a DataError it vanishes. None when another process, which is waited for, has made
    `target`. What nobody went on with for a month vanishes too.

    Args:
        work: the folder, beside others of its kind; on the disk of `target`.
    """
    if fcntl is None:  # without locks every process makes its own
        with atomic_folder(target) as partial:
            yield partial
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    work.parent.mkdir(parents=True, exist_ok=True)
    sweep(work.parent, "", MONTH)
    held = None
    while not target.exists():
        work.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # it may just have become the target, or vanished
            held = hold(work)
            if held is not None and os.path.samestat(os.fstat(held), work.stat()):
                break
        if held is not None:
            os.close(held)
            held = None
        time.sleep(POLL)
    if held is None:
        yield None
        return
    try:
        yield work
        os.rename(work, target)
    except DataError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(held)


def hold(folder: Path) -> int | None:
    """A lock on a folder that dies with its process; None while another has it, or where there are no such locks."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def sweep(folder: Path, prefix: str = PARTIAL, young: float = YOUNG) -> None:
    """Remove what was half-written when its process died: nobody holds it, and it is older than `young` seconds."""
    for path in folder.glob(f"{prefix}*"):
        with suppress(OSError):  # another process sweeps too
            if time.time() - path.stat().st_mtime < young:
                continue
            if path.is_dir():
                held = hold(path)
                if held is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(held)
            else:
                path.unlink()


def require_own(folder: Path, kind: str, marks: Sequence[str], before: Sequence[str] = ()) -> None:
    """
    Raise RunError unless a folder can be written, and is empty, not there yet, or of the kind that is to be written.

    Args:
        kind: like "run" or "study", for the message.
        marks: patterns, of which one that matches tells the kind.
        before: patterns of what may stand there before any of these does.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file: give another --out.")
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    allowed = (*before, f"{PARTIAL}*")
    foreign = [name for name in found if not any(fnmatchcase(name, pattern) for pattern in allowed)]
    if foreign and not any(True for mark in marks for _ in folder.glob(mark)):
        raise RunError(
            f"{folder} is not empty and holds no {kind}: {listed(foreign)}. Give another --out, or empty the folder."
        )
    require_place(folder)


def require_own_file(path: Path, kind: str, keys: Sequence[str]) -> None:
    """
    Raise RunError unless a JSON file can be written, and is not there yet or holds what is to be written.

    Args:
        kind: for the message.
        keys: of the file, which tell the kind.
    """
    if path.is_dir():
        raise RunError(f"{path} is a folder: --out is the JSON file to write.")
    if not path.parent.is_dir():
        raise RunError(f"There is no folder {path.parent} for --out.")
    if path.exists():
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = None
        if not isinstance(found, dict) or any(key not in found for key in keys):
            raise RunError(f"{path} is there already and holds no {kind}. Give another --out, or remove it.")
    require_place(path.parent)


def require_place(folder: Path) -> None:
    """Raise RunError unless files can be written into a folder, or the folder be made; leaves nothing behind."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there, prefix=PARTIAL):
            pass
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}. Give another --out.") from error


def replace_file(path: Path, text: str) -> None:
    """Make `path` hold this text; a reader finds the old file or the new one, whoever else writes it meanwhile."""
    partial = path.with_name(f"{PARTIAL}{uuid4().hex}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A card, a table or a page, at once, without secrets and the user's home folder (`shareable`)."""
    replace_file(path, shareable(text))


def write_json(path: Path, value: Any) -> None:
    """A JSON file, at once; see `strict` for what becomes of the value."""
    replace_file(path, json_text(value) + "\n")


def json_text(value: Any) -> str:
    """The value as strict JSON, one key a line."""
    return json.dumps(strict(value), indent=1, allow_nan=False)


def json_line(value: Any) -> str:
    """The value as strict JSON in one line."""
    return json.dumps(strict(value), allow_nan=False)


def strict(value: Any) -> Any:
    """
    The value out of what JSON knows.

    NaN and infinities become null, arrays and tensors lists, anything else that JSON lacks its text. Secrets and the
    home folder are taken out of texts (`shareable`), never out of numbers.
    """
    redact = redactor()

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, int):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {redact(key) if isinstance(key, str) else key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if hasattr(value, "tolist"):
            return plain(value.tolist())
        return redact(str(value))

    return plain(value)


def read_json(path: Path) -> Any:
    """
    What a JSON file holds.

    Raises:
        RunError: it is no JSON, for instance cut off.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}.") from error
