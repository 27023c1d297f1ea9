"""What a run tells: metrics in files, and one live line in the terminal."""

import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, SupportsFloat, TextIO

from tqdm import tqdm

from agent.errors import UserError, writing

RATE_WINDOW = 30.0
"""Seconds over which rates are measured."""
PLAIN_LINE_EVERY = 30.0
"""Seconds between two lines where stderr is not a terminal."""


class MetricsLogger:
    """Writes metrics to `logdir/metrics.jsonl` and, on request, as TensorBoard events.

    Args:
        logdir: folder of the run; made if missing.
        tensorboard: whether to write TensorBoard events too.
        start_step: environment frames at which the run starts or resumes; TensorBoard drops what came later.

    Raises:
        UserError: TensorBoard is wanted and not installed, or the files cannot be written, now or later.
    """

    def __init__(self, logdir: Path, tensorboard: bool, start_step: int = 0) -> None:
        self._path = logdir / "metrics.jsonl"
        with writing(self._path):
            # Metrics of `start_step` itself were written before the checkpoint: only what follows is dropped.
            self._events: Any = tensorboard_writer()(str(logdir), purge_step=start_step + 1) if tensorboard else None
            logdir.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """One line: `step` in environment frames, then the metrics. JSON has no NaN, so that one is "nan"."""
        values = {name: float(value) for name, value in metrics.items()}
        line = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        left = json.dumps({"step": step} | line).encode() + b"\n"
        with writing(self._path):
            while left:  # a disk that is nearly full takes a part, and refuses the rest
                left = left[self._file.write(left) :]
            if self._events is not None:
                for name, value in values.items():
                    self._events.add_scalar(name, value, step)

    def image(self, step: int, name: str, encoded: bytes, size: tuple[int, int]) -> None:
        """A picture for TensorBoard, if events are written: a PNG or GIF file of height and width `size`."""
        if self._events is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width = size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
        with writing(self._path):
            self._events.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def position(self) -> int:
        """Length of metrics.jsonl in bytes, all of which is on disk; a checkpoint keeps it."""
        with writing(self._path):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def truncate(self, position: int) -> None:
        """Drop the lines after `position`, which the resumed run writes again."""
        self._file.truncate(min(position, self.position()))  # a longer file would be filled with zeros
        self._file.seek(0, 2)

    def close(self) -> None:
        """Flush and close all files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


class NoLogger(MetricsLogger):
    """That of a rank which leaves logging to the first one."""

    def __init__(self) -> None:
        """Nothing is opened."""

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Nothing is written."""

    def position(self) -> int:
        """Nothing was written."""
        return 0

    def truncate(self, position: int) -> None:
        """Nothing is there."""

    def close(self) -> None:
        """Nothing is open."""


def tensorboard_writer() -> Any:
    """The class that writes TensorBoard events; UserError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "tensorboard is not installed: pip install tensorboard, or --set log.tensorboard=false"
        ) from None
    return SummaryWriter


class LiveLine:
    """One line in the terminal that says how far training is; without a terminal, a plain line at times.

    Args:
        total: length of training in environment frames.
        frames: frames done so far.
        device: "cpu" or "cuda": whose memory is shown.
        stream: where the line is written; None is stderr.
        clock: seconds since some moment.
    """

    def __init__(
        self,
        total: int,
        frames: int,
        device: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._device = device
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._history: deque[tuple[float, int, int]] = deque()
        self._episode_return = math.nan
        self._last_plain = -math.inf
        self._bar: Any = None
        if self._stream.isatty():
            layout = "{percentage:3.0f}% |{bar:20}| {desc}"
            self._bar = tqdm(total=total, initial=frames, file=self._stream, bar_format=layout, dynamic_ncols=True)

    def update(self, frames: int, updates: int, episode_return: float | None = None) -> None:
        """Show the state of training.

        Args:
            frames: environment frames done, of all.
            updates: updates done, of all.
            episode_return: return of an episode that has just ended.
        """
        now = self._clock()
        self._history.append((now, frames, updates))
        while len(self._history) > 2 and self._history[1][0] <= now - RATE_WINDOW:
            self._history.popleft()
        if episode_return is not None:
            self._episode_return = episode_return
        if self._bar is not None:
            self._bar.set_description_str(self.text(), refresh=False)
            self._bar.update(frames - self._bar.n)
        elif now - self._last_plain >= PLAIN_LINE_EVERY:
            self._print_plain()

    def text(self) -> str:
        """The line, without the bar."""
        if not self._history:
            return ""
        (start, first_frames, first_updates), (now, frames, updates) = self._history[0], self._history[-1]
        seconds = now - start
        frame_rate = (frames - first_frames) / seconds if seconds > 0 else 0.0
        update_rate = (updates - first_updates) / seconds if seconds > 0 else 0.0
        left = tqdm.format_interval(max(0, self._total - frames) / frame_rate) if frame_rate > 0 else "?"
        parts = [
            f"{frames:,}/{self._total:,} frames",
            f"ETA {left}",
            f"return {self._episode_return:.1f}" if not math.isnan(self._episode_return) else "return -",
            f"{update_rate:.3g} updates/s",
            f"{frame_rate:.3g} frames/s",
            f"{memory(self._device) / 2**30:.1f} GiB",
        ]
        return ", ".join(parts)

    def forget_rates(self) -> None:
        """Count rates from now on: what came before, such as compiling, says nothing of what is left."""
        self._history.clear()

    def note(self, line: str) -> None:
        """Print a line of its own without breaking the live one."""
        if self._bar is not None:
            tqdm.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last state standing."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
        elif self._history and self._last_plain < self._history[-1][0]:
            self._print_plain()

    def _print_plain(self) -> None:
        self._last_plain = self._history[-1][0]
        print(self.text(), file=self._stream, flush=True)


def memory(device: str) -> int:
    """Bytes in use now: on "cuda" what torch has reserved there, else resident memory of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_reserved()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        # No /proc: the peak is the best there is, in bytes on macOS and in KiB elsewhere.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
