"""Decide about images: sources in, one row an image out, in order, whatever happens meanwhile.

An image that cannot be read is a row with the reason. Batches lie at fixed places of the list, and
their rows go to a journal (`journal.py`) as soon as they are there; killed and continued, a
prediction ends with the same bytes. Nothing grows with the number of images but their names and,
with --fdr, their p-values.
"""

import re
import signal
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from backmix.pipeline.batch import Place
from backmix.pipeline.beton import BetonSet, printable
from backmix.pipeline.decode import read_image
from backmix.pipeline.folder_images import Shown, read_views, usual_view
from backmix.pipeline.images import MAX_PIXELS, check_size
from backmix.pipeline.loader import MOST_THREADS
from backmix.pipeline.options import LoaderOptions, usable_cores
from backmix.pipeline.plan import Plan
from backmix.pipeline.sources.source import Items
from backmix.pipeline.subset import Subset
from backmix.pipeline.turbo import Turbo
from backmix.pipeline.views import to_device
from backmix.train.decide.conformal import benjamini_hochberg
from backmix.train.decide.decider import Decider, open_decider
from backmix.train.decide.decision import among_rejected, decisions, failed
from backmix.train.decide.journal import Journal
from backmix.train.decide.options import PredictOptions
from backmix.train.decide.record import Preprocessing, Record, record_digest
from backmix.train.decide.rows import Row, refuse_out, write_rows
from backmix.train.decide.sources import Files, Images, Stored, find_images
from backmix.train.pace import Pace
from backmix.train.stop import StopAsked

STOPPED = 75
"""Exit code of a prediction that a signal stopped, and that the same command continues."""
KINDS = 1000
"""Kinds of errors that are counted apart."""
_SHOWN = 8
_NUMBER = re.compile(r"\d[\d,.]*")


@dataclass
class Errors:
    """Images of one kind of error."""

    reason: str
    """Of the first of them."""
    count: int = 0
    files: list[str] = field(default_factory=list)
    """The first three."""


@dataclass
class Summary:
    """What a prediction comes to."""

    out: Path
    images: int = 0
    """Decided about, those that could not be read among them."""
    accepted: int = 0
    rejected: int = 0
    errors: dict[str, Errors] = field(default_factory=dict)
    """By kind: the reason without its numbers."""
    expected: str = ""
    """How many known images are rejected: a sentence."""
    stopped: str = ""
    """What stopped it, and how it goes on; empty where it is finished."""

    @property
    def unread(self) -> int:
        """Images that could not be read."""
        return self.images - self.accepted - self.rejected

    @property
    def exit_code(self) -> int:
        """Of the command: 0, or `STOPPED`."""
        return STOPPED if self.stopped else 0

    def count(self, row: Row) -> None:
        """Add a row."""
        self.images += 1
        self.accepted += row["decision"] == "accept"
        self.rejected += row["decision"] == "reject"
        if row["decision"] == "error":
            kind = _NUMBER.sub("0", row["reason"])
            if kind not in self.errors and len(self.errors) >= KINDS:
                kind = "other reasons"
            errors = self.errors.setdefault(kind, Errors(row["reason"]))
            errors.count += 1
            if len(errors.files) < 3:
                errors.files.append(row["file"])

    def __str__(self) -> str:
        """Return it as lines for a terminal."""
        if self.stopped:
            return self.stopped
        decided = max(self.accepted + self.rejected, 1)
        lines = [
            f"{self.images:,} images: {self.accepted:,} accepted, {self.rejected:,} rejected "
            f"({100 * self.rejected / decided:.1f} %)"
            + (f", {self.unread:,} could not be read" if self.unread else "")
        ]
        kinds = sorted(self.errors.values(), key=lambda errors: -errors.count)
        for errors in kinds[:_SHOWN]:
            names = ", ".join(errors.files) + (", ..." if errors.count > len(errors.files) else "")
            lines.append(f"  {errors.count:,}: {printable(f'{errors.reason} ({names})')}")
        if rest := kinds[_SHOWN:]:
            count = sum(errors.count for errors in rest)
            lines.append(f"  {count:,} for {len(rest):,} further reasons, see the column reason")
        return "\n".join([*lines, self.expected, f"wrote {self.out}"])


