"""Finds the files of a problem set: one file, a folder's files, those that match a glob, or standard input.

In: PROBLEMS as a user names it: a path, a URL of a bucket, or `-`. Out: `SetFile` values, in the order of their names.
Never reads a file's content.
"""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import urlsplit

from client.errors import ProblemSetError, one_line, shorten
from client.storage.bucket import Bucket, local_folder

STANDARD_INPUT = "-"
PIPES = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""Paths through which a shell passes another program's output, as for <(zcat FILE)."""
SET_ENDINGS = re.compile(r"[^._].*\.(jsonl|ndjson|json|csv|tsv|parquet)(\.(gz|bz2|xz|zst|lz4))?", re.IGNORECASE)
"""Names of the files in a folder that hold problems."""
PARQUET_RANGE_BYTES = 2**20
GLOB = re.compile(r"[*?[]")
EXPECTED = (
    "give a .jsonl, .json, .csv or .parquet file, compressed or not; a folder of such files, a quoted glob, - for "
    "standard input, or hf://NAME"
)


@dataclass(frozen=True)
class SetFile:
    """A file of a problem set. `name`: its name in messages. It can be opened once only."""

    name: str
    open: Callable[[], BinaryIO]


def files_of(path: str) -> list[SetFile]:
    """The files that PROBLEMS names, at least one. Raises ProblemSetError if there is none; BucketError."""
    if path == STANDARD_INPUT:
        return [SetFile("standard input", lambda: sys.stdin.buffer)]
    scheme = urlsplit(path).scheme
    found = _local(path) if scheme in ("", "file") else _in_bucket(path, is_glob=not scheme.startswith("http"))
    if not found:
        raise ProblemSetError(f"no problem set at {path}: {EXPECTED}")
    return found


def chosen(folder: str, names: Iterable[str]) -> list[str]:
    """The names in a folder that hold problems, sorted. Raises ProblemSetError if there are only others."""
    names = sorted(names)
    found = [name for name in names if SET_ENDINGS.fullmatch(name)]
    if names and not found:
        arrow = any(name.endswith(".arrow") for name in names)
        remedy = "datasets.load_from_disk(FOLDER).to_parquet(FILE) makes a file of it" if arrow else EXPECTED
        raise ProblemSetError(f"{folder} holds no file of problems, but {shorten(', '.join(names))}; {remedy}")
    return found


def _local(path: str) -> list[SetFile]:
    place = local_folder(path)
    if place.is_dir():
        names = chosen(path, (entry.name for entry in place.iterdir() if entry.is_file()))
        return [_local_file(f"{path.rstrip('/')}/{name}", place / name) for name in names]
    if place.is_file() or str(place).startswith(PIPES):
        return [_local_file(path, place)]
    meant = sorted(glob.glob(str(place), recursive=True)) if GLOB.search(path) else []  # noqa: PTH207 - Path has no **/*.x
    return [_local_file(name, Path(name)) for name in meant if Path(name).is_file()]


def _local_file(name: str, place: Path) -> SetFile:
    return SetFile(one_line(name), lambda: place.open("rb"))


def _in_bucket(path: str, is_glob: bool) -> list[SetFile]:
    if is_glob and (special := GLOB.search(path)):
        root = path[: special.start()].rpartition("/")[0]
        meant = re.compile(_regex_of(path.removeprefix(f"{root}/")))
        names = [name for name in Bucket(root).names("") if meant.fullmatch(name)]
    else:
        root, _, name = path.rstrip("/").rpartition("/")
        if name and (file := _object(root, name)) is not None:
            return [SetFile(path, lambda: file)]
        root = path.rstrip("/")
        below = (PurePosixPath(name) for name in Bucket(root).names("")) if is_glob else ()
        names = chosen(path, (name.name for name in below if len(name.parts) == 1))
    return [_bucket_file(root, name) for name in names]


def _bucket_file(root: str, name: str) -> SetFile:
    def opened() -> BinaryIO:
        if (file := _object(root, name)) is None:
            raise ProblemSetError(f"{root}/{name} is gone; somebody removed it")
        return file

    return SetFile(one_line(f"{root}/{name}"), opened)


def _object(root: str, name: str) -> BinaryIO | None:
    if name.endswith(".parquet"):  # Parquet is read in ranges
        return Bucket(root).open(name, PARQUET_RANGE_BYTES)
    return Bucket(root).open(name)


def _regex_of(pattern: str) -> str:
    """A glob as a regular expression; ** stands for any folders. (From Python 3.13 on: glob.translate.)"""
    pieces = re.split(r"(\*\*/|\*+|\?|\[[^]]+\])", pattern)
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        special.get(piece) or ("[^" + piece[2:] if piece.startswith("[!") else piece if odd else re.escape(piece))
        for odd, piece in ((index % 2, piece) for index, piece in enumerate(pieces))
    )
