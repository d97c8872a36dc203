"""Access to the shared bucket: a local folder, any S3-compatible store, GCS or Azure, behind one small class.

Every put is whole or absent: readers never see a torn object. What a process that was killed in the middle leaves in a
local folder has a hidden name (`HIDDEN`); nothing here reads it, and it may be deleted. Exclusive create (`create`) is
the only coordination that is asked of a store. Credentials come each cloud's usual ways
(`client.storage.s3_credentials` for s3://).
"""

from __future__ import annotations

import contextlib
import errno
import io
import re
import secrets
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, GenericError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, ObjectStore, from_url

from client.errors import LightReasonerError
from client.storage.s3_credentials import AwsError, s3_options

RANGE_BYTES = 4 * 2**20
"""Of an object that is read in ranges, at a time."""
HIDDEN = re.compile(r"\.[0-9a-f]{32}\.tmp(?:#\d+)?")
"""An object of a local folder that is being written; the end is obstore's."""
PLACES = "a path, file://…, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"


class BucketError(LightReasonerError):
    """A store that cannot be opened, read or written.

    `may_pass`: the same may succeed later, after an outage or when a full disk has been given room.
    """

    def __init__(self, message: str, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class Bucket:
    """A prefix of an object store, opened from a local path or a URL (`PLACES`)."""

    def __init__(self, url: str) -> None:
        if not url.strip():
            raise BucketError(f"no place was named; name {PLACES}")
        self.url = url
        scheme = urlsplit(url).scheme
        try:
            if scheme in ("", "file"):
                folder = local_folder(url)
                if folder.exists() and not folder.is_dir():
                    raise BucketError(f"{folder} is a file; a bucket or RUN is a folder")
                self._folder: Path | None = folder
                self._store: ObjectStore | None = None
            else:
                self._folder = None
                self._store = from_url(url, **(s3_options() if scheme in ("s3", "s3a") else {}))
        except BucketError:
            raise
        except AwsError as error:
            raise BucketError(f"cannot open bucket {url!r}: {error}") from error
        except Exception as error:
            raise BucketError(f"cannot open bucket {url!r}: {_said(error)}; name {PLACES}") from error

    def __str__(self) -> str:
        return self.url

    def get(self, name: str) -> bytes | None:
        """The object's bytes, or None where there is none."""
        store = self._open(for_writing=False)
        if store is None:
            return None
        try:
            return bytes(obstore.get(store, name).bytes())
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._trouble("read", name, error) from error

    def open(self, name: str, range_bytes: int = RANGE_BYTES) -> BinaryIO | None:
        """The object as a file that is read in ranges, as far as it is asked for; None where there is none."""
        store = self._open(for_writing=False)
        if store is None:
            return None
        try:
            file = obstore.open_reader(store, name, buffer_size=range_bytes)
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._trouble("read", name, error) from error
        return io.BufferedReader(_Ranges(file, f"{name} in {self.url}"), range_bytes)

    def put(self, name: str, data: bytes) -> None:
        """Write an object whole, replacing what was there."""
        self._put(name, data, overwrite=True)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object only where there is none; whether this call was the one that wrote it."""
        try:
            self._put(name, data, overwrite=False)
        except AlreadyExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Remove an object; nothing where there is none."""
        store = self._open(for_writing=True)
        try:
            obstore.delete(store, name)  # type: ignore[arg-type]
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._trouble("remove", name, error) from error

    def names(self, prefix: str) -> Iterator[str]:
        """The names of all objects under `prefix/`, of all where it is empty, sorted, relative to the bucket.

        What is still being written is not among them.
        """
        store = self._open(for_writing=False)
        if store is None:
            return
        try:
            found = [
                entry["path"] for batch in obstore.list(store, f"{prefix}/" if prefix else None) for entry in batch
            ]
        except Exception as error:
            raise self._trouble("list", f"{prefix}/", error) from error
        yield from sorted(path for path in found if not HIDDEN.fullmatch(PurePosixPath(path).name))

    def folders(self, prefix: str) -> list[str]:
        """The names of what lies directly under `prefix/` and holds objects, sorted, without the prefix."""
        store = self._open(for_writing=False)
        if store is None:
            return []
        try:
            found = obstore.list_with_delimiter(store, f"{prefix}/")["common_prefixes"]
        except Exception as error:
            raise self._trouble("list", f"{prefix}/", error) from error
        return sorted(PurePosixPath(path).name for path in found)

    def _put(self, name: str, data: bytes, overwrite: bool) -> None:
        store = self._open(for_writing=True)
        assert store is not None
        try:
            if self._folder is None:
                obstore.put(store, name, data, mode="overwrite" if overwrite else "create")
            else:
                self._put_hidden_first(store, PurePosixPath(name), data, overwrite)
        except AlreadyExistsError:
            raise
        except Exception as error:
            raise self._trouble("write", name, error) from error

    @staticmethod
    def _put_hidden_first(store: ObjectStore, name: PurePosixPath, data: bytes, overwrite: bool) -> None:
        """In a local folder: obstore would write to name#1, and a kill would leave that to be taken for a part."""
        hidden = str(name.with_name(f".{secrets.token_hex(16)}.tmp"))
        try:
            obstore.put(store, hidden, data)
            obstore.rename(store, hidden, str(name), overwrite=overwrite)
        except BaseException:
            with contextlib.suppress(Exception):
                obstore.delete(store, hidden)
            raise

    def _trouble(self, verb: str, name: str, error: Exception) -> BucketError:
        """An error of the store as one of ours, with what helps where that is known."""
        words = HIDDEN.sub(lambda _: PurePosixPath(name).name, _said(error))
        said = f"cannot {verb} {name} in {self.url}: {words}"
        remote = self._folder is None
        if remote and isinstance(error, PermissionDeniedError | UnauthenticatedError):
            said += "; check the credentials, and what they may do there"
        elif isinstance(error, PermissionDeniedError):
            said += "; check who may read and write that folder"
        elif remote and isinstance(error, FileNotFoundError):
            said += "; a bucket has to be there before it is used"
        elif "amazonaws.com" in said:
            said += "; for a store other than Amazon's set AWS_ENDPOINT_URL"
        passing = remote or any(f"os error {number}" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
        return BucketError(said, may_pass=passing and isinstance(error, GenericError))

    def _open(self, for_writing: bool) -> ObjectStore | None:
        if self._store is None:
            assert self._folder is not None
            if not for_writing and not self._folder.is_dir():
                return None  # reading never makes the folder
            try:
                self._store = LocalStore(self._folder, mkdir=True)
            except Exception as error:
                raise BucketError(f"cannot open {self._folder}: {error}") from error
        return self._store


class _Ranges(io.RawIOBase):
    """obstore's reader as Python's files are."""

    def __init__(self, file: obstore.ReadableFile, name: str) -> None:
        self._file, self._name = file, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = memoryview(self._file.read(len(buffer)))
        except Exception as error:
            raise BucketError(f"cannot read {self._name}: {_said(error)}") from error
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def local_folder(url: str) -> Path:
    """The absolute folder that a local path or a file:// URL names. Raises BucketError for a URL with a host."""
    if not url.startswith("file:"):
        return Path(url).absolute()
    path = url.removeprefix("file:").removeprefix("//").removeprefix("localhost")
    if not path.startswith("/"):
        raise BucketError(f"{url!r} names a host; a local folder is file:///absolute/path, or a plain path")
    return Path(unquote(path))


def _said(error: Exception) -> str:
    """What a store says, in a line: its own code and words where it sends S3's XML, the first line otherwise."""
    text = str(error) or repr(error)
    first = text.splitlines()[0].partition("<?xml")[0].rstrip(" :")
    told = [found[1] for tag in ("Code", "Message") if (found := re.search(f"<{tag}>([^<]*)</{tag}>", text))]
    return f"{first} ({': '.join(told)})" if told else first