def predict(
    source: Path,
    sources: Sequence[str],
    out: Path,
    options: PredictOptions,
    *,
    stdin: BinaryIO | None = None,
    say: Callable[[str], None] = lambda text: None,
    tell: Callable[[str], None] = lambda text: None,
) -> Summary:
    """Decide about all images of the sources, and write a row for each, in order.

    What a call with the same arguments has left unfinished is continued. SIGTERM, SIGUSR1 and
    Ctrl-C end it after the batch in hand.

    Args:
        source: run folder with a threshold, or an exported file.
        sources: images, folders, tars, .beton files, `-`: see `find_images`.
        out: .csv, .json, .jsonl or .parquet; one that is there is replaced at the end.
        options: how to go about it.
        stdin: what `-` reads.
        say: called with a line of progress now and then.
        tell: called with a line on how fast it was.

    Raises:
        ValueError: what is wrong with the arguments, before any work; or not one image could be
            read, after all rows were written.
        OSError: what cannot be read or written.
        KeyboardInterrupt: stopped before there was anything to continue.
    """
    _refuse(options)
    refuse_out(out)
    with find_images(sources, stdin) as images:
        decider = open_decider(source, options)
        belongs = {
            "record": record_digest(decider.record),
            "images": images.digest,
            "batch": options.batch,
            "limit_pixels": options.limit_pixels,
        }
        ends = batch_ends(images, options)
        with Journal(out, belongs, ends, images.text) as journal:
            if journal.rows:
                tell(f"{out}: {journal.rows:,} of {len(images):,} images are done, going on")
            with StopAsked() as stop:
                _decide(decider, images, options, journal, stop, say, tell)
                if stop and journal.rows < len(images):
                    return _stopped(journal, images, out, stop)
            say(f"writing {out}")
            summary = _finish(journal, out, decider.record, options.fdr)
            journal.remove()
    if not summary.accepted + summary.rejected:
        first = next(iter(summary.errors.values()))
        raise ValueError(
            f"not one of {summary.images:,} images could be decided about; the first is "
            f"{printable(f'{first.files[0]}: {first.reason}')} ({out} has a row for each)"
        )
    return summary


def _refuse(options: PredictOptions) -> None:
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}")
    if not 0 <= options.threads <= MOST_THREADS:
        raise ValueError(f"--threads must be 0 to {MOST_THREADS}, got {options.threads}")
    if not 1 <= options.limit_pixels <= MAX_PIXELS:
        raise ValueError(
            f"--limit-pixels must be 1 to {MAX_PIXELS:,}, got {options.limit_pixels:,}"
        )
    if options.fdr is not None and not 0 < options.fdr < 1:
        raise ValueError(f"--fdr must lie between 0 and 1, both excluded, got {options.fdr:g}")


def _stopped(journal: Journal, images: Images, out: Path, stop: StopAsked) -> Summary:
    name = signal.Signals(stop.signal).name
    if not journal.rows:
        raise KeyboardInterrupt(f"stopped by {name} before anything was done")
    journal.sync()
    return Summary(
        out,
        journal.rows,
        stopped=(
            f"stopped by {name}: {journal.rows:,} of {len(images):,} images are done and kept in "
            f"{journal.path}; the same command goes on"
        ),
    )


def _decide(
    decider: Decider,
    images: Images,
    options: PredictOptions,
    journal: Journal,
    stop: StopAsked,
    say: Callable[[str], None],
    tell: Callable[[str], None],
) -> None:
    """Decide about the images whose rows are not in the journal yet."""
    pace, begun = Pace("predict"), journal.rows
    seen = decider.record.preprocessing
    for portion in pace.arriving(
        portions(images, begun, seen, decider.scorer.device, options, pace)
    ):
        began = time.perf_counter()
        found = {number: failed(reason) for number, reason in portion.problems.items()}
        if portion.views is not None:
            decided = decisions(decider.decide(portion.views), decider.record.classes)
            found |= zip(portion.numbers.tolist(), decided, strict=True)
        pace.computing += time.perf_counter() - began
        journal.append([found[number].row(images.text(number)) for number in portion.range])
        say(_progress(journal.rows, len(images), pace))
        if stop:
            return
    pace.end()
    if pace.images:
        tell(str(pace))


