"""What goes wrong while a run goes on: numbers that are not finite, environments that break; told, and kept on disk."""

from pathlib import Path

from agent import checkpoint
from agent.agent import Agent, Carry
from agent.errors import UserError, writing
from agent.finite import Found, first_not_finite
from envs.streams import Broken

KEPT = 3
"""Batches that stay on disk."""
NAMED = 5
"""Tensors that a message names at most."""
TRACEBACKS = "broken_environments.txt"
"""The file in a run's folder that holds the tracebacks of environments that broke."""
LARGEST = 2**20
"""Bytes from which on that file no longer grows."""


class Incidents:
    """Looks for skipped updates whenever metrics are taken.

    Args:
        directory: where batches are kept.
        most: skipped updates in a row that end the run.
    """

    def __init__(self, directory: Path, most: int):
        self.directory, self.most = directory, most

    def check_acting(self, carry: Carry, frames: int) -> None:
        """UserError if what the agent keeps while it acts is not finite; waits for the device."""
        if wrong := first_not_finite(carry.state | {"action": carry.action}):
            key, index = wrong
            raise UserError(
                f"acting: {key} of environment {index} is not finite at {frames} frames; the newest checkpoint is"
                " sound, and core/ in metrics.jsonl shows what grew before"
            )

    def look(self, agent: Agent, frames: int) -> str | None:
        """A line about what was not finite in the updates since the last look, None if everything was.

        Raises:
            UserError: too many updates were skipped in a row. They changed nothing, so that the newest checkpoint is
                as good as ever.
        """
        found = agent.learner.watch.look()
        if found is None:
            return None
        own = self._named(found, agent, frames) if found.names else ("", "")
        named, kept = (", ".join(filter(None, texts)) for texts in zip(*agent.ranks.gather(own), strict=True))
        text = f"not finite at {frames} frames: {named}; {found.most_in_a_row} updates in a row were skipped"
        if kept:
            text += f"; the first batch is in {kept}"
        if found.most_in_a_row >= self.most:
            raise UserError(
                f"{text}; that is train.max_skipped, so the run stops: the newest checkpoint is sound, a lower"
                " optimizer.lr may learn on in another --logdir"
            )
        return text

    def _named(self, found: Found, agent: Agent, frames: int) -> tuple[str, str]:
        """What was not finite on this rank, in words, and the file that its batch is in, if it is kept."""
        named, stem = ", ".join(found.names[:NAMED]), f"step_{frames:012d}"
        if len(found.names) > NAMED:
            named += f" and {len(found.names) - NAMED} more"
        if agent.ranks.size > 1:
            named, stem = f"{named} of rank {agent.ranks.rank}", f"{stem}_rank{agent.ranks.rank}"
        if len(list(self.directory.glob("*.pt"))) >= KEPT:
            return named, ""
        state = {"names": found.names, "frames": frames, "updates": agent.updates, "batch": found.batch}
        return named, str(checkpoint.write(self.directory / stem, state))


def tell_broken(broken: Broken, frames: int, logdir: Path) -> str:
    """A line about an environment that broke; its traceback, if there is one, goes to a file in `logdir`."""
    text, file = str(broken.failure), logdir / TRACEBACKS
    if broken.failure.details and (not file.exists() or file.stat().st_size < LARGEST):
        with writing(file), file.open("a") as stream:
            stream.write(f"at {frames} frames: {text}\n{broken.failure.details[-10_000:]}\n")
    return f"{text}; the {broken.rows} steps that its episode had are discarded"
