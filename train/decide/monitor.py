"""`backmix monitor`: is the rejection rate of a calibrated threshold still what was promised?

Tables of `backmix predict` in, words and one self-contained page out: `watched.py` tests,
`verdict.py` says what it comes to, `monitor_page.py` draws it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from backmix.train.decide.monitor_page import page_values
from backmix.train.decide.options import MonitorOptions
from backmix.train.decide.predicted import read_predictions
from backmix.train.decide.record import read_record
from backmix.train.decide.verdict import text_of, verdict_on
from backmix.train.decide.watched import refuse, watch
from backmix.train.page import check_page, write_page


def monitor(
    files: Sequence[Path],
    options: MonitorOptions,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[str, bool]:
    """Watch predictions and write the page.

    Args:
        files: tables of `backmix predict`, in the order in which they came about.
        options: against which record, and how.
        say: called with a line of progress now and then.

    Returns the text for the terminal, and whether to calibrate again.

    Raises:
        ValueError: what is wrong with the options, the record or the tables, and what to do.
        OSError: what cannot be read or written.
    """
    refuse(options)
    check_page(options.out, "page")
    record = read_record(options.against)
    say("reading the tables")
    watched = watch(record, read_predictions(files, record), options)
    verdict = verdict_on(watched, options.against)
    write_page(options.out, "decide/monitor.html.j2", page_values(watched, verdict, options, say))
    return text_of(watched, verdict, options.out), verdict.changed
