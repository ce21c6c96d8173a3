"""Tables of `backmix predict`, read back and checked against their record."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from backmix.pipeline.beton import printable
from backmix.train.decide.conformal import Floats
from backmix.train.decide.decision import COLUMNS
from backmix.train.decide.drift import Counts
from backmix.train.decide.record import Record
from backmix.train.decide.rows import AT_ONCE, ENDINGS

_SAME = 1e-9
"""Relative difference up to which thresholds are the same: spreadsheets keep 15 digits."""
_CHUNK = 1 << 16
"""Characters of a JSON list that are read at a time."""
_LARGEST_ROW = 1 << 24
"""Characters in which a row of a JSON list ends, or is damaged."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """All rows of some tables, in order; m of them have a score, the others are errors."""

    files: tuple[Path, ...]
    starts: Counts
    """int64: rows before those of each file."""
    names: list[str]
    """The image of every row, as its table has it."""
    rows: Counts
    """int64 [m]: which of all rows have a score, ascending."""
    predicted: Counts
    """int64 [m]: position in the record's class list."""
    scores: Floats
    """float64 [m], finite."""
    rejected: np.ndarray
    """bool [m]: as the table has it; not what the threshold says where --fdr decided."""
    errors: Mapping[int, str]
    """The reason of every other row, by its number among all rows."""

    def place(self, row: int) -> str:
        """Say where a row is: its number in its file, counted from 1, and the file."""
        file = int(np.searchsorted(self.starts, row, "right")) - 1
        return f"row {row - self.starts[file] + 1:,} of {self.files[file]}"


def read_predictions(files: Sequence[Path], record: Record) -> Predictions:
    """Read tables in csv, json, jsonl or parquet, in this order.

    Raises:
        ValueError: a file that is no such table, is damaged, is named twice or was made with
            another threshold; or no row has a score.
        OSError: a file that cannot be read.
    """
    if len({file.resolve() for file in files}) < len(files):
        raise ValueError("a table is named twice: its rows would count twice")
    places = {name: number for number, name in enumerate(record.classes)}
    thresholds = record.rule.thresholds
    names: list[str] = []
    errors: dict[int, str] = {}
    starts, rows, predicted, scores, rejected = [], [], [], [], []
    for file in files:
        starts.append(len(names))
        for number, values in enumerate(_checked(file), 1):
            name, class_, _, score, threshold, _, decision, reason = values
            if decision == "error":
                errors[len(names)] = str(reason or "no reason given")
            else:
                where = f"{file}, row {number:,}"
                if not isinstance(class_, str) or class_ not in places:
                    raise ValueError(
                        f"{where}: the class {printable(str(class_))!r} is none of the record's; "
                        "these rows are of another run"
                    )
                own, given = float(thresholds[places[class_]]), _number(threshold, where)
                if not math.isclose(own, given, rel_tol=_SAME):
                    raise ValueError(
                        f"{where} was decided with the threshold {given:g}, the record has "
                        f"{own:g}: watch these rows against the record that they were made with "
                        "(calibrating again keeps the one before as threshold.DATE.json)"
                    )
                rows.append(len(names))
                predicted.append(places[class_])
                scores.append(_number(score, where))
                rejected.append(decision == "reject")
            names.append(name)
    if not names:
        raise ValueError(f"there is no row in {', '.join(map(str, files))}: nothing to watch")
    if not rows:
        raise ValueError(
            f"all {len(names):,} rows are errors, there is no score to watch; the first: "
            f"{printable(names[0])}: {printable(errors[0])}"
        )
    return Predictions(
        tuple(files),
        np.array(starts, np.int64),
        names,
        np.array(rows, np.int64),
        np.array(predicted, np.int64),
        np.array(scores, np.float64),
        np.array(rejected, bool),
        errors,
    )


def _checked(file: Path) -> Iterator[tuple[Any, ...]]:
    """Yield the values of each row by `COLUMNS`; numbers may be text, and None may be empty."""
    ending = file.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{file}: tables of backmix predict end in {', '.join(ENDINGS)}")
    if not file.is_file():
        raise ValueError(f"{file} is no file: name tables of backmix predict")
    if not file.stat().st_size:
        raise ValueError(f"{file} is empty: not even a table without rows is")
    read = {".csv": _csv, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}[ending]
    for number, values in enumerate(read(file), 1):
        if not isinstance(values[0], str) or values[6] not in ("accept", "reject", "error"):
            raise ValueError(
                f"{file}, row {number:,}: a file and the decision accept, reject or error are "
                f"expected, not {printable(repr(values[0]))} and {printable(repr(values[6]))}"
            )
        yield values


