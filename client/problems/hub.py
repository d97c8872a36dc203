"""Reads the Hugging Face Hub: whole data sets with `datasets`, single files and folders like any others.

In: an hf:// URL. Out: a stream of rows, or `SetFile` values. URLs are hf://NAME?config=…&split=…, where NAME may also
be a local folder's path, and the Hub's own: hf://datasets/OWNER/NAME[@REVISION][/PATH], hf://buckets/OWNER/NAME/PATH.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from client.errors import LightReasonerError, ProblemSetError, how_to_install, reason_of, shorten
from client.problems.files import GLOB, SetFile, chosen
from client.storage.bucket import MOST_SAID_CHARACTERS, local_folder
from client.storage.data_sets import reach_hub

if TYPE_CHECKING:
    from datasets import IterableDataset
    from huggingface_hub import HfFileSystem

HUB = "hf"
"""The URL scheme of the Hub."""
HUB_OPTIONS = ("config", "split", "revision")
HUB_FOLDERS = ("datasets/", "buckets/")
"""Beginnings of the Hub's own paths."""
EXPECTED_HUB = "expected hf://NAME?config=…&split=…, both optional, or hf://datasets/OWNER/NAME[@REVISION][/PATH]"
ELSEWHERE = ("models/", "spaces/", "kernels/")


def data_set_or_files(path: str) -> IterableDataset | list[SetFile]:
    """The data set that an hf:// URL names, as a stream of rows, or its files. Raises ProblemSetError."""
    address, _, query = path.removeprefix(f"{HUB}://").partition("?")
    options = dict(parse_qsl(query))
    if unknown := options.keys() - set(HUB_OPTIONS):
        raise ProblemSetError(f"{path}: {EXPECTED_HUB}; it has {', '.join(sorted(unknown))}")
    if not address or address.startswith(ELSEWHERE):
        raise ProblemSetError(f"{path}: {EXPECTED_HUB}; it lacks a data set's name")
    if not address.startswith(HUB_FOLDERS):
        name, _, revision = address.partition("@") if not address.startswith("/") else (address, "", "")
        return _data_set(path, name, {"revision": revision or None} | options)
    from huggingface_hub import HfFileSystem
    from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath

    files = HfFileSystem()
    with naming_hub(path):
        reach_hub()
        place = files.resolve_path(address.rstrip("/"))
        if isinstance(place, HfFileSystemResolvedRepositoryPath) and not place.path_in_repo:
            return _data_set(path, place.repo_id, {"revision": place.revision} | options)
        return _files(path, files, address.rstrip("/"))


def _files(path: str, files: HfFileSystem, address: str) -> list[SetFile]:
    if GLOB.search(address):
        names = sorted(name for name in map(str, files.glob(address)) if files.isfile(name))
    elif files.isdir(address):
        entries: list[Any] = files.ls(address, detail=True)
        folder = {entry["name"].rpartition("/")[2]: entry["name"] for entry in entries if entry["type"] == "file"}
        names = [folder[name] for name in chosen(path, folder)]
    else:
        names = [address] if files.isfile(address) else []
    if not names:
        raise ProblemSetError(f"{path}: the Hugging Face Hub has no such file; give hf://datasets/OWNER/NAME/PATH")
    return [_hub_file(files, name) for name in names]


def _hub_file(files: HfFileSystem, name: str) -> SetFile:
    return SetFile(f"{HUB}://{name}", lambda: files.open(name, "rb"))


def _data_set(path: str, name: str, options: dict[str, Any]) -> IterableDataset:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ProblemSetError(f"{path} needs {error.name}: {how_to_install('hub')}") from None
    with naming_hub(path):
        if not (name.startswith(("/", ".")) or local_folder(name).is_dir()):
            reach_hub()
        return load_dataset(
            name,
            options.get("config"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
            streaming=True,
        )


@contextmanager
def naming_hub(path: str) -> Iterator[None]:
    """Turn every error of `datasets` and huggingface_hub into a ProblemSetError that names the data set."""
    try:
        yield
    except LightReasonerError:
        raise
    except Exception as error:
        reason = shorten(reason_of(error), MOST_SAID_CHARACTERS)
        raise ProblemSetError(f"{path} cannot be read through datasets: {reason}") from error
