"""Several processes that train one agent together: what they reduce, share and agree on, and how they end together."""

import contextlib
import datetime
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from agent.errors import UserError
from agent.schema import Config
from envs.errors import EnvError

Shared = TypeVar("Shared")

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process; so does every launcher that keeps to torch's `env://`."""
PATIENCE = 1800.0
"""Seconds, besides `env.timeout`, that ranks wait for one that is alive and slow: it may compile, or restore."""
BEAT = 0.5
"""Seconds between two signs of life of a rank."""
STILL = 3.0
"""Seconds without a sign of life after which a rank counts as dead, once the others have lost it."""

_meetings = itertools.count()


class Ranks:
    """This process, `rank`, among the `size` that train one agent; alone it does nothing and costs nothing.

    All ranks call the same methods in the same order. Those for the device never wait for the host and have static
    shapes, so that a captured update may hold them. Those for the host must come between updates.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: "dist.Store | None" = None):
        self.rank, self.size, self._store = rank, size, store

    @property
    def leads(self) -> bool:
        """Whether this rank logs, prints and writes what there is one of."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """What a line about this rank begins with: nothing if it is alone."""
        return f"rank {self.rank}: " if self.size > 1 else ""

    def share(self, whole: int, key: str) -> int:
        """This rank's part of a number that all ranks divide among them; UserError, naming `key`, if it cannot be."""
        if whole % self.size:
            raise UserError(
                f"{key}: {whole} cannot be divided over {self.size} ranks; make it a multiple of {self.size}, or start"
                " another number of processes"
            )
        return whole // self.size

    def seed(self, *numbers: int) -> int:
        """A seed for what is to differ between ranks; alone, and on the first rank, a single number as it is."""
        if self.rank == 0 and len(numbers) == 1:
            return numbers[0]
        return int(np.random.SeedSequence([*numbers, self.rank]).generate_state(1)[0])

    # ---- on the device ----------------------------------------------------------------------------------------

    def mean(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors of any shapes -> their means over ranks, in one reduction of all their numbers side by side."""
        if self.size == 1:
            return tensors
        flat = torch.cat([tensor.flatten() for tensor in tensors]) / self.size  # first, so that sums do not overflow
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def all(self, flag: Tensor) -> Tensor:
        """A bool () -> whether it is true on all ranks, bool ()."""
        if self.size == 1:
            return flag
        number = flag.int()
        dist.all_reduce(number, dist.ReduceOp.MIN)
        return number.bool()

    def joined(self, numbers: Tensor) -> Tensor:
        """Numbers (N,) of each rank -> those of all (size * N,), by rank. No gradient leads through it."""
        if self.size == 1:
            return numbers
        parts = [torch.empty_like(numbers) for _ in range(self.size)]
        dist.all_gather(parts, numbers.contiguous())
        return torch.cat(parts)

    def spread(self, module: nn.Module) -> None:
        """Give all ranks the first one's parameters and buffers."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    # ---- on the host ------------------------------------------------------------------------------------------

    def highest(self, *numbers: int) -> list[int]:
        """The highest of each number over all ranks."""
        if self.size == 1:
            return list(numbers)
        held = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return held.tolist()

    def gather(self, thing: Shared) -> list[Shared]:
        """What each rank has, by rank, on all ranks; tensors on the CPU."""
        if self.size == 1:
            return [thing]
        things: list[Shared] = [thing] * self.size
        dist.all_gather_object(things, thing)
        return things

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.gather(None)

    # ---- the end ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Of all that goes wrong in it, on whatever ranks, one line is told: by the first rank that notices.

        The others end without a word, as what they see is only that a rank is gone. Alone, errors pass as they are.

        Raises:
            SystemExit: with status 2, after a line was told here or by another rank.
        """
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it soon, and the reason must come out first
            assert self._store is not None
            if self._store.add("told", 1) == 1:
                if isinstance(error, UserError | EnvError):
                    self._tell(f"{self.name}{error}")
                elif dead := self._without_life():
                    which = "rank " + " and rank ".join(map(str, dead))
                    self._tell(
                        f"{which} of {self.size} died without a word (killed, or out of memory); the same command"
                        " goes on from the newest checkpoint"
                    )
                else:
                    raise
            raise SystemExit(2) from error

    @staticmethod
    def _tell(line: str) -> None:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)

    def end_after_another(self) -> NoReturn:
        """End this rank once the one that knows why has told; SystemExit."""
        assert self._store is not None
        with contextlib.suppress(RuntimeError):  # it may be dead before it could
            self._store.wait(["told"], datetime.timedelta(seconds=STILL))
        raise SystemExit(2)

    def _without_life(self) -> list[int]:
        """The ranks whose hearts stand still."""
        assert self._store is not None
        before = [self._store.add(f"beats/{rank}", 0) for rank in range(self.size)]
        time.sleep(STILL)
        return [rank for rank in range(self.size) if self._store.add(f"beats/{rank}", 0) == before[rank]]

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """Give signs of life meanwhile, and ask this run to stop if nobody takes them: who started it is gone."""
        done = threading.Event()

        def beat() -> None:
            assert self._store is not None
            try:
                while not done.wait(BEAT):
                    self._store.add(f"beats/{self.rank}", 1)
            except RuntimeError:
                if not done.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


ALONE = Ranks()


def choose_gpu() -> None:
    """Make this process's GPU, of those of its machine, the one that "cuda" means; UserError if they are too few."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        raise UserError(
            f"device: {processes} processes on this machine, and torch finds {gpus} GPUs; give torchrun"
            f" --nproc-per-node={gpus}, or use --device cpu"
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def meeting(config: Config, device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started with this process, or `ALONE`, for as long as they train together.

    On the CPU they talk by gloo; on GPUs by NCCL, and by gloo of what lies on the host.

    Raises:
        UserError: the machine has too few GPUs, or the configuration cannot be divided over so many ranks.
        SystemExit: see `Ranks.ending_together`.
    """
    size = int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in VARIABLES) else 1
    if size == 1:
        yield ALONE
        return
    rank = int(os.environ["RANK"])
    for key, whole in (("env.amount", config.env.amount), ("train.batch_size", config.train.batch_size)):
        Ranks(rank, size).share(whole, key)
    if device.type == "cuda":
        choose_gpu()
    timeout = datetime.timedelta(seconds=PATIENCE + (config.env.timeout or 0))
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"meeting {next(_meetings)}", store)  # of several runs in one process
    ranks = Ranks(rank, size, store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    with ranks._alive(), ranks.ending_together():
        yield ranks
    dist.destroy_process_group()