def _csv(file: Path) -> Iterator[tuple[Any, ...]]:
    with open(file, encoding="utf-8-sig", newline="") as text:
        try:
            reader = csv.reader(text, strict=True)
            header = next(reader, [])
            places = _places(file, header)
            for number, row in enumerate(filter(None, reader), 1):  # some end in empty lines
                if len(row) != len(header):
                    raise ValueError(
                        f"{file}, row {number:,}, has {len(row)} columns, its first line "
                        f"{len(header)}: it is damaged"
                    )
                yield tuple(row[place] for place in places)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is damaged or no csv: {error}") from error


def _places(file: Path, header: Sequence[str]) -> list[int]:
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        semicolons = len(header) == 1 and header[0].count(";") >= len(COLUMNS) - 1
        hint = "; its columns are separated by semicolons, save it with commas" * semicolons
        raise ValueError(
            f"{file} is no table of backmix predict: it has no column {', '.join(missing)}{hint}"
        )
    return [header.index(name) for name in COLUMNS]


def _json(file: Path) -> Iterator[tuple[Any, ...]]:
    with open(file, encoding="utf-8-sig") as opened:
        text, number = _JsonText(opened), 0
        try:
            if not text.takes("["):
                raise ValueError(f"{file} is no table of backmix predict: no list of rows")
            ended = text.takes("]")
            while not ended:
                number += 1
                yield _values(file, number, text.value())
                ended = text.takes("]")
                if not ended and not text.takes(","):
                    raise json.JSONDecodeError("no comma and no ] behind it", "", 0)
            if not text.ends():
                raise json.JSONDecodeError("there is more behind the list", "", 0)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, row {number:,}, is damaged: {error.msg}") from error
        except (UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error


class _JsonText:
    """JSON that is read on as it is taken: a long list is never in memory as a whole."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._held = file, ""
        self._decode = json.JSONDecoder().raw_decode

    def takes(self, mark: str) -> bool:
        """Take the next character that is no space, if it is this one; return whether it was."""
        if found := not self.ends() and self._held[0] == mark:
            self._held = self._held[1:]
        return found

    def ends(self) -> bool:
        """Pass over spaces; return whether nothing follows."""
        while not (held := self._held.lstrip(" \t\r\n")):
            self._held = self._file.read(_CHUNK)
            if not self._held:
                return True
        self._held = held
        return False

    def value(self) -> Any:
        """Take the next value; json.JSONDecodeError where there is none, or too large a one."""
        self.ends()
        while True:
            try:
                value, end = self._decode(self._held)
            except json.JSONDecodeError:
                if len(self._held) > _LARGEST_ROW:
                    raise
                more = self._file.read(max(_CHUNK, len(self._held)))  # doubled: few attempts
                if not more:
                    raise
                self._held += more
            else:
                self._held = self._held[end:]
                return value


def _jsonl(file: Path) -> Iterator[tuple[Any, ...]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, row {number:,}, is damaged: {error}") from error
            yield _values(file, number, row)


def _values(file: Path, number: int, row: Any) -> tuple[Any, ...]:
    missing = [name for name in COLUMNS if name not in row] if isinstance(row, dict) else COLUMNS
    if missing:
        raise ValueError(
            f"{file} is no table of backmix predict: row {number:,} has no {', '.join(missing)}"
        )
    return tuple(row[name] for name in COLUMNS)


def _parquet(file: Path) -> Iterator[tuple[Any, ...]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{file} needs pyarrow: pip install 'backmix[parquet]'") from error
    with open(file, "rb") as data:
        try:
            with parquet.ParquetFile(data) as table:
                _places(file, table.schema_arrow.names)
                for batch in table.iter_batches(AT_ONCE, columns=list(COLUMNS)):
                    columns = (batch.column(name).to_pylist() for name in COLUMNS)
                    yield from zip(*columns, strict=True)
        # KeyError: two columns of one name; OSError: damage inside, in words that name no file.
        except (pyarrow.ArrowException, KeyError, OSError) as error:
            raise ValueError(f"{file} is damaged or no parquet: {error}") from error


def _number(value: Any, where: str) -> float:
    """Return a score or threshold."""
    try:
        number = float(value) if isinstance(value, str | float | int) else math.nan
    except (ValueError, OverflowError):  # the latter of whole numbers of 309 digits or more
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{where}: a score and a threshold are expected, not {printable(repr(value))}; the "
            "file is damaged, or not of backmix predict"
        )
    return number
