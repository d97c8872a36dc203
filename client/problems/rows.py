"""Reads the rows of problem sets: JSONL, JSON arrays, CSV, Parquet, and data sets of the Hub.

In: PROBLEMS as a user names them, and the columns to read. Out: `SetRow` values, in the order of the set. Only a few
rows are in memory at a time, however large the file is, compressed or not; `datasets` reads data sets in its own way.
Never checks the content of a row.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from lzma import LZMAError
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from client.errors import ProblemSetError, Stopped, reason_of, shorten, shown
from client.problems.files import SetFile, files_of
from client.problems.forms import Form, told
from client.problems.hub import HUB, data_set_or_files, naming_hub
from client.storage.bucket import MOST_SAID_CHARACTERS

if TYPE_CHECKING:
    from datasets import IterableDataset

JsonRow = dict[str, Any]
MOST_ROW_BYTES = 64 * 2**20
"""Most bytes of a line: the longest question, escaped by JSON, and room for the other fields."""
MOST_EMPTY_LINES = 2**20
"""Most consecutive empty lines: a few compressed kilobytes may hold any number, and other requests may wait."""
MOST_COLUMN_BYTES = 2**30
"""Most unpacked bytes of a column in a row group: it may be a single page, and a page is unpacked whole."""
BATCH_ROWS = 16
"""Rows of Parquet to read at a time: a small page may unpack to long texts."""
PAGE_BUFFER_BYTES = 2**20
ARRAY_CHUNK_BYTES = 2**16
BETWEEN = re.compile(r"[ \t\r\n,]*")
"""Text between the objects of an array."""
DELIMITERS = ",\t;|"
"""Delimiters of CSV. The one that occurs most often in the first line is used."""


class SetRow(NamedTuple):
    """A row, and where it is. `number`: its line or row in `file`, from 1."""

    file: str
    number: int
    fields: JsonRow
    columns: Sequence[str]
    """The names of all columns of a table, with the type of those that cannot be read; none for JSON."""


Numbered = Iterator[tuple[int, JsonRow, Sequence[str]]]
"""A row's number and fields, and the columns of its file."""


@dataclass(frozen=True)
class Columns:
    """The columns to read. `named`: the columns of ids and questions; dotted names are of nested fields."""

    named: Collection[str]
    of_any_type: str  # is read whatever its type; others only if JSON can hold their type
    only: bool  # read no other columns than the named ones

    def leaves(self, schema: pa.Schema) -> list[str]:
        """The columns of a Parquet file to read; of a nested column only the needed fields, if it is not read whole."""
        whole = [
            column.name
            for column in schema
            if column.name == self.of_any_type
            or (_has_json(column.type) and (column.name in self.named or not self.only))
        ]
        named = [_nested(schema, name) for name in self.named if name not in schema.names]
        others = [] if self.only else [leaf for column in schema for leaf in _json_leaves(column)]
        parts = dict.fromkeys(name for name in (*named, *others) if name)
        return whole + [name for name in parts if name.partition(".")[0] not in whole]


def rows(path: str, columns: Columns, stopped: Callable[[], bool]) -> Iterator[SetRow]:
    """Every row, file by file. `stopped` is called before each row.

    Raises ProblemSetError, naming the file and the invalid line; Stopped.
    """
    if urlsplit(path).scheme != HUB:
        found: list[SetFile] | IterableDataset = files_of(path)
    else:
        with naming_hub(path):
            found = data_set_or_files(path)
    for name, numbered in _sources(found, path, columns):
        for number, fields, names in numbered:
            if stopped():
                raise Stopped(f"stopped reading {path}; no server has been asked yet")
            yield SetRow(name, number, fields, names)


def _sources(found: list[SetFile] | IterableDataset, path: str, columns: Columns) -> Iterator[tuple[str, Numbered]]:
    if not isinstance(found, list):
        yield path, _of_data_set(found, path, columns)
        return
    for file in found:
        yield file.name, _of_file(file, columns)


def _of_file(file: SetFile, columns: Columns) -> Numbered:
    with _naming(file.name), file.open() as opened:
        form, content = told(opened, file.name)
        yield from READERS[form](content, file.name, columns)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except (OSError, EOFError, ValueError, KeyError, zlib.error, LZMAError, pa.ArrowException) as error:
        raise ProblemSetError(f"{path} cannot be read: {shorten(reason_of(error), MOST_SAID_CHARACTERS)}") from error


