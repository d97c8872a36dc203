"""Access to a bucket: a local folder, an S3-compatible store, GCS or Azure, behind one small class.

A put is atomic: readers never see a part of an object. A process that is killed during a put can leave a file with a
hidden name (`HIDDEN`) in a local folder; nothing here reads it, and it can be deleted. The only coordination that a
store must offer is exclusive create (`create`). Credentials are found in each cloud's usual places (for s3://:
`client.storage.s3_credentials`).
"""

from __future__ import annotations

import contextlib
import errno
import io
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, GenericError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, ObjectStore, from_url

from client.errors import LightReasonerError, shorten
from client.storage.claims import NO_HARD_LINKS, NotExclusive, check_exclusive, claim_name, rename_without_links
from client.storage.folders import entries_of, files_below, folders_in
from client.storage.s3_credentials import AwsError, s3_options

MOST_SAID_CHARACTERS = 500
"""Most characters of a store's own words in a message."""
RANGE_BYTES = 4 * 2**20
"""Bytes to read at a time from an object that is read in ranges."""
HIDDEN = re.compile(r"\.[0-9a-f]{32}\.tmp(?:#\d+)?")
"""Name of a file that is being written in a local folder; obstore adds the #number."""
ODD_IN_URL = re.compile(r"[?#%\\\x00-\x1f\x7f]")
BUCKET_SCHEMES = ("s3", "s3a", "gs", "az")
BUCKET_NAME = re.compile(r"[^:@/\s]+")
CERTIFICATE = re.compile(r"InvalidCertificate\(([\s\w(]*)")
"""Finds an invalid certificate in an error's details; its first line says only that the request was not sent."""
PERMANENT_STATUS = re.compile(r"status code: 4(?:0[1-7]|1\d)")
"""Statuses that a retry does not change. 400 may pass, because S3 also sends it after a timeout; so may 408, 409, 425
and 429."""
ABSENT_STATUS = re.compile(r"status code: 404")
"""obstore's error for a listing of a missing bucket. For a single object it raises FileNotFoundError."""
PROBED: set[tuple[str, str]] = set()
"""Schemes and buckets whose exclusive create has been tried by this process."""
NAMES_A_PAGE = 1000
"""Names in one page of a store's listing."""
PLACES = "a path, file://…, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"


