"""The acting policy as a program that runs without this package: encoder, memory, posterior, likeliest action."""

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from agent.agent import Agent
from agent.capture import Tensors
from agent.errors import UserError, writing


class ActingPolicy(nn.Module):
    """One step of acting on N environments as a function of tensors alone."""

    likeliest: Tensor

    def __init__(self, agent: Agent):
        super().__init__()
        self.agent = agent
        self.world_model, self.actor = (
            agent.learner.frozen_world_model.module,
            agent.learner.frozen_actor.module,
        )  # whose weights go along
        self.register_buffer("likeliest", torch.tensor([True]))

    def forward(self, observation: Tensors, first: Tensor, carry: Tensors) -> tuple[Tensor, Tensors]:
        """Observation (N, ...), first (N,) bool and what is kept (N, ...) -> action (N, ...) and what to keep."""
        inputs = {f"observation/{key}": value for key, value in observation.items()}
        kept = self.agent.act_flat(inputs | carry | {"first": first, "mode": self.likeliest})
        return self.agent.action.decode(kept["action"]), {key: kept[key] for key in carry}

    def example(self, amount: int) -> tuple[Tensors, Tensor, Tensors]:
        """Arguments of `forward`, of the right shapes: zeros, at the beginning of an episode."""
        spaces, carry = self.agent.observations, self.agent.initial(amount)
        observation = {key: torch.zeros(amount, *space.shape, dtype=space.dtype) for key, space in spaces.items()}
        kept = {"z": carry.z, "action": carry.action} | {f"state/{key}": value for key, value in carry.state.items()}
        return observation, torch.ones(amount, dtype=torch.bool), kept


def export(agent: Agent, file: str | Path, amount: int = 1) -> torch.export.ExportedProgram:
    """Write the acting policy to a file that `torch.export.load` reads where this package is not installed.

    The program is `(observation, first, carry) -> (action, carry)`:

    - observation: dict of tensors (N, ...) as `agent.make_env` gives them: fp32 for reals, int64 for choices;
    - first: (N,) bool, true where an episode begins, and what was kept is forgotten;
    - carry: dict of tensors (N, ...) from the step before. `program.example_inputs[0]` holds an observation, a `first`
      and a carry to begin with;
    - action: (N, A) fp32 in [-1, 1], or int64 choices, (N,) or (N, k): the most likely one.

    The posterior's code is sampled with torch's generator, as in `agent.evaluate`: after `torch.manual_seed` with the
    same number, program and agent act alike.

    Args:
        agent: on the CPU, as `agent.load(logdir, device="cpu")` gives it.
        file: to write, by custom called `.pt2`.
        amount: N, the number of environments that are acted on side by side.

    Raises:
        UserError: the agent lives on a GPU, or the file cannot be written.

    Source: https://docs.pytorch.org/docs/stable/export.html
    """
    if agent.device.type != "cpu":
        raise UserError(f"export: this agent lives on {agent.device}; load it with device='cpu'")
    policy = ActingPolicy(agent)
    with torch.no_grad():
        program = torch.export.export(policy, policy.example(amount), strict=False)
    content = io.BytesIO()
    torch.export.save(program, content)
    with writing(Path(file)):
        Path(file).write_bytes(content.getvalue())
    return program
