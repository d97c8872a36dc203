"""Where a request may point: inside the configured bucket and nowhere else.

In: a RUN or a problem set as a request names it, absolute or relative to the bucket. Out: its name in the bucket,
`a/b/c`. What is not plainly inside is refused; nothing is repaired or decoded and then believed.
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
"""What a RUN holds: a RUN within one of them would be taken for a part of the RUN around it."""
SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=,+@-]{0,199}")
"""A whitelist: no leading dot or dash, no escape, no control character, nothing that a store or shell reads twice."""
MOST_PATH_CHARACTERS = 700  # an S3 key holds 1024, a RUN's own names among them


class OutsideBucket(ValueError):
    """A place that links lead out of the bucket, or nowhere."""


class BucketPaths:
    """The paths inside one bucket, by its URL."""

    def __init__(self, bucket: str) -> None:
        self._folder = local_folder(bucket) if urlsplit(bucket).scheme in ("", "file") else None
        self._root = str(self._folder) if self._folder else bucket.rstrip("/")

    def name(self, given: str) -> str:
        """The name in the bucket of what `given` points to. Raises ValueError saying why it is refused."""
        relative = self._relative(given)
        if len(relative) > MOST_PATH_CHARACTERS:
            raise ValueError(
                f"names {len(relative)} characters below the bucket; at most {MOST_PATH_CHARACTERS} are allowed"
            )
        segments = relative.split("/")
        for segment in segments:
            if not SEGMENT.fullmatch(segment):
                raise ValueError(
                    f"{segment!r} is no name inside the bucket: letters, digits and ._=,+@- are allowed, a letter,"
                    " digit or _ in front"
                )
        if segments[0].lower() == JOBS_FOLDER:
            raise ValueError(f"the folder {JOBS_FOLDER}/ of the bucket is the service's own")
        self._check_links(relative)
        return relative

    def run(self, given: str) -> str:
        """`name`, for a RUN that is to be written: neither within another RUN's folders nor in place of its files."""
        relative = self.name(given)
        for segment in relative.split("/"):
            if segment.lower() in OF_A_RUN:
                raise ValueError(f"{segment!r} is a name that every RUN uses inside; choose another")
        return relative

    def url(self, name: str) -> str:
        """The absolute place of a name in the bucket. Raises OutsideBucket where links lead out of it."""
        self._check_links(name)
        return f"{self._root}/{name}"

    def _relative(self, given: str) -> str:
        """`given` without the bucket in front; a name that is relative already stays as it is."""
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
        """A symbolic link on the way, or just inside a RUN, may lead anywhere: what counts is where it really leads."""
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