class BucketError(LightReasonerError):
    """A store cannot be opened, read or written.

    `may_pass`: a retry may succeed, after an outage or when a full disk has room again.
    """

    def __init__(self, message: str, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class OddObject(BucketError):
    """An object is not a file, or is too large. Other objects can be read."""


class Bucket:
    """A prefix of an object store, opened from a local path or a URL (`PLACES`)."""

    def __init__(self, url: str) -> None:
        if not url.strip():
            raise BucketError(f"the path is empty; give {PLACES}")
        self.url = url
        scheme = urlsplit(url).scheme
        if scheme not in ("", "file"):
            _check_url(url)
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
            raise BucketError(f"cannot open bucket {url!r}: {_said(error)}; give {PLACES}") from error

    def __str__(self) -> str:
        return self.url

    def get(self, name: str, most: int | None = None) -> bytes | None:
        """The object's bytes; None if it does not exist. Raises OddObject if there are more than `most`."""
        store = self._open(for_writing=False)
        if store is None:
            return None
        self._check_kind(name)
        try:
            found = obstore.get(store, name)
            size = found.meta["size"]
            data = b"" if most and size > most else bytes(found.bytes())
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._trouble("read", name, error) from error
        if most and size > most:
            raise OddObject(f"cannot read {name} in {self.url}: it has {size:,} bytes, more than {most:,}")
        return data

    def _check_kind(self, name: str) -> None:
        """Raises OddObject for a pipe or a device in a local folder, because reading it may never end."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            mode = (self._folder / name).stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise OddObject(
                    f"{self._folder / name} is a pipe or a device, and a bucket holds files; give another URL, or move "
                    "it away"
                )

    def open(self, name: str, range_bytes: int = RANGE_BYTES) -> BinaryIO | None:
        """The object as a file that reads ranges on demand; None if it does not exist."""
        store = self._open(for_writing=False)
        if store is None:
            return None
        self._check_kind(name)
        try:
            file = obstore.open_reader(store, name, buffer_size=range_bytes)
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._trouble("read", name, error) from error
        return io.BufferedReader(_Ranges(file, f"{name} in {self.url}", self._folder is None), range_bytes)

    def open_end(self, name: str, end_bytes: int) -> BinaryIO | None:
        """`open` for an object that is read from its end, as Parquet is. A small object takes one request."""
        store = self._open(for_writing=False)
        if store is None:
            return None
        self._check_kind(name)
        try:
            found = obstore.get(store, name, options={"range": {"suffix": end_bytes}})
            begin, size, data = found.range[0], found.meta["size"], bytes(found.bytes())
        except FileNotFoundError:
            return None
        except Exception:  # Azure has no suffix ranges; an empty object has no ranges at all
            return self.open(name, end_bytes)
        if begin == 0:
            return io.BytesIO(data)
        return io.BufferedReader(_End(store, name, size, data, self.url), end_bytes)

    @property
    def remote(self) -> bool:
        """Whether each request goes over the network."""
        return self._folder is None

    def put(self, name: str, data: bytes) -> None:
        """Write an object whole. It replaces an existing one."""
        self._put(name, data, overwrite=True)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object if it does not exist. Returns whether this call wrote it."""
        self._probe()
        try:
            self._put(name, data, overwrite=False)
        except AlreadyExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Remove an object if it exists."""
        store = self._open(for_writing=True)
        assert store is not None
        try:
            if self._folder:  # a claim of its name, in a folder without hard links
                (self._folder / name).with_name(claim_name(name)).unlink(missing_ok=True)
            obstore.delete(store, name)
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._trouble("remove", name, error) from error

    def names(self, prefix: str) -> Iterator[str]:
        """The names of all objects under `prefix/`, or of all objects if it is empty: sorted, relative to the bucket.

        Objects that are still being written are left out.
        """
        try:
            if self._folder is not None:
                found = list(files_below(self._folder, prefix))
            else:
                assert self._store is not None
                pages = obstore.list(self._store, f"{prefix}/" if prefix else None)
                found = [entry["path"] for page in pages for entry in page]
        except Exception as error:
            raise self._trouble("list", f"{prefix}/", error) from error
        yield from sorted(path for path in found if not HIDDEN.fullmatch(PurePosixPath(path).name))

    def first_names(self) -> set[str]:
        """The names of files and folders/ directly in the bucket. A remote store lists one page only."""
        if self._folder:
            try:
                return {name + "/" * stat.S_ISDIR(found.st_mode) for name, found in entries_of(self._folder)}
            except OSError as error:
                raise self._trouble("list", ".", error) from error
        store = self._open(for_writing=False)
        assert store is not None
        try:
            page = next(iter(obstore.list(store, chunk_size=NAMES_A_PAGE)), [])
        except Exception as error:
            raise self._trouble("list", "its names", error) from error
        return {first + slash for first, slash, _ in (entry["path"].partition("/") for entry in page)}

    def folders(self, prefix: str) -> list[str]:
        """The names of the folders directly under `prefix/`, sorted, without the prefix."""
        try:
            if self._folder is not None:
                return sorted(folders_in(self._folder, prefix))
            assert self._store is not None
            found = obstore.list_with_delimiter(self._store, f"{prefix}/")["common_prefixes"]
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
                self._put_hidden_first(store, self._folder, PurePosixPath(name), data, overwrite)
        except AlreadyExistsError:
            raise
        except Exception as error:
            raise self._trouble("write", name, error) from error

    @staticmethod
    def _put_hidden_first(store: ObjectStore, folder: Path, name: PurePosixPath, data: bytes, overwrite: bool) -> None:
        """Write to a hidden name, then rename. obstore alone writes to name#1: a kill would leave it, like a part."""
        hidden = str(name.with_name(f".{secrets.token_hex(16)}.tmp"))
        try:
            obstore.put(store, hidden, data)
            try:
                obstore.rename(store, hidden, str(name), overwrite=overwrite)
            except AlreadyExistsError:
                raise
            except Exception as error:
                if overwrite or not NO_HARD_LINKS.search(str(error)):
                    raise
                rename_without_links(folder, hidden, str(name))
        except BaseException:
            with contextlib.suppress(Exception):
                obstore.delete(store, hidden)
            raise

    def _probe(self) -> None:
        """Test exclusive create before the first claim on a remote store. Raises BucketError if there is none."""
        place = urlsplit(self.url)
        if self._folder or (place.scheme, place.netloc) in PROBED:
            return
        store = self._open(for_writing=True)
        assert store is not None
        try:
            check_exclusive(store)
        except NotExclusive:
            raise BucketError(
                f"the store of {self.url}{self._endpoint} ignores If-None-Match: two writers would mix in one RUN "
                "without notice. Older versions of MinIO and Ceph do so; update the store, or use another"
            ) from None
        except Exception as error:
            raise self._trouble("write", "a probe", error) from error
        PROBED.add((place.scheme, place.netloc))

    @property
    def _endpoint(self) -> str:
        endpoint = getattr(self._store, "config", {}).get("endpoint")
        return f" ({endpoint})" if endpoint else ""

    def _trouble(self, verb: str, name: str, error: Exception) -> BucketError:
        """A BucketError for an error of the store, with a remedy if one is known."""
        words = HIDDEN.sub(lambda _: PurePosixPath(name).name, _said(error))
        said = f"cannot {verb} {name} in {self.url}: {words}"
        remote = self._folder is None
        if remote and isinstance(error, PermissionDeniedError | UnauthenticatedError):
            said += "; check the credentials and their permissions"
        elif isinstance(error, PermissionDeniedError):
            said += "; check who may read and write that folder"
        elif remote and (isinstance(error, FileNotFoundError) or ABSENT_STATUS.search(str(error))):
            said += "; create the bucket first"
        elif "amazonaws.com" in said:
            said += "; for a store other than Amazon's set AWS_ENDPOINT_URL"
        passing = remote and not (CERTIFICATE.search(str(error)) or PERMANENT_STATUS.search(str(error)))
        passing = passing or any(f"os error {number}" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
        return BucketError(said, may_pass=passing and isinstance(error, GenericError))

    def _open(self, for_writing: bool) -> ObjectStore | None:
        if self._store is None:
            assert self._folder is not None
            if not for_writing and not self._folder.is_dir():
                return None  # reading never creates the folder
            try:
                self._store = LocalStore(self._folder, mkdir=True)
            except Exception as error:
                raise BucketError(f"cannot open {self._folder}: {error}") from error
        return self._store


class _Ranges(io.RawIOBase):
    """obstore's reader as a Python file."""

    def __init__(self, file: obstore.ReadableFile, name: str, remote: bool) -> None:
        self._file, self._name, self._remote = file, name, remote

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = memoryview(self._file.read(len(buffer)))
        except Exception as error:
            passing = self._remote and isinstance(error, GenericError)
            raise BucketError(f"cannot read {self._name}: {_said(error)}", may_pass=passing) from error
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class _End(io.RawIOBase):
    """An object as a file, whose end has been read already."""

    def __init__(self, store: ObjectStore, name: str, size: int, end: bytes, url: str) -> None:
        self._store, self._name, self._size, self._url = store, name, size, url
        self._end, self._begin, self._at = memoryview(end), size - len(end), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._at >= self._begin:
            data = self._end[self._at - self._begin :][: len(buffer)]
        else:
            until = min(self._at + len(buffer), self._begin)
            try:
                data = memoryview(obstore.get_range(self._store, self._name, start=self._at, end=until)).cast("B")
            except Exception as error:
                passing = isinstance(error, GenericError)
                raise BucketError(f"cannot read {self._name} in {self._url}: {_said(error)}", passing) from error
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(offset + (0, self._at, self._size)[whence], 0)
        return self._at

    def tell(self) -> int:
        return self._at


def _check_url(url: str) -> None:
    """Raises BucketError for a URL that would be cut or decoded: two different URLs could be the same place."""
    scheme, _, place = url.partition("://")
    host, _, path = place.removesuffix("/").partition("/")
    if odd := ODD_IN_URL.search(url) or re.search(r"\A\s|\s\Z", url):
        said = f"it holds {odd[0]!r}, which a URL cuts off or decodes"
    elif {"", ".", ".."} & set(path.split("/") if path else ()):
        said = "it has an empty folder name, or one of dots"
    elif scheme in BUCKET_SCHEMES and not BUCKET_NAME.fullmatch(host):
        said = f"{host!r} is no bucket's name"
    else:
        return
    raise BucketError(f"cannot open bucket {url!r}: {said}; choose another name, so that two names are two places")


def local_folder(url: str) -> Path:
    """The absolute folder that a local path or a file:// URL names. Raises BucketError for a URL with a host."""
    if not url.startswith("file:"):
        return Path(url).absolute()
    path = url.removeprefix("file:").removeprefix("//").removeprefix("localhost")
    if not path.startswith("/"):
        raise BucketError(f"{url!r} names a host; a local folder is file:///absolute/path, or a plain path")
    return Path(unquote(path))


def _said(error: Exception) -> str:
    """A store's error in one line: code and message if it sent S3's XML, otherwise the first line."""
    text = str(error) or repr(error)
    first = text.splitlines()[0].partition("<?xml")[0].rstrip(" :")
    if found := CERTIFICATE.search(text):
        first += f" (invalid certificate: {found[1].split()[-1]}; AWS_CA_BUNDLE names the certificates to trust)"
    told = [found[1] for tag in ("Code", "Message") if (found := re.search(f"<{tag}>([^<]*)</{tag}>", text))]
    return shorten(f"{first} ({': '.join(told)})" if told else first, MOST_SAID_CHARACTERS)
