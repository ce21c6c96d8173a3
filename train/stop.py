"""Signals that ask a run to stop."""

import signal
import threading
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks a run to stop: SIGUSR1, too, which schedulers send some time before the end."""


class StopAsked:
    """Whether SIGTERM, SIGUSR1 or Ctrl-C asked to stop, looked at between steps.

    A second Ctrl-C is obeyed at once.
    """

    def __init__(self) -> None:
        """Install the handlers, where this is the main thread."""
        self.signal = 0
        self.before: dict[int, object] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self.before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __bool__(self) -> bool:
        return bool(self.signal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
