"""Files that are either whole or not there."""

import hashlib
import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file or folder its name, durably. Both must be on one file system."""
    fsync(temporary)
    os.rename(temporary, final)
    fsync(final.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `path` so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    publish(temporary, path)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
