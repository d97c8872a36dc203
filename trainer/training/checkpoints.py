"""OUT: the folder of the final adapter, with its checkpoints, on this machine or in a bucket.

    OUT/…                              the final adapter
    OUT/checkpoints/checkpoint-N/…     what is needed to resume after optimizer step N
    OUT/checkpoints/checkpoint-N/whole.json   its files with their digests, written last
    OUT/.lock                          on this machine: locked by the training that writes here
    OUT/owners/N                       in a bucket: the Nth training that writes here

A checkpoint is torn if it has no whole.json, or if its files differ from that list: the checkpoint before it is used.
For a bucket, files are written to a local folder first, and then uploaded, whole.json last. Each machine of a training
has such a folder. On a machine other than the first process's, it holds the checkpoint to resume from, and the random
number states of that machine's processes, which they upload themselves.

One training writes to an OUT at a time. On this machine a second training is refused, and a dead process holds no
lock. A bucket has no locks: the latest training owns OUT, and earlier ones end at their next checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client.errors import ModelError
from client.storage.bucket import Bucket, local_folder
from client.storage.locks import lock
from trainer.adapters.adapter import PROVENANCE, WHOLE_FILE, check_writable, is_local, make_folder, what_lies

CHECKPOINTS = "checkpoints"
LOCK, OWNERS = ".lock", "owners"


class Output:
    """OUT by its URL. Files are written to `folder`; `publish` uploads them if OUT is in a bucket.

    `staging`: for a bucket, the local folder to write to; None: a new one. `apart`: whether this process runs on
    another machine than the first process.
    """

    apart = False

    def __init__(self, url: str, staging: Path | None = None) -> None:
        remote = not is_local(url)
        self.url = url
        self.bucket = Bucket(url) if remote else None
        if remote:
            self.folder = staging or Path(tempfile.mkdtemp(prefix="lightreasoner-"))
        else:
            self.folder = local_folder(url)
        self._held = contextlib.ExitStack()  # the lock of a local folder
        self._owner = 0  # this training's number in a bucket

    def __str__(self) -> str:
        return self.url

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    def claim(self) -> None:
        """Create and own the folder. Raises ModelError if OUT is not empty, cannot be created, or is in use."""
        self.check_free()
        self.own()

    def check_free(self) -> None:
        """Raises ModelError if OUT is not empty, cannot be created, or is in use."""
        if self.bucket is not None:
            taken = any(not name.startswith(f"{OWNERS}/") for name in self.bucket.names(""))
        else:
            check_writable(self.folder)
            taken = any(file.is_file() and file != self.folder / LOCK for file in self.folder.rglob("*"))
        if taken:
            self._refuse_another()
            what = what_lies(self.bucket or self.folder)
            if self._numbers() and what != "a RUN":
                what = "a training"
            remedy = "continue with --resume, or give another" if what == "a training" else "give another"
            raise ModelError(f"{self} is not empty: it holds {what}; {remedy} --output")

    def check_resumable(self) -> None:
        """Raises ModelError if OUT holds a RUN, or an adapter or a model that no training of ours left there."""
        what = what_lies(self.bucket or self.folder)
        if what == "a RUN" or (what in ("an adapter", "a model") and not self._numbers() and self.finished() is None):
            raise ModelError(f"{self} holds {what}, not a training to resume; give another --output")

    def own(self) -> None:
        """Make this training the owner of OUT. Raises ModelError if another one writes there, or begins right now."""
        if self.bucket is None:
            make_folder(self.folder)
            self._held.enter_context(_in_use(self.folder / LOCK, str(self)))
            return
        self._owner = max(self._owners(), default=0) + 1
        if not self.bucket.create(f"{OWNERS}/{self._owner}", b""):
            raise ModelError(f"another training began to write to {self} at the same time; name a new folder")

    def check_owned(self) -> None:
        """Raise ModelError if a later training writes to the same bucket prefix."""
        if self.bucket is not None and max(self._owners(), default=0) > self._owner:
            raise ModelError(
                f"another training began to write to {self}, and this one ends; what it has written there stays"
            )

    def newest(self) -> Path | None:
        """The newest complete checkpoint, downloaded if needed; None if there is none. Removes torn ones."""
        if self.bucket is None:
            make_folder(self.folder)
        for number in sorted(self._numbers(), reverse=True):
            if _is_whole(folder := self.fetched(number)):
                return folder
            self._remove(number)
        return None

    def fetched(self, number: int) -> Path:
        """The folder of a checkpoint, downloaded if OUT is in a bucket."""
        folder = self.checkpoints / f"checkpoint-{number}"
        if self.bucket is not None:
            self._fetch(number, folder)
        return folder

    def check_seen(self, checkpoint: Path) -> None:
        """Raises ModelError if this machine does not see a checkpoint that the first process sees."""
        if not _is_whole(checkpoint):
            self.close()
            raise ModelError(
                f"{socket.gethostname()} has no {checkpoint}: for a training on several machines, --output must be in "
                "a bucket, or in a folder that all of them see"
            )

    def finished(self) -> dict[str, Any] | None:
        """lightreasoner.json of a complete training; None if OUT has none."""
        try:
            data = (self.folder / PROVENANCE).read_bytes() if self.bucket is None else self.bucket.get(PROVENANCE)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ModelError(f"{self}/{PROVENANCE} cannot be read: {error.strerror}; name another --output") from None
        try:
            return json.loads(data) if data is not None else None
        except ValueError as error:
            raise ModelError(
                f"{self}/{PROVENANCE} is damaged ({error}); move it away, and continue with --resume"
            ) from error

    def withdraw(self) -> None:
        """Remove lightreasoner.json: the adapter is no longer complete, because its training goes on."""
        (self.folder / PROVENANCE).unlink(missing_ok=True)
        if self.bucket is not None and self.bucket.get(PROVENANCE) is not None:
            self.bucket.remove(PROVENANCE)

    def share(self, number: int, rank: int) -> None:
        """Upload this rank's random number state to a checkpoint, if it is on another machine than the first rank."""
        file = self.checkpoints / f"checkpoint-{number}" / f"rng_state_{rank}.pth"
        if self.bucket is not None and self.apart and file.is_file():
            self.bucket.put(f"{CHECKPOINTS}/{file.parent.name}/{file.name}", file.read_bytes())

    def seal(self, number: int, state: dict[str, Any], keep: int) -> None:
        """Complete a checkpoint: write `state` and the list of its files. Then remove all but the newest `keep`."""
        folder = self.checkpoints / f"checkpoint-{number}"
        (folder / PROVENANCE).write_text(json.dumps(state, indent=2) + "\n")
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template
        for file in folder.glob("*.safetensors"):
            shutil.copymode(folder / PROVENANCE, file)  # safetensors makes it readable by its owner only
        digests = {file.name: _file_digest(file) for file in sorted(folder.iterdir()) if file.is_file()}
        whole = json.dumps(digests, indent=2) + "\n"
        self.check_owned()
        if self.bucket is not None:
            for name in digests:
                self.bucket.put(f"{CHECKPOINTS}/{folder.name}/{name}", (folder / name).read_bytes())
            self.bucket.put(f"{CHECKPOINTS}/{folder.name}/{WHOLE_FILE}", whole.encode())
        write_whole(folder / WHOLE_FILE, whole)
        for old in sorted(self._numbers())[:-keep]:
            self._remove(old)

    def publish(self) -> None:
        """Upload the final files if OUT is in a bucket; lightreasoner.json last."""
        if self.bucket is None:
            return
        self.check_owned()
        files = [file for file in self.folder.iterdir() if file.is_file()]
        for file in sorted(files, key=lambda file: (file.name == PROVENANCE, file.name)):
            self.bucket.put(file.name, file.read_bytes())

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder; remove the local folder if OUT is in a bucket."""
        self._held.close()
        if self.bucket is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _refuse_another(self) -> None:
        """Raise ModelError if a training is writing to this local folder."""
        if self.bucket is None and (self.folder / LOCK).is_file():
            with _in_use(self.folder / LOCK, str(self)):
                pass

    def _owners(self) -> list[int]:
        assert self.bucket is not None
        names = (name.rpartition("/")[2] for name in self.bucket.names(OWNERS))
        return [int(name) for name in names if name.isdecimal()]

    def _numbers(self) -> list[int]:
        if self.bucket is not None:
            names = {name.split("/")[1] for name in self.bucket.names(CHECKPOINTS)}  # a store may list empty folders
        else:
            names = {folder.name for folder in self.checkpoints.glob("checkpoint-*")}
        numbers = (name.removeprefix("checkpoint-") for name in names)
        return [int(number) for number in numbers if number.isdecimal()]

    def _fetch(self, number: int, folder: Path) -> None:
        assert self.bucket is not None
        prefix = f"{CHECKPOINTS}/checkpoint-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.bucket.names(prefix):
            data = self.bucket.get(name)
            if data is not None:
                (folder / Path(name).name).write_bytes(data)

    def _remove(self, number: int) -> None:
        if self.bucket is not None:
            names = list(self.bucket.names(f"{CHECKPOINTS}/checkpoint-{number}"))
            for name in sorted(
                names, key=lambda name: not name.endswith(WHOLE_FILE)
            ):  # whole.json first: without it the rest is torn
                self.bucket.remove(name)
        shutil.rmtree(self.checkpoints / f"checkpoint-{number}", ignore_errors=True)


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(text)
    part.replace(file)


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint that `Output.seal` wrote."""
    return json.loads((checkpoint / PROVENANCE).read_bytes())


def number_of(checkpoint: str) -> int:
    """The optimizer step of a checkpoint, from its folder's name."""
    return int(checkpoint.rpartition("-")[2])


@contextlib.contextmanager
def _in_use(file: Path, out: str) -> Iterator[None]:
    """Hold the lock of OUT. Raises ModelError if another process holds it."""
    while True:
        if (stream := lock(file)) is None:
            who = file.read_text() or "another process"
            raise ModelError(f"a training writes to {out} ({who}): wait for it, or name a new folder")
        if file.exists() and os.path.samestat(file.stat(), os.fstat(stream.fileno())):
            break
        stream.close()  # its holder has removed the file
    with stream:
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        stream.flush()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _is_whole(folder: Path) -> bool:
    try:
        listed = json.loads((folder / WHOLE_FILE).read_bytes())
        return bool(listed) and all(_file_digest(folder / name) == digest for name, digest in listed.items())
    except (OSError, ValueError, AttributeError):
        return False


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
