"""How a signal ends a run: after the step it is in, with everything saved."""

import signal
from types import FrameType
from typing import Any, Protocol

from agent.logging import LiveLine


class Stoppable(Protocol):
    """What can be asked to stop: it looks at `stop_signal` after each step."""

    stop_signal: int | None
    line: LiveLine


class SignalsHeld:
    """While it is open, SIGINT and SIGTERM ask the run to stop after its present step; a second one ends it at once."""

    def __init__(self, run: Stoppable):
        self.run = run
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._ask)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.run.stop_signal = number
        self.run.line.note(f"{signal.Signals(number).name}: saving after this step; again to stop at once")
        signal.signal(number, self.before[number])
