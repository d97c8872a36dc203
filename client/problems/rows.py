"""Reads the rows of problem sets: JSONL, gzipped JSONL, Parquet, and data sets through `datasets`.

In: a path, an s3:// or an hf:// URL, and the columns to read. Out: (number, row), in the order of the set. Only a few
rows are in memory at a time, however large the file is, packed or unpacked; `datasets` reads hf:// in its own way.
Never checks what a row says.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import parse_qsl, urlsplit

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from client.errors import LightReasonerError, ProblemSetError, Stopped, how_to_install
from client.storage.bucket import Bucket, local_folder

if TYPE_CHECKING:
    from datasets import IterableDataset

JsonRow = dict[str, Any]
HUB = "hf"
"""The scheme of data sets that are read through `datasets`."""
HUB_OPTIONS = ("config", "split")
MOST_ROW_BYTES = 64 * 2**20
"""Most bytes of a line: the longest question, escaped by JSON, and room for the other fields."""
MOST_COLUMN_BYTES = 2**30
"""Most unpacked bytes of a column in a row group: it may be a single page, and a page is unpacked whole."""
BATCH_ROWS = 16
"""Rows of Parquet to read at a time: a small page may unpack to long texts."""
PAGE_BUFFER_BYTES = 2**20


def rows(path: str, fields: Collection[str] | None, stopped: Callable[[], bool]) -> Iterator[tuple[int, JsonRow]]:
    """Every row, with its number from 1.

    `fields`: the columns that are needed; others may be left out. None: all, except Parquet columns with types that
    JSON cannot hold. `stopped` is called before each row.

    Raises ProblemSetError, naming the file and the invalid line; Stopped.
    """
    read = _of_hub if _is_hub(path) else _of_parquet if _is_parquet(path) else _of_lines
    with _naming(path):
        yield from read(path, fields, stopped)


def column_names(path: str) -> list[str]:
    """The names of all columns of a set, with the type of those that cannot be read.

    Empty for JSONL, where each line has its own names. Raises ProblemSetError, naming the file.
    """
    if _is_hub(path):
        with _naming_data_set(path):
            return list(_data_set(path).column_names or ())
    if not _is_parquet(path):
        return []
    with _naming(path), _opened(path) as file, pq.ParquetFile(file) as parquet:
        return [
            field.name if _has_json(field.type) else f"{field.name} ({field.type})" for field in parquet.schema_arrow
        ]


def _is_hub(path: str) -> bool:
    return urlsplit(path).scheme == HUB


def _is_parquet(path: str) -> bool:
    return path.endswith(".parquet")


@contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException) as error:
        raise ProblemSetError(f"{path} cannot be read: {error}") from error


def _of_lines(path: str, fields: Collection[str] | None, stopped: Callable[[], bool]) -> Iterator[tuple[int, JsonRow]]:
    with _opened(path) as file:
        lines = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
        number = 0
        while line := lines.readline(MOST_ROW_BYTES + 1):
            number += 1
            _check(stopped, path)
            if len(line) > MOST_ROW_BYTES:
                raise ProblemSetError(
                    f"{path}:{number}: longer than {MOST_ROW_BYTES:,} bytes; a problem set has one object a line"
                )
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                yield number, _row_in(text, f"{path}:{number}")


def _of_parquet(
    path: str, fields: Collection[str] | None, stopped: Callable[[], bool]
) -> Iterator[tuple[int, JsonRow]]:
    with _opened(path) as file, pq.ParquetFile(file, buffer_size=PAGE_BUFFER_BYTES, pre_buffer=False) as parquet:
        columns = [
            field.name for field in parquet.schema_arrow
            if (fields is None or field.name in fields) and _has_json(field.type)
        ]  # fmt: skip
        _check_row_groups(path, parquet.metadata, columns)
        number = 0
        for batch in parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            for index in range(batch.num_rows):
                number += 1
                _check(stopped, path)
                yield number, batch.slice(index, 1).to_pylist()[0]


def _check_row_groups(path: str, metadata: pq.FileMetaData, columns: Collection[str]) -> None:
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            size = column.total_uncompressed_size
            if column.path_in_schema.split(".")[0] in columns and size > MOST_COLUMN_BYTES:
                raise ProblemSetError(
                    f"{path}: column {column.path_in_schema!r} of row group {group} holds {size:,} bytes, more than "
                    f"{MOST_COLUMN_BYTES:,}; write the file with smaller row groups"
                )


def _has_json(kind: pa.DataType) -> bool:
    """Whether JSON can hold a column's values. Times, decimals and bytes are never read: they may not even convert."""
    if pa.types.is_struct(kind):
        return all(_has_json(field.type) for field in kind.fields)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        return _has_json(kind.value_type)
    plain = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer,
             pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)  # fmt: skip
    return any(is_it(kind) for is_it in plain)


def _of_hub(path: str, fields: Collection[str] | None, stopped: Callable[[], bool]) -> Iterator[tuple[int, JsonRow]]:
    with _naming_data_set(path):
        found = _data_set(path)
        if fields is not None and (columns := found.column_names):
            found = found.select_columns([column for column in columns if column in fields])
        for number, row in enumerate(found, 1):
            _check(stopped, path)
            yield number, dict(row)


def _data_set(path: str) -> IterableDataset:
    """The data set of hf://NAME?config=…&split=…, streamed. NAME: a name of the Hub, or the path of a local folder."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ProblemSetError(f"{path} needs {error.name}: {how_to_install('hub')}") from None
    address = urlsplit(path)
    name, options = f"{address.netloc}{address.path}", dict(parse_qsl(address.query))
    if not name or (unknown := options.keys() - set(HUB_OPTIONS)):
        said = f"it has {', '.join(sorted(unknown))}" if name else "it lacks a data set's name"
        raise ProblemSetError(f"{path}: expected hf://NAME?config=…&split=…, the latter two optional; {said}")
    return load_dataset(name, options.get("config"), split=options.get("split", "train"), streaming=True)


@contextmanager
def _naming_data_set(path: str) -> Iterator[None]:
    try:
        yield
    except LightReasonerError:
        raise
    except Exception as error:  # datasets has errors of every family
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ProblemSetError(f"{path} cannot be read through datasets: {reason}") from error


def _opened(path: str) -> BinaryIO:
    if urlsplit(path).scheme in ("", "file"):
        file = local_folder(path)
        if file.is_file():
            return file.open("rb")
    else:
        folder, _, name = path.rpartition("/")
        if (found := Bucket(folder).open(name)) is not None:
            return found
    raise ProblemSetError(f"no problem set at {path}: give a .jsonl, .jsonl.gz or .parquet file, or hf://NAME")


def _row_in(line: bytes, where: str) -> JsonRow:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if not _is_utf8(line):
            raise ProblemSetError(f"{where}: not in UTF-8; the file must be in UTF-8, convert it") from None
        if b"\0" in line:
            raise ProblemSetError(
                f"{where}: holds NUL bytes, as UTF-16 and damaged files do; the file must be in UTF-8"
            ) from None
        reason = f"{error.msg}, column {error.pos + 1}"  # orjson's message always says line 1
        raise ProblemSetError(f"{where}: not a JSON object ({reason}); a problem set has one object a line") from None
    if not isinstance(row, dict):
        raise ProblemSetError(
            f"{where}: a JSON {type(row).__name__}, not an object; a problem set has one object a line"
        )
    return row


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _check(stopped: Callable[[], bool], path: str) -> None:
    if stopped():
        raise Stopped(f"stopped reading {path}; no server has been asked yet")
