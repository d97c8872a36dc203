"""Copies a bucket's objects to a data set of the Hugging Face Hub, and back, with huggingface_hub.

In: a bucket, the names of its objects, a data set's URL. Out: one commit that holds them all, or the objects in the
bucket. It never deletes anything, and never replaces an object of the bucket.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.errors import LightReasonerError, reason_of, shorten
from client.storage.ahead import read_ahead
from client.storage.bucket import MOST_SAID_CHARACTERS, Bucket, BucketError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PLACE = re.compile(r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@\s]+?))?/?")
CARD = "README.md"
REACH_SECONDS = 10.0
FILES_AHEAD = 4
"""Files of a data set that are downloaded at a time."""


def reach_hub() -> None:
    """Raises ConnectionError if the Hub cannot be reached. Its own libraries retry for a minute and hide the reason.

    A response that is slow after the connection is not an error here.
    """
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        httpx.head(constants.ENDPOINT, timeout=REACH_SECONDS)
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, httpx.UnsupportedProtocol) as error:
        raise ConnectionError(
            f"the Hugging Face Hub at {constants.ENDPOINT} cannot be reached ({reason_of(error)}); check the network, "
            "and HTTPS_PROXY or HF_ENDPOINT if you need one"
        ) from None
    except httpx.HTTPError:
        return


class DataSet:
    """A data set of the Hub, as hf://datasets/OWNER/NAME[@REVISION]. Raises LightReasonerError for other spellings."""

    def __init__(self, place: str) -> None:
        if not (found := PLACE.fullmatch(place)):
            raise LightReasonerError(f"{shorten(place)!r} names no data set; give hf://datasets/OWNER/NAME[@REVISION]")
        self._place, self._name, self._revision = place, found["name"], found["revision"]

    def __str__(self) -> str:
        return self._place

    def push(self, source: Bucket, names: Sequence[str]) -> str:
        """Upload these objects as one commit; returns its URL. A new data set is created as private.

        An existing card stays: somebody may have filled in its licence.
        """
        from huggingface_hub import CommitOperationAdd

        with self._naming("write") as api, tempfile.TemporaryDirectory() as folder:
            api.create_repo(self._name, repo_type="dataset", private=True, exist_ok=True)
            if api.file_exists(self._name, CARD, repo_type="dataset", revision=self._revision):
                names = [name for name in names if name != CARD]
            added = []
            for number, name in enumerate(names):
                file = Path(folder) / str(number)
                file.write_bytes(source.get(name) or b"")
                added.append(CommitOperationAdd(name, file))
            return api.create_commit(
                self._name, added, commit_message="RUN of LightReasoner", repo_type="dataset", revision=self._revision
            ).commit_url

    def pull(self, target: Bucket, wanted: Callable[[str], bool], first: str, last: str, most: int) -> int:
        """Write `first`, then the other wanted files that `target` lacks, `last` at the end; returns their number.

        Raises BucketError if the data set has no `first`, if `target` has a different one, or if a file has more than
        `most` bytes.
        """
        with self._naming("read") as api:
            sha = api.repo_info(self._name, repo_type="dataset", revision=self._revision).sha
            tree: Iterable[Any] = api.list_repo_tree(self._name, recursive=True, repo_type="dataset", revision=sha)
            sizes = {entry.path: entry.size for entry in tree if hasattr(entry, "size") and wanted(entry.path)}
            if first not in sizes:
                raise BucketError(f"{self} holds no RUN: it has no {first}")
            if odd := next((name for name, size in sizes.items() if size > most), None):
                raise BucketError(f"{self}: {odd} has {sizes[odd]:,} bytes, more than the {most:,} of a RUN's files")

            def fetched(name: str) -> tuple[str, bytes]:
                with tempfile.TemporaryDirectory() as folder:
                    file = api.hf_hub_download(self._name, name, repo_type="dataset", revision=sha, local_dir=folder)
                    return name, Path(file).read_bytes()

            _, data = fetched(first)
            if not target.create(first, data) and target.get(first) != data:
                raise BucketError(f"{target} holds another RUN than {self}; name a new one")
            there = set(target.names(""))
            others = [name for name in sorted(sizes, key=lambda name: (name == last, name)) if name not in there]
            for name, data in read_ahead(others, fetched, FILES_AHEAD):
                target.put(name, data)
        return len(others)

    @contextmanager
    def _naming(self, verb: str) -> Iterator[HfApi]:
        """Yield the Hub's API. Errors of every kind become a BucketError that names the data set."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        try:
            reach_hub()
            yield HfApi()
        except LightReasonerError:
            raise
        except Exception as error:
            remedy = ""
            reasons: list[BaseException] = [error]
            if error.__cause__ and not hasattr(error, "response"):  # the cause alone says why an upload failed
                reasons.append(error.__cause__)
            with contextlib.suppress(AttributeError):
                if reasons[-1].response.status_code in (401, 403, 404):  # type: ignore[attr-defined]
                    remedy = "; check the name, and log in with `hf auth login` or a token in HF_TOKEN"
            reason = shorten("; ".join(dict.fromkeys(map(reason_of, reasons))), MOST_SAID_CHARACTERS)
            raise BucketError(f"cannot {verb} {self}: {reason}{remedy}") from error
