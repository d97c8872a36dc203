"""Tells a file's form from its first bytes: its compression, and the format within.

In: an open file. Out: its form, and the file, decompressed and at its beginning. An unsupported form is an error with
its name and the remedy. The file's name only helps to tell CSV from JSON lines. Nothing beyond the first bytes is read,
except that Parquet from a pipe is copied whole.
"""

from __future__ import annotations

import codecs
import gzip
import io
import lzma
import re
import shutil
import tempfile
from typing import BinaryIO, Literal

import pyarrow as pa

from client.environment import check_temporary_folder
from client.errors import ProblemSetError

Form = Literal["lines", "array", "csv", "parquet"]
FIRST_BYTES = 4096
MOST_LAYERS = 2
"""Most layers of compression."""
XZ_MEMORY_BYTES = 2**28
"""Memory limit for xz: a few bytes of it may ask for gigabytes."""
XZ_CHUNK_BYTES = 2**16
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4",
                b"\xfd7zXZ\0": "xz"}  # fmt: skip
WITH_PANDAS = "save it as Parquet with pandas, or as CSV"
PARQUET = b"PAR1"
FOREIGN = {
    b"PK\x03\x04": ("a ZIP archive or an Excel workbook", "unpack it, or save it as CSV"),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook", "save it as CSV"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it"),
    b"Rar!": ("a RAR archive", "unpack it"),
    b"PARE": ("encrypted Parquet", "save it without encryption"),
    b"ARROW1": ("an Arrow or Feather file", WITH_PANDAS),
    b"FEA1": ("a Feather file", WITH_PANDAS),
    b"\xff\xff\xff\xff": ("an Arrow stream", "save it as Parquet; a data set of 'datasets' with to_parquet"),
    b"ORC": ("an ORC file", WITH_PANDAS),
    b"Obj\x01": ("an Avro file", "save it as Parquet or as JSON lines"),
    b"SQLite format 3": ("a SQLite database", "export the table as CSV"),
    b"\x89HDF": ("an HDF5 file", WITH_PANDAS),
    b"\x93NUMPY": ("a NumPy array", "save it as JSON lines"),
    b"%PDF": ("a PDF", "save the problems as JSON lines"),
    b"\x80": ("a Python pickle, which may run code", "save it as JSON lines"),
    b"version https://git-lfs": ("a pointer of Git LFS and not the file itself", "run git lfs pull"),
    b"---\n": ("YAML", "save it as JSON lines"),
    b"\x1f\x9d": ("compressed by compress (.Z)", "unpack it"),
    b"LZIP": ("compressed by lzip", "unpack it"),
    b"\x5d\0\0": ("compressed as LZMA", "unpack it, or compress it as xz"),
    b"\xff\x06\0\0sNaPpY": ("compressed by Snappy", "unpack it"),
    b"x\x01": ("compressed as zlib", "unpack it, or compress it as gzip"),
    b"x\x9c": ("compressed as zlib", "unpack it, or compress it as gzip"),
    b"x\xda": ("compressed as zlib", "unpack it, or compress it as gzip"),
    b"GGUF": ("a GGUF model", "give the file of problems"),
    b"\x7fELF": ("a program", "give the file of problems"),
    b"\x89PNG": ("a picture", "give the file of problems"),
    b"\xff\xd8\xff": ("a picture", "give the file of problems"),
}
"""First bytes of unsupported formats: the format's name, and what to do."""
WORDS = (b"PARE", b"ORC", b"FEA1", b"ARROW1", b"Rar!", b"LZIP", b"GGUF")
"""Those of `FOREIGN` that a text may begin with too. A file of such a format also has bytes that no text has."""
BINARY, MOST_CONTROLS = re.compile(rb"[\0-\x08\x0e-\x1f]"), 3
"""Control characters, and how many of them a text in an old encoding may have."""
TAR_AT, TAR = 257, b"ustar"
DUCKDB_AT, DUCKDB = 8, b"DUCK"
SAFETENSORS = re.compile(rb"[\s\S]{4}\0{4}\{")
WIDE = re.compile(rb"(?:[\x20-\x7e]\0|\0[\x20-\x7e]){2}")
"""The beginning of UTF-16 without a byte order mark. Reading its first line then raises the error with the remedy."""
MOST_FIRST_BYTES_SHOWN = 8
ENCODINGS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
             codecs.BOM_UTF16_BE: "UTF-16"}  # fmt: skip
NO_TABLE = re.compile(rb"[{}\[\]\0]")
"""Matches a first line that is not a header of CSV."""