def _progress(done: int, total: int, pace: Pace) -> str:
    rate = pace.images / max(time.perf_counter() - pace.began, 1e-9)
    left = (total - done) / max(rate, 1e-9)
    hours, seconds = divmod(round(left), 3600)
    clock = f"{hours}:{seconds // 60:02}:{seconds % 60:02}"
    return f"{done:,} of {total:,} images, {rate:,.0f} a second, {clock} left"


@dataclass(frozen=True, eq=False)
class Portion:
    """Neighbouring images of the list, those of one batch."""

    first: int
    """Number of the first one."""
    count: int
    views: Tensor | None
    """Of those that can be read, uint8 [n, S, S, 3] on the device; None where there are none."""
    numbers: np.ndarray
    """int64 [n]: which ones."""
    problems: Mapping[int, str]
    """What is wrong with the others, by number."""

    def __len__(self) -> int:
        return self.count

    @property
    def range(self) -> range:
        """Return the numbers of all its images."""
        return range(self.first, self.first + self.count)


def batch_ends(images: Images, options: PredictOptions) -> np.ndarray:
    """Return the number of images up to the end of each batch, int64 ascending."""
    return np.concatenate(
        [
            start + _ends(part, options)
            for part, start in zip(images.parts, images.starts, strict=True)
        ]
    )


def _ends(part: Files | Stored, options: PredictOptions) -> np.ndarray:
    n, batch = len(part), options.batch
    if isinstance(part, Stored):
        small = _small(part.data, options.limit_pixels)
        if len(small):  # batches of the loader, and whatever it leaves out before and in them
            return np.append(small[batch::batch], n)
    return np.append(np.arange(batch, n, batch), n)


def _small(data: BetonSet, limit: int) -> np.ndarray:
    """Return the samples of at most so many pixels, int64, ascending."""
    return np.flatnonzero(data.sizes.astype(np.int64).prod(1) <= limit)


def portions(
    images: Images,
    begin: int,
    seen: Preprocessing,
    device: torch.device,
    options: PredictOptions,
    pace: Pace,
) -> Iterator[Portion]:
    """Read the images, batch by batch.

    Args:
        images: all of them.
        begin: number of the first one to read: 0, or the end of a batch.
        seen: how the network sees them.
        device: where their views go.
        options: batch, threads and limit.
        pace: is told how long the threads were at work.
    """
    pace.threads = options.threads or usable_cores()
    for part, start in zip(images.parts, images.starts, strict=True):
        done = max(0, begin - start)
        if done >= len(part):
            continue
        if isinstance(part, Files):
            yield from _of_files(part, start, done, seen, device, options, pace)
        else:
            yield from _of_stored(part, start, done, seen, device, options, pace)


def _of_files(
    part: Files,
    start: int,
    done: int,
    seen: Preprocessing,
    device: torch.device,
    options: PredictOptions,
    pace: Pace,
) -> Iterator[Portion]:
    def show(pixels: np.ndarray) -> Shown:
        return usual_view(pixels, seen.size, seen.crop, seen.eval_crop)

    rest = Items(len(part) - done, lambda i: part.items[done + i])
    for read in read_views(
        rest, show, batch=options.batch, threads=options.threads, limit=options.limit_pixels
    ):
        pace.decoding += sum(image.seconds for image in read)
        good = [image for image in read if not image.problem]
        before = start + done
        yield Portion(
            before + read[0].number,
            len(read),
            to_device(np.stack([image.view for image in good]), device) if good else None,
            np.array([before + image.number for image in good], np.int64),
            {before + image.number: image.problem for image in read if image.problem},
        )


