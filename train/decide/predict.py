"""Decide about images: sources in, one row an image out, in order, whatever happens meanwhile.

An image that cannot be read is a row with the reason. Batches lie at fixed places of the list, and
their rows go to a journal (`journal.py`) as soon as they are there; killed and continued, a
prediction ends with the same bytes. Nothing grows with the number of images but their names and,
with --fdr, their p-values.
"""

import signal
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from backmix.pipeline.beton import printable
from backmix.pipeline.images import MAX_PIXELS
from backmix.pipeline.loader import MOST_THREADS
from backmix.train.decide.conformal import Floats, benjamini_hochberg
from backmix.train.decide.decider import Decider, open_decider
from backmix.train.decide.decision import among_rejected, decisions, failed
from backmix.train.decide.journal import Journal
from backmix.train.decide.options import PredictOptions
from backmix.train.decide.portions import Reader, batch_ends, portions
from backmix.train.decide.record import Record, record_digest
from backmix.train.decide.rows import Row, refuse_out, write_rows
from backmix.train.decide.sources import Images, find_images
from backmix.train.decide.summary import Summary, discoveries, expectation
from backmix.train.memory import keep_freed_memory
from backmix.train.pace import Pace
from backmix.train.stop import StopAsked


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
    refuse_out(out, source)
    decider = open_decider(source, options)
    keep_freed_memory(decider.scorer.device)
    with find_images(sources, stdin) as images:
        belongs = {
            "record": record_digest(decider.record),
            "images": images.digest(),
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
    reader = Reader(decider.record.preprocessing, decider.scorer.device, options, pace)
    for portion in pace.arriving(portions(images, begun, reader)):
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


def _finish(journal: Journal, out: Path, record: Record, fdr: float | None) -> Summary:
    """Write all rows to their file, and count them."""
    summary, final = Summary(out, expected=expectation(record)), None
    if fdr is not None:
        p_values = np.array(array("d", (_p_value(row) for row in journal.read())))
        final = _by_false_discoveries(p_values, fdr)
        summary.expected = discoveries(p_values, fdr, record)

    def rows() -> Iterator[Row]:
        for row in map(final, journal.read()) if final else journal.read():
            summary.count(row)
            yield row

    write_rows(out, rows())
    return summary


def _by_false_discoveries(p_values: Floats, share: float) -> Callable[[Row], Row]:
    """Return what decides anew about each row, by the p-values of all, float64 [n], NaN = none."""
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
