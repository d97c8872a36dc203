"""Checks the paths in requests: a path must lie inside the server's bucket.

In: a RUN or a problem set as a request names it, absolute or relative to the bucket. Out: its name in the bucket,
`a/b/c`. A path that is not plainly inside is rejected. It never repairs or decodes a path.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from client.storage.bucket import BucketError, local_folder

JOBS_FOLDER = "jobs"
"""The folder of the bucket in which jobs live; no request may point into it."""
OF_A_RUN = frozenset({"trajectories", "samples", "failures", "training", "evaluation"}) | {
    f"{name}.json" for name in ("run", "tokenizer", "complete")
}
"""Names inside a RUN. A RUN below one of them would look like a part of the outer RUN."""
SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=,+@-]{0,199}")
"""Allowed names: no leading dot or dash, no escapes, no control characters, nothing special to a store or shell."""
MOST_PATH_CHARACTERS = 700  # an S3 key holds 1024, a RUN's own names among them


class OutsideBucket(ValueError):
    """Symbolic links lead a path out of the bucket, or nowhere."""


class BucketPaths:
    """The paths inside one bucket, by its URL."""

    def __init__(self, bucket: str) -> None:
        self._folder = local_folder(bucket) if urlsplit(bucket).scheme in ("", "file") else None
        self._root = str(self._folder) if self._folder else bucket.rstrip("/")

    def name(self, given: str) -> str:
        """The name in the bucket of a requested path. Raises ValueError with the reason if it is rejected."""
        relative = self._relative(given)
        if len(relative) > MOST_PATH_CHARACTERS:
            raise ValueError(
                f"names {len(relative)} characters below the bucket; at most {MOST_PATH_CHARACTERS} are allowed"
            )
        segments = relative.split("/")
        for segment in segments:
            if not SEGMENT.fullmatch(segment):
                raise ValueError(
                    f"{segment!r} is no name inside the bucket: ASCII letters, digits and ._=,+@- are allowed, a"
                    " letter, digit or _ in front"
                )
        if segments[0].lower() == JOBS_FOLDER:
            raise ValueError(f"the folder {JOBS_FOLDER}/ of the bucket is the service's own")
        self._check_links(relative)
        return relative

    def run(self, given: str) -> str:
        """`name` for a RUN to write. It must not contain a name that RUNs use inside."""
        relative = self.name(given)
        for segment in relative.split("/"):
            if segment.lower() in OF_A_RUN:
                raise ValueError(f"{segment!r} is a name that every RUN uses inside; choose another")
        return relative

    def url(self, name: str) -> str:
        """The absolute path of a name in the bucket. Raises OutsideBucket if links lead out of it."""
        self._check_links(name)
        return f"{self._root}/{name}"

    def _relative(self, given: str) -> str:
        """`given` without the bucket's URL in front; a relative name is returned unchanged."""
        path = given.removesuffix("/")
        if self._folder and (given.startswith(("/", "file:"))):
            try:
                path = str(local_folder(path)) if path.startswith("file:") else path
            except BucketError as error:
                raise ValueError(str(error)) from None
        elif ":" not in given and not given.startswith("/"):
            return path
        for root in {self._root, str(self._folder.resolve())} if self._folder else {self._root}:
            if path.startswith(f"{root}/"):
                return path.removeprefix(f"{root}/")
        raise ValueError("points outside the server's bucket; name a place inside it, or one relative to it")

    def _check_links(self, name: str) -> None:
        """Reject symbolic links, on the path or just inside a RUN, that lead out of the bucket."""
        if self._folder is None:
            return
        root, place = self._folder.resolve(), Path(self._folder, name)
        try:
            for path in (place, *(place.iterdir() if place.is_dir() else ())):
                real = path.resolve()
                if root not in real.parents or real.relative_to(root).parts[0].lower() == JOBS_FOLDER:
                    raise OutsideBucket("leads out of the server's bucket by a symbolic link")
        except (OSError, RuntimeError) as error:  # a loop of links, no permission, a name too long for the file system
            raise OutsideBucket(f"cannot be followed: {error}") from None