def told(file: BinaryIO, name: str) -> tuple[Form, BinaryIO]:
    """A file's form, and the decompressed file. Raises ProblemSetError for an unsupported format, with the remedy."""
    for layer in range(MOST_LAYERS + 1):
        head = file.read(FIRST_BYTES)
        if head.startswith(PARQUET) and layer == 0:
            return "parquet", _seekable(file, head)
        if head.startswith(PARQUET):
            raise ProblemSetError(f"{name} is Parquet, compressed as a whole; unpack it")
        file = io.BufferedReader(_Again(head, file))
        compression = next((kind for magic, kind in COMPRESSIONS.items() if head.startswith(magic)), None)
        if compression is None:
            return _form_of_text(head, name), file
        file = _decompressed(file, compression)
    raise ProblemSetError(f"{name} is compressed {MOST_LAYERS + 1} times; unpack it")


def _form_of_text(head: bytes, name: str) -> Form:
    what, remedy = next(
        (said for magic, said in FOREIGN.items()
         if head.startswith(magic) and (magic not in WORDS or BINARY.search(head))), ("", "")
    )  # fmt: skip
    if head[TAR_AT:].startswith(TAR):
        what, remedy = "a tar archive", "unpack it"
    elif head[DUCKDB_AT:].startswith(DUCKDB) and BINARY.search(head):
        what, remedy = "a DuckDB database", "export the table as CSV"
    elif SAFETENSORS.match(head):
        what, remedy = "a safetensors model", "give the file of problems"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"<"):
        what, remedy = "a web page or XML", "download the file itself, or save it as JSON lines"
    if what:
        raise ProblemSetError(f"{name} is {what}; {remedy}")
    for mark, encoding in ENCODINGS.items():
        if head.startswith(mark):
            raise ProblemSetError(
                f"{name}:1: not in UTF-8 but in {encoding}; the file must be in UTF-8: iconv -f {encoding} -t UTF-8"
            )
    if len(BINARY.findall(head)) > MOST_CONTROLS and not _is_text(head) and not WIDE.match(head):
        raise ProblemSetError(
            f"{name} is binary, of a form that is not known (it begins with {head[:MOST_FIRST_BYTES_SHOWN]!r}); save "
            "it as JSON lines, CSV or Parquet"
        )
    if name.lower().endswith(".parquet"):
        raise ProblemSetError(f"{name} is no Parquet file: it begins with {head[:8]!r}; download or write it again")
    if text.startswith(b"["):
        return "array"
    first = text.partition(b"\n")[0]
    by_name = re.search(r"\.(csv|tsv)(\.\w+)?$", name, re.IGNORECASE)
    of_json = re.search(r"\.(jsonl?|ndjson)(\.\w+)?$", name, re.IGNORECASE)
    table = not of_json or any(mark in first for mark in (b",", b"\t", b";"))
    return "csv" if first and (by_name or table) and not NO_TABLE.search(first) else "lines"


def _is_text(head: bytes) -> bool:
    """Whether a file with these first bytes may be UTF-8. Its last character may be incomplete."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _decompressed(file: BinaryIO, compression: str) -> BinaryIO:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if compression == "xz":
        return io.BufferedReader(_Xz(file))
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), compression))  # type: ignore[type-var]


def _seekable(file: BinaryIO, head: bytes) -> BinaryIO:
    """The file at its beginning. A pipe is copied to a temporary file, because Parquet has its index at the end."""
    if file.seekable():
        file.seek(0)
        return file
    check_temporary_folder()
    kept = tempfile.TemporaryFile()  # noqa: SIM115 - the reader closes it
    kept.write(head)
    shutil.copyfileobj(file, kept)
    kept.seek(0)
    return kept


class _Again(io.RawIOBase):
    """Reads a file from its beginning, although its `head` has been read already."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = memoryview(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._head[: len(buffer)] if self._head else self._rest.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


class _Xz(io.RawIOBase):
    """lzma.LZMAFile with a memory limit, for which it has no argument."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._stream = lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = b""
        while not data:
            left = self._stream.unused_data if self._stream.eof else b""
            chunk = left or (self._packed.read(XZ_CHUNK_BYTES) if self._stream.eof or self._stream.needs_input else b"")
            if self._stream.eof:
                if not chunk.strip(b"\0"):  # the end; only padding follows
                    return 0
                self._stream = lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES)
            elif self._stream.needs_input and not chunk:
                raise EOFError("its compressed data end before their end")
            data = self._stream.decompress(chunk, len(buffer))
        buffer[: len(data)] = data
        return len(data)
