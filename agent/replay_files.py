"""Replay on disk: rows in files that are written once, latents anew with every checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent import checkpoint
from agent.dealing import deal_replay, deal_tensors, parts
from agent.errors import UserError, writing
from agent.replay import Replay

CHUNK = 1024
"""Rows of each stream in a file of rows."""


class ReplayFiles:
    """The files of one run's replay, and what a checkpoint must say to find them.

    A row never changes once it is added, so it is written once: by a `rows_` file when there are CHUNK new ones, until
    then by each checkpoint's `latest_` file. Latents do change: between two checkpoints updates refresh nearly all of
    them, many times. A resumed run that had older ones would not be the same run, so `latest_` holds all of them, and a
    checkpoint costs their size. A file goes when no checkpoint needs it any more.

    Where several ranks train one agent, each writes the files of its own replay.
    """

    def __init__(self, directory: Path, rank: int = 0):
        self.directory = directory
        self._suffix = f"_rank{rank}" if rank else ""
        self._chunks: list[dict[str, Any]] = []  # `file` holds the rows of positions `begin` to `end` - 1

    def write(self, replay: Replay, step: int) -> dict[str, Any]:
        """Bring the disk up to date; gives what `load` needs, in plain types.

        Raises:
            UserError: something cannot be written; what earlier checkpoints need is as it was.
        """
        oldest, end = replay.held
        self._chunks = [chunk for chunk in self._chunks if chunk["end"] > oldest]
        begin = max(oldest, self._chunks[-1]["end"] if self._chunks else 0)
        while end - begin >= CHUNK:
            rows = replay.rows(begin, begin + CHUNK)
            path = checkpoint.write(self.directory / f"rows_{begin:012d}{self._suffix}", rows)
            self._chunks.append({"file": path.name, "begin": begin, "end": begin + CHUNK})
            begin += CHUNK
        latest = checkpoint.write(self.directory / f"latest_{step:012d}{self._suffix}", replay.state_dict(begin))
        return {"chunks": list(self._chunks), "latest": latest.name}

    def verify(self, needed: dict[str, Any]) -> None:
        """UserError if a file that a checkpoint, or one rank's part of it, needs is missing or damaged."""
        for name in names(needed):
            checkpoint.verify(self.directory / name)

    def load(self, needed: dict[str, Any], replay: Replay) -> None:
        """Fill replay with what `write` saved.

        Raises:
            UserError: a file is missing, or holds another kind of rows than `replay`.
        """
        replay.load_state_dict(checkpoint.peek(self.directory / needed["latest"]))
        for chunk in needed["chunks"]:
            replay.load_rows(chunk["begin"], chunk["end"], checkpoint.peek(self.directory / chunk["file"]))
        self._chunks = list(needed["chunks"])

    def load_dealt(self, needed: Sequence[dict[str, Any]], replay: Replay, first: int, seed: int) -> None:
        """Fill replay with streams `first`, `first` + 1, ... of those that several ranks saved, counted through.

        The next `write` writes all rows anew, as other ranks share them now.

        Args:
            needed: what `write` gave, by rank.
            replay: to be filled.
            first: the place among all streams that its first one has.
            seed: of what it will draw, as its streams have no sampler of their own.

        Raises:
            UserError: as `load`.
        """
        wanted = range(first, first + replay.streams)
        states = [checkpoint.peek(self.directory / part["latest"]) for part in needed]
        replay.load_state_dict(deal_replay(states, wanted, seed))
        amounts = [state["streams"] for state in states]
        for chunks in zip(*(part["chunks"] for part in needed), strict=True):
            rows = [checkpoint.peek(self.directory / chunk["file"]) for chunk in chunks]
            replay.load_rows(chunks[0]["begin"], chunks[0]["end"], deal_tensors(rows, amounts, wanted))
        self._chunks = []

    def sweep(self, checkpoints: list[Path]) -> None:
        """Remove the files that none of these checkpoints needs."""
        needed: set[str] = set()
        for path in checkpoints:
            try:
                needed |= {name for part in parts(checkpoint.peek(path)) for name in names(part["replay"])}
            except (UserError, KeyError):  # a damaged one is passed over on resume, and needs nothing
                continue
        with writing(self.directory):
            for path in self.directory.glob("*"):
                if path.suffix in (".pt", ".tmp") and path.name not in needed:
                    path.unlink()


def names(needed: dict[str, Any]) -> list[str]:
    """The files that a checkpoint needs."""
    return [needed["latest"], *(chunk["file"] for chunk in needed["chunks"])]
