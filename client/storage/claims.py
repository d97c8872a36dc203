"""Exclusive create, where a store needs help with it: a probe of remote stores, a way for folders without hard links.

In: an open store, or a folder. Out: nothing, or an error that names what the store lacks. Every claim (of a RUN, of a
job) rests on it: with a store that ignores If-None-Match, two clients would mix in one RUN without a word.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import time
from pathlib import Path, PurePosixPath

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import ObjectStore

NO_HARD_LINKS = re.compile(r"os error (1|38|95|524)\b")
"""EPERM, ENOSYS, EOPNOTSUPP, ENOTSUPP: how file systems say that they have no hard links."""
CLAIM_SECONDS = 30.0
"""A claim whose object has not appeared for this long is of a process that died."""
CLAIM_LOOK_SECONDS = 0.05


class NotExclusive(Exception):
    """A store that writes an object again though it was asked not to."""


def check_exclusive(store: ObjectStore) -> None:
    """Raises NotExclusive unless a second conditional put of one object is refused. Leaves nothing behind."""
    name = f"probe-{secrets.token_hex(16)}"
    obstore.put(store, name, b"", mode="create")
    try:
        obstore.put(store, name, b"", mode="create")
    except AlreadyExistsError:
        return
    finally:
        with contextlib.suppress(Exception):  # some may write and not delete
            obstore.delete(store, name)
    raise NotExclusive


def rename_without_links(folder: Path, hidden: str, name: str) -> None:
    """Give a written object its name, unless it is taken. Raises AlreadyExistsError.

    Whoever makes the claim, a file that one alone can make, renames. What a dead process claimed goes to whoever makes
    the next claim. Claims have names that readers pass over (`client.storage.bucket.HIDDEN`). They may be deleted: the
    object itself is looked for first.
    """
    target, earlier = folder / name, 0
    while not target.exists():
        claim = target.with_name(claim_name(name, earlier))
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - claim.stat().st_mtime > CLAIM_SECONDS:
                    earlier += 1
                    continue
            time.sleep(CLAIM_LOOK_SECONDS)
            continue
        if not target.exists():
            (folder / hidden).replace(target)
            return
    raise AlreadyExistsError(f"{name} exists")


def claim_name(name: str, earlier: int = 0) -> str:
    """The file name of an object's claim; `earlier`: how many were made before it, by processes that died."""
    last = PurePosixPath(name).name
    text = f"{last}/{earlier}" if earlier else last
    return f".{hashlib.sha256(text.encode()).hexdigest()[:32]}.tmp"
