"""Rows of decisions as csv, json, jsonl or parquet; written once, from a stream, whole or not.

Numbers are written so that reading them gives the same ones, bit for bit.
"""

import codecs
import csv
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from backmix.train.checkpoint import sync_folder
from backmix.train.decide.decision import COLUMNS

Row = Mapping[str, Any]
"""Values by `COLUMNS`: text, numbers, and None where there is none."""
ENDINGS = (".csv", ".json", ".jsonl", ".parquet")
AT_ONCE = 65_536
"""Rows of a row group of parquet."""


def refuse_out(out: Path, run: Path) -> None:
    """Refuse a file that cannot be written, or that lies in the run folder, before any work.

    Raises:
        ValueError: what is wrong, and what to do.
    """
    if out.suffix.lower() not in ENDINGS:
        raise ValueError(f"-o {out}: name a file that ends in {', '.join(ENDINGS)}")
    if out.is_dir():
        raise ValueError(f"-o {out} is a folder: name a file")
    if not out.parent.is_dir():
        raise ValueError(f"-o {out}: there is no folder {out.parent}")
    if out.parent.resolve() == run.resolve():
        raise ValueError(f"-o {out}: the files in a run folder are its own; choose another place")
    if out.suffix.lower() == ".parquet" and not importlib.util.find_spec("pyarrow"):
        raise ValueError(
            f"-o {out} needs pyarrow: pip install 'backmix[parquet]', or write .csv or .jsonl"
        )


def as_line(row: Row) -> str:
    """Return a row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def write_rows(out: Path, rows: Iterable[Row]) -> None:
    """Write rows in the format that the file's name ends in; it gets its name when it is whole.

    Raises:
        OSError: naming the file; nothing is left behind.
    """
    write = {".csv": _csv, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}
    with _whole(out) as file:
        write[out.suffix.lower()](file, rows)


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Give a file that takes the place of `path` at the end, in one step, and is on the disk."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with suppress(OSError):  # the folder may be gone
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            why = error.strerror or error
            raise OSError(error.errno, f"cannot write {path}: {why}") from error
        raise
    sync_folder(path.parent)


def _csv(file: BinaryIO, rows: Iterable[Row]) -> None:
    """RFC 4180, but for line ends, which are single newlines; None is empty."""
    writer = csv.writer(codecs.getwriter("utf-8")(file), lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(row.values() for row in rows)


def _json(file: BinaryIO, rows: Iterable[Row]) -> None:
    file.write(b"[")
    before = b"\n"
    for row in rows:
        file.write(before + as_line(row).removesuffix("\n").encode())
        before = b",\n"
    file.write(b"\n]\n")


def _jsonl(file: BinaryIO, rows: Iterable[Row]) -> None:
    file.writelines(as_line(row).encode() for row in rows)


def _parquet(file: BinaryIO, rows: Iterable[Row]) -> None:
    import pyarrow
    from pyarrow import parquet

    numbers = ("probability", "score", "threshold", "p_value")
    fields = [
        (name, pyarrow.float64() if name in numbers else pyarrow.string()) for name in COLUMNS
    ]
    schema = pyarrow.schema(fields)
    left = iter(rows)
    with parquet.ParquetWriter(file, schema) as writer:
        while group := list(islice(left, AT_ONCE)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))
