"""Parquet files of images as Hugging Face writes them; the only module that needs pyarrow.

A column of structures (`bytes`, `path`) or of plain bytes holds the encoded images, a column of
integers or texts the labels; the class names stand in the schema's metadata. The labels are read
at once, the images batch by batch from the first to the last: single ones cannot be reached, as
Parquet packs many of them into a compressed page.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from backmix.pipeline.sources.classes import by_name, by_number, check_class_names
from backmix.pipeline.sources.source import Item, Items, Source, expand_files, some

_BATCH = 32  # rows decoded at a time
_BUFFER = 1 << 20  # bytes read at a time
_MAX_PATH = 255  # bytes of a picture's own name


def open_parquet(spec: str, rest: str, classes: list[str] | None) -> Source:
    """List `parquet:FILES` or `parquet:FILES//LABEL`, row after row, file after file."""
    _pyarrow()
    pattern, slashes, column = rest.rpartition("//")
    if not slashes or column.endswith(".parquet"):
        pattern, column = rest, ""
    files = expand_files(pattern, "parquet file")
    tables = [_Table(path, column) for path in files]
    first = tables[0]
    for table in tables:
        if (table.image, table.label, table.names) != (first.image, first.label, first.names):
            raise ValueError(
                f"{table.path} has other columns or class names than {first.path}; convert them "
                "one by one"
            )
    starts = np.cumsum([0, *(table.rows for table in tables)])
    count = int(starts[-1])
    if not count:
        raise ValueError(f"{rest} holds no rows")
    names = [name for table in tables for name in table.picture_names()]

    def where(i: int) -> str:
        k = int(np.searchsorted(starts, i, "right")) - 1
        return f"{files[k]}, row {i - int(starts[k])}"

    stored = [label for table in tables for label in table.labels()]
    for i, label in enumerate(stored):
        if label is None:
            raise ValueError(f"{where(i)}: no {first.label}")
    labels, known, notes = _labels(stored, first.names, classes, where, rest)

    def make(i: int) -> Item:
        k = int(np.searchsorted(starts, i, "right")) - 1
        return Item(names[i], int(labels[i]), files[k])

    def stream() -> Iterator[bytes | None]:
        for table in tables:
            yield from table.pictures()

    return Source(spec, known, Items(count, make), notes, files=files, stream=stream)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"parquet:FILES needs the package pyarrow ({error}): pip install 'backmix[parquet]'"
        ) from error
    return pyarrow


def _labels(
    stored: list[Any], names: list[str] | None, classes: list[str] | None, where: Any, rest: str
) -> tuple[np.ndarray, list[str], list[str]]:
    if isinstance(stored[0], str):
        found = sorted(set(stored))
        check_class_names(found, rest)
        place = {name: k for k, name in enumerate(found)}
        return by_name(np.array([place[name] for name in stored], np.int64), found, classes, rest)
    for i, label in enumerate(stored):
        if not -1 <= label < 1 << 62:
            raise ValueError(f"{where(i)}: label {label}")
    numbers = np.array(stored, np.int64)
    if names is None or numbers.max() < 0:
        return by_number(numbers, classes, where)
    wrong = (numbers < 0) | (numbers >= len(names))
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(f"{where(i)}: label {stored[i]}, but there are {len(names)} class names")
    return by_name(numbers, names, classes, rest)


class _Table:
    """One file: which columns count, and reading them."""

    def __init__(self, path: str, label: str) -> None:
        pa = _pyarrow()
        self.path = path
        with _named_errors(self.path), pa.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            self.rows = file.metadata.num_rows
        features = _features(schema.metadata, path)
        self.image = self._image_column(schema, pa)
        self._struct = pa.types.is_struct(schema.field(self.image).type)
        self.label = self._label_column(schema, features, label, pa)
        self.names = _class_names(features.get(self.label), f"{path}, column {self.label}")

    def _image_column(self, schema: Any, pa: Any) -> str:
        def holds_images(kind: Any) -> bool:
            if pa.types.is_struct(kind):
                inner = [kind.field(k) for k in range(kind.num_fields)]
                return any(f.name == "bytes" and holds_images(f.type) for f in inner)
            return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

        found = [field.name for field in schema if holds_images(field.type)]
        if "image" in found:
            return "image"
        if len(found) != 1:
            what = (
                f"several columns that could hold images: {some(found)}"
                if found
                else (f"no column of images; its columns are {some(schema.names)}")
            )
            raise ValueError(f"{self.path} has {what}; expected a column 'image' of bytes")
        return found[0]

    def _label_column(self, schema: Any, features: dict[str, Any], asked: str, pa: Any) -> str:
        def holds_labels(kind: Any) -> bool:
            return (
                pa.types.is_integer(kind)
                or pa.types.is_string(kind)
                or pa.types.is_large_string(kind)
            )

        possible = [field.name for field in schema if holds_labels(field.type)]
        if asked:
            if asked not in possible:
                raise ValueError(
                    f"{self.path} has no column {asked!r} of integers or texts, but "
                    f"{some(possible)}"
                )
            return asked
        named = [name for name in possible if _is_class_label(features.get(name))]
        for candidates in (["label"] if "label" in possible else [], named, possible):
            if len(candidates) == 1:
                return candidates[0]
            if candidates:
                break
        raise ValueError(
            f"{self.path}: which column holds the labels? Write parquet:FILES//COLUMN with one of "
            f"{some(named or possible)}"
        )

    def labels(self) -> list[Any]:
        """Return the labels of all rows: int, str or None."""
        return self._column(self.label)

    def picture_names(self) -> list[str]:
        """Return a name for each row: file, row, and what the picture itself is called."""
        stem = os.path.splitext(os.path.basename(self.path))[0]
        own: list[Any] = [None] * self.rows
        if self._struct and self._has_paths():
            own = self._column(f"{self.image}.path")
        return [f"{stem}/{row:07d}{_own_name(path)}" for row, path in enumerate(own)]

    def _has_paths(self) -> bool:
        pa = _pyarrow()
        with _named_errors(self.path), pa.parquet.ParquetFile(self.path) as file:
            kind = file.schema_arrow.field(self.image).type
            inner = {kind.field(k).name: kind.field(k).type for k in range(kind.num_fields)}
        return "path" in inner and pa.types.is_string(inner["path"])

    def _column(self, name: str) -> list[Any]:
        pa = _pyarrow()
        with _named_errors(self.path), pa.parquet.ParquetFile(self.path) as file:
            column = file.read(columns=[name]).column(0).combine_chunks()
            if pa.types.is_struct(column.type):
                column = column.flatten()[0]
            values = column.to_pylist()
        if len(values) != self.rows:
            raise ValueError(f"{self.path}: {len(values)} values in {name}, {self.rows} rows")
        return values

    def pictures(self) -> Iterator[bytes | None]:
        """Yield the encoded images, a batch of rows in memory at a time."""
        pa = _pyarrow()
        column = f"{self.image}.bytes" if self._struct else self.image
        count = 0
        with _named_errors(self.path):
            file = pa.parquet.ParquetFile(self.path, buffer_size=_BUFFER, pre_buffer=False)
        with file:
            batches = file.iter_batches(_BATCH, columns=[column], use_threads=False)
            while True:
                with _named_errors(f"{self.path}, after row {count}"):
                    batch = next(batches, None)
                if batch is None:
                    break
                data = batch.column(0)
                if self._struct:
                    data = data.flatten()[0]
                for value in data:
                    yield value.as_py() if value.is_valid else None
                count += len(data)
        if count != self.rows:
            raise ValueError(f"{self.path} holds {count} images and announces {self.rows}")


@contextlib.contextmanager
def _named_errors(place: str) -> Iterator[None]:
    """Give the errors of pyarrow the file's name; they are of many kinds that mean the same."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{place}: {message}; it is no Parquet file, or is damaged") from error


def _features(metadata: dict[bytes, bytes] | None, path: str) -> dict[str, Any]:
    """Return what the writer says of the columns, empty where it says nothing."""
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the metadata 'huggingface' are no JSON: {error}") from error
    for key in ("info", "features"):
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def _is_class_label(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel"


def _class_names(feature: Any, where: str) -> list[str] | None:
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not names:
        return None
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: class names that are no texts")
    check_class_names(names, where)
    return names


def _own_name(path: Any) -> str:
    """Return `/NAME` for the last part of a picture's path, if it can be one."""
    name = os.path.basename(path.replace("\\", "/")) if isinstance(path, str) else ""
    fit = name.isprintable() and name.strip(". ") and len(name.encode("utf-8")) <= _MAX_PATH
    return f"/{name}" if fit else ""
