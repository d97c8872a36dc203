"""Keeps results that a RUN's store did not accept on this machine, until the same command writes them to the RUN.

In: trajectories and failures that a store refused. Out: the same, in the RUN, at the next attempt. A spool belongs to
one RUN's URL and one set of settings. It has the format of a RUN, so that the same code reads and writes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import orjson

from client.protocol.requests import Failure, Trajectory
from client.runs.manifest import RunManifest
from client.runs.run import Run
from client.storage.bucket import local_folder


def spool_folder() -> Path:
    """The folder of a user's spools, in $XDG_STATE_HOME, else in ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "lightreasoner" / "spool"


class Spool:
    """The spool of one RUN, in a folder that many share. It exists only while it holds something.

    One process at a time writes or empties it; others wait.
    """

    def __init__(self, base: Path, run: Run, manifest: RunManifest) -> None:
        url = str(run)
        place = str(local_folder(url)) if urlsplit(url).scheme in ("", "file") else url.rstrip("/")
        identity = orjson.dumps([place, manifest.identity()], option=orjson.OPT_SORT_KEYS)
        self._run, self._manifest = run, manifest
        self.folder = base / hashlib.sha256(identity).hexdigest()[:32]

    def keep(
        self, parts: Iterable[Sequence[Trajectory]], questions: dict[str, str | None], failures: Sequence[Failure]
    ) -> None:
        """Write results to the spool, part by part. Raises BucketError or OSError if that fails too."""
        with self._held(make=True):
            kept = Run(str(self.folder))
            kept.claim(self._manifest, b"{}")
            for trajectories in parts:
                kept.write(trajectories, questions, self._manifest)
            if failures:
                kept.write_failures(failures)

    def take_up(self) -> int:
        """Move the spool's contents to the RUN; returns the number of trajectories."""
        with self._held() as there:
            if not there:
                return 0
            kept, taken = Run(str(self.folder)), 0
            for part in kept.parts("trajectories"):
                taken += sum(
                    len(group.trajectories) for group in self._run.adopt(part, kept, self._manifest, write=True)
                )
            self._run.copy_failures(kept)
            shutil.rmtree(self.folder)
            return taken

    @contextlib.contextmanager
    def _held(self, make: bool = False) -> Iterator[bool]:
        """Lock the folder, which another process may remove at any time; yields whether it exists."""
        while True:
            if make:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                if make:
                    continue
                yield False
                return
            try:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(folder, fcntl.LOCK_EX)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(folder), self.folder.stat()):
                        yield True
                        return
            finally:
                os.close(folder)
