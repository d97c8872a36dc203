"""A lock on a local file, which is released when its process ends."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import BinaryIO


def lock(file: Path) -> BinaryIO | None:
    """Open the file, or create it, and lock it until it is closed; None if another process has locked it.

    On a file system without locks the file is opened without one. Raises OSError if it cannot be written.
    """
    file.touch()
    stream = file.open("r+b")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    except OSError:
        pass  # the file system has no locks
    return stream
