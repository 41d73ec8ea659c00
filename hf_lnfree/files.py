"""Files and folders that appear whole or not at all, the folders named by the hash of what went into them."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def content_key(*parts: Any) -> str:
    """sha256 over the parts."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `target` at the end, and vanishes after an error or an interruption."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    try:
        yield partial
        partial.chmod(target.parent.stat().st_mode & 0o777)
        try:
            os.rename(partial, target)
        except OSError:
            if not target.exists():  # else another process was first, and its folder is as good
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_at_once(path: Path, text: str) -> None:
    """A file that holds all of it or is not there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
