"""The exported policy acts as the agent does, and needs nothing of this package."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from agent import export
from agent.errors import UserError

ACTIONS = {
    "gru": spaces.Box(-1, 1, (2,), np.float32),
    "ortho_mlstm": spaces.Discrete(3),
}
STEPS, AMOUNT = 12, 2
ALONE = """
import sys, torch
program = torch.export.load(sys.argv[1])
policy, (_, _, carry) = program.module(), program.example_inputs[0]
torch.manual_seed(1)
actions = []
for observation, first in torch.load(sys.argv[2]):
    action, carry = policy(observation, first, carry)
    actions.append(action)
torch.save(torch.stack(actions), sys.argv[3])
assert not {"agent", "envs"} & set(sys.modules)
"""


def episode() -> list[tuple[dict[str, Tensor], Tensor]]:
    """Observations of two environments that begin at the first step; one of them begins anew at the sixth."""
    rows = []
    for t in range(STEPS):
        observation = {"place": torch.randn(AMOUNT, 3), "signal": torch.randint(4, (AMOUNT,))}
        rows.append((observation, torch.tensor([t == 0, t in (0, 5)])))
    return rows


@pytest.fixture(params=ACTIONS)
def player(request: pytest.FixtureRequest, make_agent: Callable[..., Any], make_replay: Callable[..., Any]) -> Any:
    """An agent that has learned a little, so that its actions depend on what it sees."""
    player = make_agent(ACTIONS[request.param], ["optimizer.lr=1e-2", "optimizer.warmup=0"], core=request.param)
    replay = make_replay(player)
    player.attach(replay)
    for _ in range(2):
        player.update(replay.sample(player.config.train.batch_size))
    return player


def test_actions_equal_the_agents_over_episodes_with_resets(player: Any, tmp_path: Path) -> None:
    rows = episode()
    export(player, tmp_path / "policy.pt2", amount=AMOUNT)
    torch.save(rows, tmp_path / "rows")
    words = [str(tmp_path / name) for name in ("policy.pt2", "rows", "actions")]
    done = subprocess.run([sys.executable, "-P", "-c", ALONE, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exported = torch.load(tmp_path / "actions")

    torch.manual_seed(1)
    carry, actions = player.initial(AMOUNT), []
    for observation, first in rows:
        action, carry = player.act(observation, first, carry, mode=True)
        actions.append(action)
    torch.testing.assert_close(exported, torch.stack(actions), rtol=1e-5, atol=1e-6)
    assert len(torch.stack(actions).unique()) > 1


def test_a_file_that_cannot_be_written_is_a_mistake(make_agent: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"policy\.pt2: cannot be written"):
        export(make_agent(ACTIONS["gru"]), tmp_path / "absent" / "policy.pt2")
