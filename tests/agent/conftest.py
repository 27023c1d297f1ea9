"""What several tests of the agent build on: small configurations, spaces, agents and filled replays."""

import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

if not torch.cuda.is_available() and find_spec("triton"):
    # Triton decides at its import whether to interpret, and importing the agent may import it.
    import triton_on_cpu

    triton_on_cpu.mend()

from outer_product import with_outer_product

from agent import config as configuration
from agent import schema
from agent.agent import Agent
from agent.replay import Replay
from agent.spaces import Hybrid

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[..., int]:
    """Function of words: the exit status of the test module's SCRIPT, run in this process."""

    def run(*words: str) -> int:
        script = str(request.module.SCRIPT)
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(script, run_name="__main__")
        return int(caught.value.code or 0)

    return run


@pytest.fixture
def debug_config(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Function of settings "key=value": the configuration of size debug, in fp32 on the CPU.

    The core `outer_product` of the tests has no file, and is known while the test runs.
    """

    def make(*settings: str, core: str = "gru", size: str = "debug") -> schema.Config:
        config = configuration.resolve(
            env="gym_CartPole-v1",
            core="gru" if core == "outer_product" else core,
            size=size,
            device="cpu",
            settings=["precision=fp32", "compile=eager", *settings],
        )
        return with_outer_product(config, monkeypatch) if core == "outer_product" else config

    return make


@pytest.fixture
def make_agent(debug_config: Make) -> Make:
    """Function of an action space and settings: an agent that sees three reals and one choice of four, if no others."""

    def make(
        action: gymnasium.Space[Any],
        settings: Sequence[str] = (),
        seed: int = 0,
        device: str = "cpu",
        core: str = "gru",
        observations: dict[str, gymnasium.Space[Any]] | None = None,
    ) -> Agent:
        plain: dict[str, gymnasium.Space[Any]] = {
            "place": gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32),
            "signal": gymnasium.spaces.Discrete(4),
        }
        torch.manual_seed(seed)
        return Agent(
            gymnasium.spaces.Dict(observations or plain),
            action,
            debug_config(*settings, core=core),
            torch.device(device),
        )

    return make


@pytest.fixture
def make_replay() -> Make:
    """Function of an agent: 2 streams of 40 random rows with random latents, equal for equal seeds."""

    def make(agent: Agent, seed: int = 0, rows: int = 40) -> Replay:
        row_specs, latent_specs = agent.row_specs()
        window = agent.config.train.batch_length + 1
        replay = Replay(
            row_specs,
            latent_specs,
            streams=2,
            capacity=2 * rows,
            window=window,
            device=agent.device,
            seed=seed,
            online_queue=False,
            stride=agent.replay_stride,
        )
        random = torch.Generator().manual_seed(seed)
        choices = {
            "signal": 4,
            "z": agent.config.rssm.classes,
            "action": min(getattr(agent.action, "sizes", (2,))),
        }
        for t in range(rows):
            row = {}
            for key, (shape, dtype) in (row_specs | latent_specs).items():
                if key in agent.observations and dtype == torch.uint8:
                    row[key] = torch.randint(256, (2, *shape), generator=random, dtype=torch.uint8)
                elif dtype.is_floating_point:
                    row[key] = torch.randn(2, *shape, generator=random)
                elif dtype != torch.bool:
                    row[key] = torch.randint(choices[key], (2, *shape), generator=random).to(dtype)
            if isinstance(agent.action, Hybrid):
                sizes = agent.action.choices.sizes
                row["action"][:, -len(sizes) :] = torch.randint(min(sizes), (2, len(sizes)), generator=random).float()
            row["is_first"] = torch.tensor([t % 11 == 0, t % 13 == 0])
            row["is_last"] = torch.tensor([t % 11 == 10, t % 13 == 12])
            row["is_terminal"] = torch.tensor([t % 11 == 10, False])
            replay.add(row)
        return replay

    return make


@pytest.fixture
def traced_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions are traced, differentiated and decomposed as for compilation, but run operation by operation."""

    def traced(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")

    torch.compiler.reset()
    monkeypatch.setattr("agent.learner.compiled", traced)
