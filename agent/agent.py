"""The agent: acts on observations, learns from replay, and can be saved."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor

from agent.capture import Captured, Tensors
from agent.compiler import Mode, how_updates_begin
from agent.cores import State
from agent.distributed import ALONE, Ranks
from agent.errors import UserError
from agent.learner import Learner, part
from agent.means import Means
from agent.replay import Replay, Spec
from agent.schema import Config
from agent.spaces import action_from_gymnasium, from_gymnasium
from agent.world_model.encoder import Observation

FLAGS: dict[str, Spec] = {
    "reward": ((), torch.float32),
    "is_first": ((), torch.bool),
    "is_last": ((), torch.bool),
    "is_terminal": ((), torch.bool),
}


class Carry(NamedTuple):
    """What the agent keeps between two steps of N environments."""

    state: State  # the core's memory (N, ...)
    z: Tensor  # (N, G, C)
    action: Tensor  # the last one (N, A)


class Agent:
    """World model, behavior and optimizer on one device.

    Args:
        observations: Dict space of an environment's observation, as `agent.make_env` gives it.
        action: its action space.
        config: the resolved configuration; `compile` and `precision` may still be `auto`.
        device: where everything lives.
        ranks: those that learn together, from the mean of their gradients; all begin with the first one's weights.

    Raises:
        UserError: a space is not supported, or `config` asks for what this device or these spaces cannot do.

    Source: Hafner et al., "Mastering diverse control tasks through world models" (Nature, 2025).
    """

    def __init__(
        self, observations: spaces.Space[Any], action: spaces.Space[Any], config: Config, device: torch.device,
        ranks: Ranks = ALONE,
    ):  # fmt: skip
        assert isinstance(observations, spaces.Dict), "envs.make gives dict observations"
        self.config, self.device, self.ranks = config, device, ranks
        given = {key: from_gymnasium(space, key) for key, space in sorted(observations.items())}
        self.action = action_from_gymnasium(action)
        on_gpu = device.type == "cuda"
        precision = config.precision if config.precision != "auto" else ("bf16" if on_gpu else "fp32")
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.mode = how_updates_begin(config.compile, on_gpu)
        if self.mode == "graph" and not on_gpu:
            raise UserError("compile: graph needs a CUDA device; use eager or full on the CPU")

        self.learner = Learner(given, self.action, config, device, self.dtype, ranks)
        self.world_model, self.behavior = self.learner.world_model, self.learner.behavior
        self.observations = self.world_model.observations
        self.means = Means(device, ranks)
        self._replay: Replay | None = None
        self.updates = 0
        self._prepare()

    def use(self, mode: Mode) -> None:
        """Run from now on `eager`, as one CUDA graph (`graph`), or as one with compiled regions (`full`)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the graph that is dropped may still run
        self.mode = mode
        self._prepare()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what a graph of single kernels took, a compiled one does not need

    def _prepare(self) -> None:
        """Twin of the world model, compiled regions, captured graphs: what is made anew when its code path changes."""
        self.learner.prepare(self.mode)
        self._act = self._on_device(self.act_flat)
        self._update: Callable[[Tensors], Tensors] | None = None
        if self._replay is not None:
            self.attach(self._replay)

    def _on_device(self, function: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
        """The function for inputs from anywhere: captured, or as it is on inputs brought to the agent's device."""
        if self.device.type == "cuda" and self.mode != "eager":
            return Captured(function, self.device)
        return lambda inputs: function({key: value.to(self.device) for key, value in inputs.items()})

    # ---- acting -----------------------------------------------------------------------------------------------

    def initial(self, amount: int) -> Carry:
        """What the agent keeps before the first step of `amount` environments."""
        state, z = self.world_model.rssm.initial(amount)
        return Carry(state, z, torch.zeros(amount, self.action.width, device=self.device))

    def act(self, observation: Observation, first: Tensor, carry: Carry, mode: bool = False) -> tuple[Tensor, Carry]:
        """Choose an action for each of N environments.

        Args:
            observation: tensors (N, ...) as the environment gives them.
            first: (N,) bool: an episode begins here, and what the agent kept is forgotten.
            carry: what this function gave for the step before.
            mode: the most likely action, instead of a sampled one.

        Returns:
            The action (N, ...) as the environment takes it, on the agent's device, and what to keep. With a CUDA graph,
            the next call overwrites both.
        """
        inputs = {f"observation/{key}": observation[key] for key in self.observations}
        inputs |= {f"state/{key}": value for key, value in carry.state.items()}
        inputs |= {"z": carry.z, "action": carry.action, "first": first, "mode": torch.tensor([mode])}
        outputs = self._act(inputs)
        state = {key: outputs[f"state/{key}"] for key in carry.state}
        return self.action.decode(outputs["action"]), Carry(state, outputs["z"], outputs["action"])

    @torch.no_grad()
    def act_flat(self, inputs: Tensors) -> Tensors:
        """`act` as a function of named tensors alone: the form that is captured as a CUDA graph, and exported."""
        model, amount = self.learner.frozen_world_model.module, inputs["first"].shape[0]
        token = model.encoder(part(inputs, "observation"), self.dtype)
        uniform = torch.rand(amount, model.rssm.groups, device=self.device)
        latent, _ = model.rssm.observe_step(
            part(inputs, "state"), inputs["z"], inputs["action"], inputs["first"], token, uniform
        )
        policy = self.learner.frozen_actor.module(model.rssm.feature(latent, self.dtype))
        sample = policy.sample(self.action.noise((amount,), self.device))
        action = torch.where(inputs["mode"], policy.mode(), sample)
        return {
            "action": action,
            "z": latent.z,
            **{f"state/{key}": value for key, value in latent.state.items()},
        }

    # ---- learning ---------------------------------------------------------------------------------------------

    @property
    def replay_stride(self) -> int:
        """The distance of the rows whose latents replay keeps; see `Learner.stride`."""
        return self.learner.stride

    def row_specs(self) -> tuple[dict[str, Spec], dict[str, Spec]]:
        """What replay stores of each step: the transition with the action, and the agent's latents."""
        rows = {key: (space.shape, space.dtype) for key, space in self.observations.items()}
        rows |= FLAGS | {"action": (self.action.shape, self.action.dtype)}
        state, _ = self.world_model.rssm.initial(1)
        latents = {f"state/{key}": (tuple(value.shape[1:]), value.dtype) for key, value in state.items()}
        # z is one-hot, so the indices are all of it, and 4 * C times smaller.
        return rows, latents | {"z": ((self.world_model.rssm.groups,), torch.uint8)}

    def row(self, values: Tensors, action: Tensor, carry: Carry) -> Tensors:
        """What replay stores of a step (N, ...): of the environments' `values` what this agent uses, and its own."""
        kept = {key: values[key] for key in (*self.observations, *FLAGS)}
        return kept | {"action": action} | self.learner.latents(carry.state, carry.z)

    def attach(self, replay: Replay) -> None:
        """Learn from this replay from now on. Sampled rows never leave the GPU if replay lies there too."""
        assert replay.stride == self.replay_stride, "replay keeps other latents than this agent writes back"
        self._replay = replay
        if replay.device == self.device:

            def update(inputs: Tensors) -> Tensors:
                latents, metrics = self.learner.learn(*replay.gather(inputs["index"]))
                replay.write_back(inputs["index"], latents, metrics["finite"])
                return metrics

            self._update = self._on_device(update)
            return

        learn = self._on_device(self._learn_flat)

        def update_from_host(inputs: Tensors) -> Tensors:
            rows, latents = replay.gather(inputs["index"])
            given = {f"row/{key}": value for key, value in rows.items()}
            given |= {f"latent/{key}": value for key, value in latents.items()}
            results = learn(given)
            metrics = part(results, "metric")
            fresh = {k: v.cpu() for k, v in part(results, "latent").items()}
            replay.write_back(inputs["index"], fresh, metrics["finite"].cpu())
            return metrics

        self._update = update_from_host

    def _learn_flat(self, inputs: Tensors) -> Tensors:
        latents, metrics = self.learner.learn(part(inputs, "row"), part(inputs, "latent"))
        return {f"latent/{k}": v for k, v in latents.items()} | {f"metric/{k}": v for k, v in metrics.items()}

    def update(self, index: Tensor) -> None:
        """One update from the sequences that replay sampled, index (2, B). Does not wait for the device."""
        assert self._update is not None, "attach a replay first"
        metrics = self._update({"index": index})
        self.updates += 1
        self.means.add({name: number for name, number in metrics.items() if name != "finite"}, metrics["finite"])

    def take_metrics(self) -> dict[str, float]:
        """Means of what the updates since the last call reported; waits for the device. Empty if there were none.

        `skipped_updates` says how many of them changed nothing, as a number in them was not finite.
        """
        return self.means.take()

    def schedule(self, metrics: Mapping[str, float]) -> None:
        """Let the core change with training, given the metrics just taken; what was captured is dropped if need be."""
        if self.world_model.rssm.core.schedule(self.updates, metrics):
            self._prepare()

    # ---- keeping ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that learning changes."""
        return self.learner.state_dict() | {"updates": self.updates, "means": self.means.state_dict()}

    def load_state_dict(self, state: dict[str, Any], source: Any = "the agent") -> None:
        """Take over a saved state, in place.

        Args:
            state: what `state_dict` gave.
            source: where it is from, as an error names it.

        Raises:
            UserError: it is of an agent with other parts, or parts of other shapes.
        """
        try:
            self.learner.load_state_dict(state)
        except (RuntimeError, ValueError) as error:  # how torch tells that names or shapes differ
            reason = " ".join(str(error).split())
            raise UserError(
                f"{source}: the checkpoint does not fit the agent that this version makes ({reason}); "
                "use the version that wrote it, or train anew in another --logdir"
            ) from None
        self.updates = state["updates"]
        self._prepare()  # what a core derives from its buffers may have changed
        self.learner.refresh()
        self.means.load_state_dict(state["means"])
