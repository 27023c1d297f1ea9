"""How many updates are due: replayed steps per agent step, counted without rounding."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from agent.errors import UserError


class Ratio:
    """Turns agent steps into whole updates of `batch_steps` = B * T replayed steps each.

    The credit is a fraction of integers: it never drifts, and many small calls give what one large call
    gives.
    """

    def __init__(self, ratio: float | int, batch_steps: int) -> None:
        """ratio: replayed steps per agent step, taken as it is written (0.1 is a tenth).

        Raises UserError if it is negative or not a finite number.
        """
        try:
            replayed = Fraction(str(ratio))
        except ValueError:
            replayed = Fraction(-1)
        if replayed < 0:
            raise UserError(f"train.ratio: {ratio} is not a finite number of at least 0; set it to, say, 512")
        self._per_step = replayed / batch_steps  # updates per agent step
        self._credit = Fraction(0)  # the part of an update earned so far

    def updates(self, agent_steps: int) -> int:
        """Adds `agent_steps` (over all environments) and returns the updates now due."""
        due, self._credit = divmod(self._credit + self._per_step * agent_steps, 1)
        return due

    def state_dict(self) -> dict[str, Any]:
        """The credit as two integers."""
        return {"numerator": self._credit.numerator, "denominator": self._credit.denominator}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with a saved credit; that is less than one update even if the ratio has changed."""
        self._credit = Fraction(state["numerator"], state["denominator"])
