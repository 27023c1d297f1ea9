"""Replay: endless streams of rows on one device, sampled as windows, and the latents stored beside them."""

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agent.errors import UserError

Spec = tuple[tuple[int, ...], torch.dtype]


def storage_bytes(
    rows: Mapping[str, Spec], latents: Mapping[str, Spec], *, streams: int, capacity: int, stride: int = 1
) -> int:
    """Bytes that a Replay of these arguments takes, known before it is allocated."""
    row, latent = (
        sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in specs.values()) for specs in (rows, latents)
    )
    heads = capacity // streams // stride
    return streams * heads * (stride * row + latent)


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


class _Span(NamedTuple):
    """Successive numbers, first to end - 1, of rows or heads: in a ring of any size each has its slot."""

    first: int
    end: int

    @property
    def amount(self) -> int:
        return self.end - self.first

    def slots(self, ring: int) -> Tensor:
        return torch.arange(self.first, self.end) % max(ring, 1)


class Replay:
    """The last `capacity` agent steps of `streams` environments.

    A row is a transition and the latents the agent had at it. Rows of a stream are numbered from 0 for
    ever; row `position` lies in slot `position % length` of tensors (streams, length, ...), length =
    capacity // streams. One add() writes a row of every stream, so all streams hold the same positions.

    A window is `window` successive rows of one stream: one context row, whose latents start the sequence
    and whose action is the first previous action, and `window - 1` training rows. Windows cross episode
    borders; `is_first` inside them says where. With `online_queue` successive windows of each stream are
    served once, soon after they were collected; uniform samples fill the batch.

    Latents are kept at heads only, the rows at multiples of `stride`, and windows start at heads. With
    stride 1 every row is a head. With stride `window - 1` a stream is cut into chunks: the last row of
    each window is the head of the next one, whose latents an update refreshes. That is for latents
    that are much larger than a row; the price is that there are stride times fewer windows to draw.

    gather() and write_back() have static shapes and never wait for the device, and load_state_dict()
    fills the tensors in place, so a CUDA graph that reads them stays valid. An index from sample() holds
    until the next add(): afterwards its oldest rows may have been overwritten.

    Rows of an episode whose environment broke can be discarded: they keep their places, and no window that holds one
    of them is served.

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
        stride: int = 1,
    ) -> None:
        """Allocates everything at once, so that memory runs out now or never.

        rows, latents: key -> (shape of one row, dtype); the keys differ, rows hold bool `is_first` and
        `is_last`.
        capacity: agent steps over all streams; of each stream a multiple of `stride` is kept. Raises
        UserError if it is too small for one window or too large for the device.
        stride: distance of the rows whose latents are kept; it divides `window - 1`.
        """
        if rows.keys() & latents.keys():
            raise ValueError(f"keys in both rows and latents: {sorted(rows.keys() & latents.keys())}")
        if (window - 1) % stride:
            raise ValueError(f"stride {stride} does not divide the {window - 1} training rows of a window")
        self.streams, self.window, self.stride, self.device = streams, window, stride, device
        self.heads = capacity // streams // stride  # of each stream
        self.length = self.heads * stride
        if self.length < window:
            least = streams * stride * -(-window // stride)
            raise UserError(
                f"replay.capacity: {capacity} steps over {streams} environments keep {self.length} rows of"
                f" each, but a sequence needs {window}; set it to at least {least}"
            )
        try:
            self._rows = {key: self._allocate(self.length, spec) for key, spec in rows.items()}
            self._latents = {key: self._allocate(self.heads, spec) for key, spec in latents.items()}
        except RuntimeError as error:  # how both allocators, CPU and CUDA, report a lack of memory
            needed = storage_bytes(rows, latents, streams=streams, capacity=capacity, stride=stride) / 1e9
            raise UserError(
                f"replay.capacity: {capacity} steps need {needed:.2f} GB, more than {device} has free;"
                " lower it or set replay.device"
            ) from error
        self._offsets = torch.arange(window, device=device)
        self._oldest = 0  # first position still held
        self._next = 0  # position of the row that comes next
        self._online_queue = online_queue
        self._queue: deque[tuple[int, int]] = deque()  # (stream, start), oldest start first
        # Windows side by side where they may start anywhere; else they share a row, the head between them.
        self._queue_spacing = window if stride == 1 else window - 1
        self._discarded: list[tuple[int, _Span]] = []  # (stream, rows), oldest rows first within a stream
        self._random = np.random.Generator(np.random.PCG64(seed))

    def _allocate(self, slots: int, spec: Spec) -> Tensor:
        shape, dtype = spec
        return torch.zeros((self.streams, slots, *shape), dtype=dtype, device=self.device)

    def __len__(self) -> int:
        """Rows held, over all streams."""
        return self.streams * (self._next - self._oldest)

    @property
    def held(self) -> tuple[int, int]:
        """The first position held, and the one that comes next."""
        return self._oldest, self._next

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def latent_nbytes(self) -> int:
        """Bytes of the stored latents."""
        return sum(tensor.nbytes for tensor in self._latents.values())

    def _tensors(self) -> dict[str, Tensor]:
        return {**self._rows, **self._latents}

    @torch.no_grad()
    def add(self, row: Mapping[str, Tensor]) -> None:
        """Appends one row of every stream: rows and latents together, each (N, ...), on any device.

        Latents of rows that are no heads are not copied. Values are cast to the stored dtype. Copies to a
        GPU are not waited for: a pinned source must stay as it is until the device has read it. Raises
        ValueError if keys or shapes are not the declared ones.
        """
        tensors = self._tensors()
        if row.keys() != tensors.keys():
            raise ValueError(f"row has keys {sorted(row)}, replay stores {sorted(tensors)}")
        for key, stored in tensors.items():
            if row[key].shape != stored[:, 0].shape:  # copy_ would broadcast
                raise ValueError(f"{key}: shape {tuple(row[key].shape)}, not {tuple(stored[:, 0].shape)}")
        slot, on_gpu = self._next % self.length, self.device.type == "cuda"
        for key, stored in self._rows.items():
            stored[:, slot].copy_(row[key], non_blocking=on_gpu)
        if self._next % self.stride == 0:
            for key, stored in self._latents.items():
                stored[:, slot // self.stride].copy_(row[key], non_blocking=on_gpu)
        self._next += 1
        self._oldest = max(self._oldest, self._next - self.length)
        start = self._next - self.window
        if self._online_queue and start >= 0 and start % self._queue_spacing == 0:
            self._queue.extend((stream, start) for stream in range(self.streams) if self._is_sound(stream, start))
        while self._queue and self._queue[0][1] < self._oldest:
            self._queue.popleft()
        if self._discarded:
            self._discarded = [(which, span) for which, span in self._discarded if span.end > self._oldest]

    def discard(self, stream: int, rows: int) -> None:
        """Never serves the newest `rows` rows of a stream, again or for the first time."""
        span = _Span(max(self._next - rows, self._oldest), self._next)
        if span.amount == 0:
            return
        self._discarded.append((stream, span))
        self._queue = deque(window for window in self._queue if self._is_sound(*window))

    def _is_sound(self, stream: int, start: int) -> bool:
        """Whether no row of the window was discarded."""
        return not any(
            which == stream and span.first - self.window < start < span.end for which, span in self._discarded
        )

    def _sound_runs(self) -> np.ndarray:
        """Where sound windows start: int64 (3, R), of each run its stream, its first head and how many they are."""
        first, last = self._window_range()
        begins, runs = [first] * self.streams, []
        for stream, span in self._discarded:
            runs.append((stream, begins[stream], (span.first - self.window) // self.stride))
            begins[stream] = max(first, -(-span.end // self.stride))
        runs += [(stream, begin, last) for stream, begin in enumerate(begins)]
        found = [(stream, begin, end - begin + 1) for stream, begin, end in runs if begin <= end]
        return np.array(found, np.int64).reshape(-1, 3).T

    def ready(self, prefill: int) -> bool:
        """Whether `prefill` rows and at least one sound window are held, so that sample() may be called.

        Raises UserError if so many rows never fit.
        """
        if prefill > self.streams * self.length:
            raise UserError(
                f"replay.prefill: {prefill} rows, but replay keeps {self.streams * self.length};"
                " lower it or raise replay.capacity"
            )
        return len(self) >= prefill and self._sound_runs().size > 0

    def _window_range(self) -> tuple[int, int]:
        """First and last start of a whole window, in strides."""
        return -(-self._oldest // self.stride), (self._next - self.window) // self.stride

    def sample(self, batch: int) -> Tensor:
        """Chooses `batch` windows: int64 (2, B) on the host, row 0 the stream, row 1 the start.

        Waiting windows of the online queue come first, then uniform draws over all sound windows held.
        """
        queued = [self._queue.popleft() for _ in range(min(batch, len(self._queue)))]
        online = np.array(queued, dtype=np.int64).reshape(-1, 2).T
        return torch.from_numpy(np.concatenate([online, self._draw(batch - len(queued))], axis=1))

    def _draw(self, amount: int) -> np.ndarray:
        """Uniform draws over all sound windows, int64 (2, amount)."""
        if not self._discarded:
            streams = self._random.integers(self.streams, size=amount)
            first, last = self._window_range()
            return np.stack([streams, self.stride * self._random.integers(first, last + 1, size=amount)])
        streams, heads, lengths = self._sound_runs()
        ends = np.cumsum(lengths)
        drawn = self._random.integers(ends[-1], size=amount)
        run = np.searchsorted(ends, drawn, side="right")
        return np.stack([streams[run], self.stride * (heads[run] + drawn - ends[run] + lengths[run])])

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
        heads = starts // self.stride % self.heads  # (B,)
        return rows, {key: stored[streams, heads] for key, stored in self._latents.items()}

    @torch.no_grad()
    def write_back(self, index: Tensor, latents: Mapping[str, Tensor], wanted: Tensor | None = None) -> None:
        """Overwrites the latents of the heads among the training rows of gathered windows.

        latents: each (B, K, ...), at the training rows stride - 1, 2 * stride - 1, ..., window - 2.
        wanted: bool (), on the device: whether to overwrite anything; None is yes.

        Where windows overlap, the last one wins on the CPU. On a GPU any one of the values for a row may,
        and for each key another one: all of them are fresh posteriors of the same row. Raises KeyError
        unless every latent is given.
        """
        streams, starts = index[0], index[1]
        positions = starts[:, None] + self._offsets[self.stride :: self.stride]
        heads = positions // self.stride % self.heads  # (B, K)
        place = (streams[:, None].expand_as(heads), heads)
        for key, stored in self._latents.items():
            fresh = latents[key].to(stored)
            if wanted is not None:
                fresh = torch.where(wanted, fresh, stored[place])
            if self.device.type == "cuda":
                stored.index_put_(place, fresh)
                continue
            for window in range(len(streams)):  # threads would race for rows that two windows share
                stored[streams[window], heads[window]] = fresh[window]

    def state_dict(self, begin: int = 0) -> dict[str, Any]:
        """All that is held but the rows before position `begin`, as CPU tensors and plain types.

        Tensors are (streams, held, ...), row `position` at `position % held`, and so are heads by their
        own number: a full ring is laid out like that already, so on the CPU its tensors are shared
        instead of doubling the memory of a long run. Write them out before replay changes again.
        """
        rows, heads = _Span(max(begin, self._oldest), self._next), self._heads_of(self._oldest)
        return {
            "tensors": {
                **{key: self._held(stored, rows) for key, stored in self._rows.items()},
                **{key: self._held(stored, heads) for key, stored in self._latents.items()},
            },
            "streams": self.streams,
            "stride": self.stride,
            "oldest": self._oldest,
            "next": self._next,
            "begin": rows.first,
            "queue": list(self._queue),
            "discarded": [(stream, span.first, span.end) for stream, span in self._discarded],
            "random": self._random.bit_generator.state,
        }

    def _heads_of(self, oldest: int) -> _Span:
        """The numbers of the heads among the rows from `oldest` to the newest."""
        return _Span(-(-oldest // self.stride), -(-self._next // self.stride))

    def _held(self, stored: Tensor, span: _Span) -> Tensor:
        """The ring (streams, slots, ...) -> (streams, held, ...) on the CPU, stream by stream to save memory."""
        if span.amount == stored.shape[1]:
            return stored.cpu()
        source, target = span.slots(stored.shape[1]).to(self.device), span.slots(span.amount)
        held = torch.empty((self.streams, span.amount, *stored.shape[2:]), dtype=stored.dtype)
        for stream in range(self.streams):
            held[stream, target] = stored[stream, source].cpu()
        return held

    def rows(self, begin: int, end: int) -> dict[str, Tensor]:
        """The rows of positions begin to end - 1, all held: (streams, end - begin, ...), ordered as in state_dict()."""
        return {key: self._held(stored, _Span(begin, end)) for key, stored in self._rows.items()}

    def load_rows(self, begin: int, end: int, rows: Mapping[str, Tensor]) -> None:
        """Takes over what rows() gave, after load_state_dict(); of rows that are no longer held nothing."""
        span = _Span(max(begin, self._oldest), max(end, self._oldest))
        for key, stored in self._rows.items():
            self._take_over(stored, rows[key], span)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where state_dict() was taken; a smaller capacity keeps the newest rows.

        Rows before its `begin` are to follow by load_rows(). Raises UserError that names the first
        mismatch of streams, keys, shapes or dtypes, with nothing changed.
        """
        self._check(state)
        self._next = state["next"]
        self._oldest = max(state["oldest"], self._next - self.length)
        rows, heads = _Span(max(state["begin"], self._oldest), self._next), self._heads_of(self._oldest)
        for key, stored in self._tensors().items():
            self._take_over(stored, state["tensors"][key], rows if key in self._rows else heads)
        last = self._next - self.window  # a longer window than the saved one may not be whole yet
        waiting = state["queue"] if self._online_queue else []
        self._queue = deque((stream, start) for stream, start in waiting if self._oldest <= start <= last)
        spans = [(stream, _Span(*rows)) for stream, *rows in state.get("discarded", [])]  # older runs have none
        self._discarded = [(stream, span) for stream, span in spans if span.end > self._oldest]
        self._random.bit_generator.state = state["random"]

    def _take_over(self, stored: Tensor, saved: Tensor, span: _Span) -> None:
        """A span of saved rows or heads (streams, saved, ...) into the ring, stream by stream to save memory."""
        source, target = span.slots(saved.shape[1]), span.slots(stored.shape[1]).to(self.device)
        for stream in range(self.streams):
            stored[stream, target] = saved[stream, source].to(self.device)

    def _check(self, state: Mapping[str, Any]) -> None:
        advice = "resume with the configuration the run was started with"
        if state["streams"] != self.streams:
            raise UserError(
                f"saved replay: {state['streams']} environments, but env.amount is {self.streams}; {advice}"
            )
        stride = state.get("stride", 1)  # runs saved before there were strides kept all latents
        if stride != self.stride:
            raise UserError(
                f"saved replay: latents of one row in {stride}, this agent stores those of one in {self.stride};"
                f" {advice}"
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
