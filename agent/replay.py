"""Replay: endless streams of rows on one device, sampled as windows, and the latents stored beside them."""

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from agent.errors import UserError

Spec = tuple[tuple[int, ...], torch.dtype]


def storage_bytes(specs: Mapping[str, Spec], streams: int, capacity: int) -> int:
    """Bytes that a Replay of these keys (rows and latents together) takes, known before it is allocated."""
    per_row = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in specs.values())
    return per_row * streams * (capacity // streams)


def choose_device(setting: Literal["auto", "cpu", "cuda"], nbytes: int, model_device: torch.device) -> torch.device:
    """Where the replay lives; `auto` takes the agent's GPU if `nbytes` fit in half of its free memory.

    Raises UserError for `cuda` when the agent itself is not on a GPU.
    """
    if setting == "cuda" and model_device.type != "cuda":
        raise UserError(
            f"replay.device: cuda, but the agent is on {model_device.type}; set replay.device to auto or cpu"
        )
    if setting == "cpu" or model_device.type != "cuda":
        return torch.device("cpu")
    if setting == "cuda" or nbytes <= torch.cuda.mem_get_info(model_device)[0] // 2:
        return model_device
    return torch.device("cpu")


class Replay:
    """The last `capacity` agent steps of `streams` environments.

    A row is a transition and the latents the agent had at it. Rows of a stream are numbered from 0 for
    ever; row `position` lies in slot `position % length` of tensors (streams, length, ...), length =
    capacity // streams. One add() writes a row of every stream, so all streams hold the same positions.

    A window is `window` successive rows of one stream: one context row, whose latents start the sequence
    and whose action is the first previous action, and `window - 1` training rows. Windows cross episode
    borders; `is_first` inside them says where. With `online_queue` every window that starts at a
    multiple of `window` is served once, soon after it was collected; uniform samples fill the batch.

    gather() and write_back() have static shapes and never wait for the device, and load_state_dict()
    fills the tensors in place, so a CUDA graph that reads them stays valid. An index from sample() holds
    until the next add(): afterwards its oldest rows may have been overwritten.

    Source: data path of DreamerV3 (Hafner et al., 2025): context row, latent write-back, online queue.
    """

    def __init__(
        self,
        rows: Mapping[str, Spec],
        latents: Mapping[str, Spec],
        *,
        streams: int,
        capacity: int,
        window: int,
        device: torch.device,
        seed: int,
        online_queue: bool,
    ) -> None:
        """Allocates everything at once, so that memory runs out now or never.

        rows, latents: key -> (shape of one row, dtype); the keys differ, rows hold bool `is_first` and
        `is_last`.
        capacity: agent steps over all streams. Raises UserError if it is too small for one window or too
        large for the device.
        """
        if rows.keys() & latents.keys():
            raise ValueError(f"keys in both rows and latents: {sorted(rows.keys() & latents.keys())}")
        self.streams, self.window, self.device = streams, window, device
        self.length = capacity // streams
        if self.length < window:
            raise UserError(
                f"replay.capacity: {capacity} steps over {streams} environments keep {self.length} rows of"
                f" each, but a sequence needs {window}; set it to at least {streams * window}"
            )
        try:
            self._rows = {key: self._allocate(spec) for key, spec in rows.items()}
            self._latents = {key: self._allocate(spec) for key, spec in latents.items()}
        except RuntimeError as error:  # how both allocators, CPU and CUDA, report a lack of memory
            needed = storage_bytes({**rows, **latents}, streams, capacity) / 1e9
            raise UserError(
                f"replay.capacity: {capacity} steps need {needed:.2f} GB, more than {device} has free;"
                " lower it or set replay.device"
            ) from error
        self._offsets = torch.arange(window, device=device)
        self._oldest = 0  # first position still held
        self._next = 0  # position of the row that comes next
        self._online_queue = online_queue
        self._queue: deque[tuple[int, int]] = deque()  # (stream, start), oldest start first
        self._random = np.random.Generator(np.random.PCG64(seed))

    def _allocate(self, spec: Spec) -> Tensor:
        shape, dtype = spec
        return torch.zeros((self.streams, self.length, *shape), dtype=dtype, device=self.device)

    def __len__(self) -> int:
        """Rows held, over all streams."""
        return self.streams * (self._next - self._oldest)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {**self._rows, **self._latents}

    @torch.no_grad()
    def add(self, row: Mapping[str, Tensor]) -> None:
        """Appends one row of every stream: rows and latents together, each (N, ...), on any device.

        Values are cast to the stored dtype. Copies to a GPU are not waited for: a pinned source must
        stay as it is until the device has read it. Raises ValueError if keys or shapes are not the
        declared ones.
        """
        tensors = self._tensors()
        if row.keys() != tensors.keys():
            raise ValueError(f"row has keys {sorted(row)}, replay stores {sorted(tensors)}")
        for key, stored in tensors.items():
            if row[key].shape != stored[:, 0].shape:  # copy_ would broadcast
                raise ValueError(f"{key}: shape {tuple(row[key].shape)}, not {tuple(stored[:, 0].shape)}")
        slot = self._next % self.length
        for key, stored in tensors.items():
            stored[:, slot].copy_(row[key], non_blocking=self.device.type == "cuda")
        self._next += 1
        self._oldest = max(self._oldest, self._next - self.length)
        if self._online_queue and self._next % self.window == 0:
            start = self._next - self.window
            self._queue.extend((stream, start) for stream in range(self.streams))
        while self._queue and self._queue[0][1] < self._oldest:
            self._queue.popleft()

    def ready(self, prefill: int) -> bool:
        """Whether `prefill` rows and at least one window are held, so that sample() may be called.

        Raises UserError if so many rows never fit.
        """
        if prefill > self.streams * self.length:
            raise UserError(
                f"replay.prefill: {prefill} rows, but replay keeps {self.streams * self.length};"
                " lower it or raise replay.capacity"
            )
        return len(self) >= prefill and self._next - self._oldest >= self.window

    def sample(self, batch: int) -> Tensor:
        """Chooses `batch` windows: int64 (2, B) on the host, row 0 the stream, row 1 the start.

        Waiting windows of the online queue come first, then uniform draws over all windows held.
        """
        queued = [self._queue.popleft() for _ in range(min(batch, len(self._queue)))]
        online = np.array(queued, dtype=np.int64).reshape(-1, 2).T
        amount = batch - len(queued)
        streams = self._random.integers(self.streams, size=amount)
        starts = self._random.integers(self._oldest, self._next - self.window + 1, size=amount)
        return torch.from_numpy(np.concatenate([online, np.stack([streams, starts])], axis=1))

    def gather(self, index: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies windows out: index int64 (2, B) on the device -> rows (B, window, ...), latents (B, ...).

        The latents are those of the context row. Where a stream was cut (a run that was stopped and
        resumed), a row before an `is_first` is marked `is_last` in the copy.
        """
        streams, starts = index[0], index[1]
        slots = (starts[:, None] + self._offsets) % self.length  # (B, window)
        rows = {key: stored[streams[:, None], slots] for key, stored in self._rows.items()}
        cut = rows["is_last"][:, :-1] | rows["is_first"][:, 1:]
        rows["is_last"] = torch.cat([cut, rows["is_last"][:, -1:]], dim=1)
        return rows, {key: stored[streams, slots[:, 0]] for key, stored in self._latents.items()}

    @torch.no_grad()
    def write_back(self, index: Tensor, latents: Mapping[str, Tensor]) -> None:
        """Overwrites the latents of the training rows of gathered windows: each (B, window - 1, ...).

        Where windows overlap, any one of the values for a row may win, and for each key another one: all
        of them are fresh posteriors of the same row. Raises KeyError unless every latent is given.
        """
        streams, starts = index[0], index[1]
        slots = (starts[:, None] + self._offsets[1:]) % self.length  # (B, window - 1)
        place = (streams[:, None].expand_as(slots), slots)
        for key, stored in self._latents.items():
            stored.index_put_(place, latents[key].to(stored))

    def state_dict(self) -> dict[str, Any]:
        """All that is held, as CPU tensors and plain types; write it out before replay changes again.

        Tensors are (streams, held, ...), row `position` at `position % held`: a full ring is laid out
        like that already, so on the CPU its tensors are shared instead of doubling the memory of a long
        run.
        """
        held = self._next - self._oldest
        return {
            "tensors": {key: self._held_rows(stored, held) for key, stored in self._tensors().items()},
            "streams": self.streams,
            "oldest": self._oldest,
            "next": self._next,
            "queue": list(self._queue),
            "random": self._random.bit_generator.state,
        }

    def _held_rows(self, stored: Tensor, held: int) -> Tensor:
        """(streams, length, ...) -> (streams, held, ...) on the CPU, stream by stream to save memory."""
        if held == self.length:
            return stored.cpu()
        positions = torch.arange(self._oldest, self._next)
        source, target = (positions % self.length).to(self.device), positions % max(held, 1)
        rows = torch.empty((self.streams, held, *stored.shape[2:]), dtype=stored.dtype)
        for stream in range(self.streams):
            rows[stream, target] = stored[stream, source].cpu()
        return rows

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where state_dict() was taken; a smaller capacity keeps the newest rows.

        Raises UserError that names the first mismatch of streams, keys, shapes or dtypes, with nothing
        changed.
        """
        self._check(state)
        held = state["next"] - state["oldest"]
        self._next = state["next"]
        self._oldest = max(state["oldest"], self._next - self.length)
        positions = torch.arange(self._oldest, self._next)
        source, target = positions % max(held, 1), (positions % self.length).to(self.device)
        for key, stored in self._tensors().items():
            for stream in range(self.streams):
                stored[stream, target] = state["tensors"][key][stream, source].to(self.device)
        last = self._next - self.window  # a longer window than the saved one may not be whole yet
        waiting = state["queue"] if self._online_queue else []
        self._queue = deque((stream, start) for stream, start in waiting if self._oldest <= start <= last)
        self._random.bit_generator.state = state["random"]

    def _check(self, state: Mapping[str, Any]) -> None:
        advice = "resume with the configuration the run was started with"
        if state["streams"] != self.streams:
            raise UserError(
                f"saved replay: {state['streams']} environments, but env.amount is {self.streams}; {advice}"
            )
        tensors, saved = self._tensors(), state["tensors"]
        for key in [*tensors, *saved]:
            if key not in saved or key not in tensors:
                where = "is not in it" if key not in saved else "is not stored by this agent"
                raise UserError(f"saved replay: {key} {where}; {advice}")
            ours, theirs = (tuple(t.shape[2:]) for t in (tensors[key], saved[key]))
            if ours != theirs or tensors[key].dtype != saved[key].dtype:
                raise UserError(
                    f"saved replay: {key} is {saved[key].dtype} {theirs},"
                    f" this agent stores {tensors[key].dtype} {ours}; {advice}"
                )
