"""What becomes of numbers that are not finite: told, kept on disk, and the end of the run if they do not cease."""

from pathlib import Path

from agent import checkpoint
from agent.agent import Agent, Carry
from agent.errors import UserError
from agent.finite import first_not_finite

KEPT = 3
"""Batches that stay on disk."""
NAMED = 5
"""Tensors that a message names at most."""


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
        found = agent.watch.look()
        if found is None:
            return None
        more = f" and {len(found.names) - NAMED} more" if len(found.names) > NAMED else ""
        named = ", ".join(found.names[:NAMED]) + more
        text = f"not finite at {frames} frames: {named}; {found.most_in_a_row} updates in a row were skipped"
        if len(list(self.directory.glob("*.pt"))) < KEPT:
            state = {"names": found.names, "frames": frames, "updates": agent.updates, "batch": found.batch}
            text += f"; the first batch is in {checkpoint.write(self.directory / f'step_{frames:012d}', state)}"
        if found.most_in_a_row >= self.most:
            raise UserError(
                f"{text}; that is train.max_skipped, so the run stops: the newest checkpoint is sound, a lower"
                " optimizer.lr may learn on in another --logdir"
            )
        return text
