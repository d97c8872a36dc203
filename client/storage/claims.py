"""Exclusive create for stores that need help: a test of remote stores, and a way for folders without hard links.

In: an open store, or a folder. Out: nothing, or an error that names what the store lacks. Every claim on a RUN or a job
depends on exclusive create: if a store ignores If-None-Match, two clients silently write to one RUN.
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
"""EPERM, ENOSYS, EOPNOTSUPP, ENOTSUPP: the errors of file systems without hard links."""
CLAIM_SECONDS = 30.0
"""If a claim's object has not appeared for this long, the process that made the claim has died."""
CLAIM_LOOK_SECONDS = 0.05


class NotExclusive(Exception):
    """A store overwrites an object although the put must only create it."""


def check_exclusive(store: ObjectStore) -> None:
    """Raises NotExclusive unless a second conditional put of one object is refused. Leaves nothing behind."""
    name = f"probe-{secrets.token_hex(16)}"
    obstore.put(store, name, b"", mode="create")
    try:
        obstore.put(store, name, b"", mode="create")
    except AlreadyExistsError:
        return
    finally:
        with contextlib.suppress(Exception):  # some users may write but not delete
            obstore.delete(store, name)
    raise NotExclusive


def rename_without_links(folder: Path, hidden: str, name: str) -> None:
    """Rename a written object to its name. Raises AlreadyExistsError if the name is taken.

    A claim is a file that only one process can create; that process renames the object. If it died, the next claim
    decides. Readers skip the names of claims (`client.storage.bucket.HIDDEN`). Claims may be deleted, because the
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
    """The file name of an object's claim. `earlier`: the number of earlier claims, by processes that died."""
    last = PurePosixPath(name).name
    text = f"{last}/{earlier}" if earlier else last
    return f".{hashlib.sha256(text.encode()).hexdigest()[:32]}.tmp"