def _of_stored(
    part: Stored,
    start: int,
    done: int,
    seen: Preprocessing,
    device: torch.device,
    options: PredictOptions,
    pace: Pace,
) -> Iterator[Portion]:
    data = part.data
    small = _small(data, options.limit_pixels)
    ends = _ends(part, options)
    taken = int(np.searchsorted(ends, done, "right"))  # batches that are done
    firsts = np.append(0, ends[:-1])[taken:].tolist()

    def portion(first: int, end: int, good: np.ndarray, views: Tensor | None) -> Portion:
        bad = np.setdiff1d(np.arange(first, end), good).tolist()
        return Portion(
            start + first,
            end - first,
            views,
            start + good,
            {start + i: _wrong(data, i, options.limit_pixels) for i in bad},
        )

    if not len(small):
        for first, end in zip(firsts, ends[taken:].tolist(), strict=True):
            yield portion(first, end, small, None)
        return
    chosen = LoaderOptions(
        loader="turbo",
        batch=options.batch,
        size=seen.size,
        crop=seen.crop,  # pyright: ignore[reportArgumentType]
        eval_crop=seen.eval_crop,
        threads=options.threads,
    )
    subset = Subset(small, np.full(len(small), -1, np.int64))
    engine = Turbo(Plan(data, subset, chosen, training=False), device)
    try:
        place = Place(seed=0, consumed=taken * options.batch)
        steps = zip(firsts, ends[taken:].tolist(), engine.batches(place), strict=True)
        for first, end, batch in steps:
            views = batch.pool if len(batch) else None
            yield portion(first, end, batch.host.index, views)
        pace.decoding += engine.decoding
    finally:
        engine.close()


def _wrong(data: BetonSet, i: int, limit: int) -> str:
    """Return what is wrong with a sample that was left out: by looking at it once more."""
    try:
        height, width = data.sizes[i].tolist()
        check_size(height, width, limit)
        read_image(data, i)
    except ValueError as error:
        return str(error).removeprefix(data.where(i)).strip()
    return "it could not be read, but can be now"


def _finish(journal: Journal, out: Path, record: Record, fdr: float | None) -> Summary:
    """Write all rows to their file, and count them."""
    summary = Summary(out, expected=expectation(record))
    final = None if fdr is None else _by_false_discoveries(journal, fdr)
    if fdr is not None:
        summary.expected = (
            f"of the rejected images {100 * fdr:g} % at most are expected to be known "
            "(Benjamini-Hochberg over all images of this call)"
        )

    def rows() -> Iterator[Row]:
        for row in map(final, journal.read()) if final else journal.read():
            summary.count(row)
            yield row

    write_rows(out, rows())
    return summary


def _by_false_discoveries(journal: Journal, share: float) -> Callable[[Row], Row]:
    """Return what decides anew about each row, by the p-values of all."""
    p_values = np.array(array("d", (_p_value(row) for row in journal.read())))
    chosen = p_values[benjamini_hochberg(p_values, share)]
    limit = float(chosen.max(initial=0.0))

    def final(row: Row) -> Row:
        p = row["p_value"]
        if p is None:
            return row
        if p > limit:
            return {**row, "decision": "accept", "reason": ""}
        return {**row, "decision": "reject", "reason": among_rejected(p, limit, share)}

    return final


def _p_value(row: Row) -> float:
    return float("nan") if row["p_value"] is None else row["p_value"]


def expectation(record: Record) -> str:
    """Say how many known images are rejected by a record's thresholds.

    A sentence such as "of known images 5 % are expected to be rejected (95 % interval 3.7 to 6.4 %;
    1,000 calibration images)".
    """
    parts = record.rule.categories
    rates = [100 * part.mean_rate for part in parts]
    facts = [f"{sum(part.n for part in parts):,} calibration images"]
    if record.confidence is not None:
        rate = 100 * float(record.rate)
        facts.insert(0, f"at most {rate:g} % with confidence {record.confidence:g}")
    if len(parts) == 1:
        low, high = (100 * end for end in parts[0].interval)
        share = f"{rates[0]:.2g} %"
        facts.insert(0, f"95 % interval {low:.2g} to {high:.2g} %")
    else:
        share = f"{min(rates):.2g} to {max(rates):.2g} %, by predicted class,"
    return f"of known images {share} are expected to be rejected ({'; '.join(facts)})"
