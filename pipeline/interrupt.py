"""Signals that end a piece of work at once, whatever the process does with them otherwise."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupted_by(*numbers: int) -> Iterator[None]:
    """Let signals unwind a block by KeyboardInterrupt, where it runs in the main thread.

    Args:
        numbers: the signals; afterwards they are handled as before. One that is ignored stays so.
    """
    before = {}

    def interrupt(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise KeyboardInterrupt(f"terminated by {signal.Signals(number).name}")

    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: it was not Python that installed it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
