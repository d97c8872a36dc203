"""Lists a local folder as a bucket. An invalid name, or a circular link, does not hide other files.

In: a folder, and a prefix. Out: names of files, or of folders. It follows links, as reading does. Opens no file.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

ODD_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, and bytes that are not UTF-8. Names with these are skipped: no object has them."""

Place = tuple[int, int]
"""A folder's device and inode number."""


def files_below(folder: Path, prefix: str) -> Iterator[str]:
    """The names of all files below `prefix`, relative to the folder. Raises OSError if a folder cannot be read."""
    yield from _below(folder, prefix, frozenset())


def folders_in(folder: Path, prefix: str) -> list[str]:
    """The names of the folders directly in `prefix`. Raises OSError if it cannot be read."""
    return [name for name, found in entries_of(folder / prefix) if stat.S_ISDIR(found.st_mode)]


def _below(folder: Path, prefix: str, above: frozenset[Place]) -> Iterator[str]:
    for name, found in entries_of(folder / prefix):
        path, place = f"{prefix}/{name}" if prefix else name, (found.st_dev, found.st_ino)
        if stat.S_ISREG(found.st_mode):
            yield path
        elif stat.S_ISDIR(found.st_mode) and place not in above:
            yield from _below(folder, path, above | {place})


def entries_of(folder: Path) -> list[tuple[str, os.stat_result]]:
    """The names and stats of a folder's entries; empty if the folder does not exist."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if not ODD_NAME.search(entry.name):
                with contextlib.suppress(OSError):  # a circular or dangling link
                    found.append((entry.name, entry.stat()))
    return found