def _of_lines(file: BinaryIO, name: str, columns: Columns) -> Numbered:
    for number, line in _bounded_lines(file, name):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            yield number, _row_in(text, f"{name}:{number}"), ()


def _bounded_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield lines with their numbers. Raises ProblemSetError for a line that is too long, or too many empty ones."""
    empty = 0
    for number, line in enumerate(iter(lambda: file.readline(MOST_ROW_BYTES + 1), b""), 1):
        if len(line) > MOST_ROW_BYTES:
            raise _line_too_long(f"{name}:{number}")
        empty = 0 if line.strip() else empty + 1
        if empty > MOST_EMPTY_LINES:
            raise ProblemSetError(f"{name}:{number}: more than {MOST_EMPTY_LINES:,} empty lines; remove them")
        yield number, line


def _of_array(file: BinaryIO, name: str, columns: Columns) -> Numbered:
    """Yield the objects of one JSON array, each as soon as it has been read."""
    decoder, scan = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder().raw_decode
    text, at, number, ended = "", 0, 0, False
    while True:
        at = BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("[", at) and not number:
            at, number = BETWEEN.match(text, at + 1).end(), 1  # type: ignore[union-attr]
        if text.startswith("]", at):
            if text[at + 1 :].strip() or file.read(ARRAY_CHUNK_BYTES).strip():
                raise ProblemSetError(
                    f"{name}: goes on after its JSON array; a problem set is one array, or JSON lines"
                )
            return
        where = f"{name}:{number}"
        try:
            _, end = scan(text, at)
            whole = end < len(text)  # a number may continue
        except RecursionError:
            raise ProblemSetError(f"{where}: nested too deeply; a row is an object of plain fields") from None
        except json.JSONDecodeError as error:
            whole, reason = False, error.msg
        if whole:
            yield number, _row_in(text[at:end].encode(), where), ()
            at, number = end, number + 1
        elif ended:
            raise ProblemSetError(f"{where}: not a JSON object ({reason}); the file is a JSON array of such")
        elif len(text) - at > MOST_ROW_BYTES:
            raise _line_too_long(where)
        else:
            more = file.read(max(ARRAY_CHUNK_BYTES, len(text) - at))
            text, at, ended = text[at:] + decoder.decode(more, final=not more), 0, not more


def _of_csv(file: BinaryIO, name: str, columns: Columns) -> Numbered:
    csv.field_size_limit(MOST_ROW_BYTES)
    lines = _text_lines(file, name)
    begin, first = next((number, line) for number, line in enumerate(lines, 1) if line.strip())
    above = begin - 1
    table = csv.reader(chain([first], lines), delimiter=max(DELIMITERS, key=first.count), strict=True)
    try:
        names = [column.strip() for column in next(table)]
        if not set(names) & set(columns.named):
            asked = [column for column in columns.named if column != columns.of_any_type]
            raise ProblemSetError(
                f"{name}:{begin}: no column is called {' or '.join(asked)}. The first line of a CSV names its "
                f"columns, and here it is {shorten(repr(names)[1:-1])}: put a line of names above it, or name the "
                "question's column with --question-field"
            )
        if twice := next((column for column in names if names.count(column) > 1), None):
            raise ProblemSetError(f"{name}:{begin}: two columns have the name {shown(twice)}; rename one")
        begin = above + table.line_num + 1
        for cells in table:
            if len(cells) > len(names):
                raise ProblemSetError(
                    f"{name}:{begin}: {len(cells)} cells, where the first line names {len(names)} columns; quote cells "
                    "that hold the delimiter"
                )
            if cells:
                yield begin, {column: cell or None for column, cell in zip(names, cells, strict=False)}, names
            begin = above + table.line_num + 1
    except csv.Error as error:
        raise ProblemSetError(f"{name}:{begin}: not CSV ({error}); save it again, or as JSON lines") from None


def _text_lines(file: BinaryIO, name: str) -> Iterator[str]:
    for number, line in _bounded_lines(file, name):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise _not_utf8(f"{name}:{number}") from None


def _of_parquet(file: BinaryIO, name: str, columns: Columns) -> Numbered:
    with pq.ParquetFile(file, buffer_size=PAGE_BUFFER_BYTES, pre_buffer=False) as parquet:
        schema = parquet.schema_arrow
        leaves = columns.leaves(schema)
        names = [field.name if _has_json(field.type) else f"{field.name} ({field.type})" for field in schema]
        _check_row_groups(name, parquet.metadata, leaves)
        number = 0
        for batch in parquet.iter_batches(BATCH_ROWS, columns=leaves, use_threads=False):
            for index in range(batch.num_rows):
                number += 1
                yield number, {name: _python_value(batch[name][index]) for name in batch.schema.names}, names


def _python_value(value: pa.Scalar) -> Any:
    """A value as a Python object. Times become text, because they may exceed Python's range."""
    if pa.types.is_temporal(value.type) and value.is_valid:
        return re.sub(r"\.?0+(?=Z?$)", "", text) if "." in (text := value.cast(pa.string()).as_py()) else text
    return value.as_py(maps_as_pydicts="lossy")


def _check_row_groups(name: str, metadata: pq.FileMetaData, leaves: Collection[str]) -> None:
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            path, size = column.path_in_schema, column.total_uncompressed_size
            if size > MOST_COLUMN_BYTES and any(path == leaf or path.startswith(f"{leaf}.") for leaf in leaves):
                raise ProblemSetError(
                    f"{name}: column {path!r} of row group {group} holds {size:,} bytes, more than "
                    f"{MOST_COLUMN_BYTES:,}; write the file with smaller row groups"
                )


def _has_json(kind: pa.DataType) -> bool:
    """Whether JSON can hold a column's values. It holds no times, decimals and bytes: some cannot even be converted."""
    if pa.types.is_struct(kind):
        return all(_has_json(field.type) for field in kind.fields)
    if pa.types.is_map(kind):
        return bool(pa.types.is_string(kind.key_type)) and _has_json(kind.item_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        return _has_json(kind.value_type)
    plain = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer,
             pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)  # fmt: skip
    return any(is_it(kind) for is_it in plain)


def _nested(schema: pa.Schema, name: str) -> str | None:
    """The part of a dotted name that Parquet can select: a map whole. None if it names no nested field."""
    first, *others = name.split(".")
    kind, found = (schema.field(first).type if first in schema.names else pa.null()), [first]
    for part in others:
        if pa.types.is_map(kind):
            break
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return None
        kind = kind.field(part).type
        found.append(part)
    return ".".join(found) if others else None


def _json_leaves(column: pa.Field, above: str = "") -> Iterator[str]:
    """The dotted names of those fields of a nested column that JSON can hold."""
    if pa.types.is_struct(column.type):
        for field in column.type.fields:
            name = f"{above}{column.name}.{field.name}"
            if _has_json(field.type):
                yield name
            else:
                yield from _json_leaves(field, f"{above}{column.name}.")


def _of_data_set(found: IterableDataset, path: str, columns: Columns) -> Numbered:
    with naming_hub(path):
        names = list(found.column_names or ())
        if columns.only and names:
            wanted = {*columns.named, *(name.partition(".")[0] for name in columns.named)}
            found = found.select_columns([name for name in names if name in wanted])
        for number, row in enumerate(found, 1):
            yield number, dict(row), names


def _row_in(line: bytes, where: str) -> JsonRow:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if not _is_utf8(line):
            raise _not_utf8(where) from None
        if b"\0" in line:
            raise ProblemSetError(
                f"{where}: holds NUL bytes, as UTF-16 and damaged files do; the file must be in UTF-8"
            ) from None
        reason = f"{error.msg}, column {error.pos + 1}"  # its own message calls every line line 1
        raise ProblemSetError(
            f"{where}: not a JSON object ({reason}); a problem set has one object a line, or an array of objects"
        ) from None
    if not isinstance(row, dict):
        raise ProblemSetError(
            f"{where}: a JSON {type(row).__name__}, not an object; a problem set has one object a line, or an array of "
            "objects"
        )
    return row


def _line_too_long(where: str) -> ProblemSetError:
    return ProblemSetError(
        f"{where}: longer than {MOST_ROW_BYTES:,} bytes; a problem set has an object or a line for each problem"
    )


def _not_utf8(where: str) -> ProblemSetError:
    return ProblemSetError(f"{where}: not in UTF-8; the file must be in UTF-8, convert it with iconv")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


READERS: dict[Form, Callable[[BinaryIO, str, Columns], Numbered]] = {
    "lines": _of_lines, "array": _of_array, "csv": _of_csv, "parquet": _of_parquet,
}  # fmt: skip
