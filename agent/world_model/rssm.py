"""The recurrent state-space model: a deterministic memory h and a stochastic code z, one core of choice between them.

    x_t = [layer(z_{t-1}), layer(a_{t-1})]        h_t = core(x_t)
    prior      p(z_t | h_t)
    posterior  q(z_t | h_t, o_t)   `recurrent`: DreamerV3's, one step after the other
               q(z_t | o_t)        `observation`: all z at once, so that a parallel core is parallel in training
    feature    [h_t, z_t], with `read_after_observation` [h_t, z_t, r_t]

h_t is formed before o_t is seen. A memory that is keyed by what is seen would answer a step late, so it may be asked
again with what z_t tells: r_t = core.read(query(z_t)) on the memory after step t. The prior reads h_t alone.

Source: Hafner et al., "Mastering diverse control tasks through world models" (Nature, 2025).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from agent.cores import RecurrentCore, State
from agent.cores.scan import Tensors, scan
from agent.distributions import categorical_sample, straight_through, unimix_log_probs
from agent.errors import UserError
from agent.networks import MLP, Layer, Linear
from agent.schema import Rssm


class Latent(NamedTuple):
    """Where the model is: the core's memory, its output h (..., F) and the code z (..., G, C), all in fp32."""

    state: State
    h: Tensor
    z: Tensor


class Posterior(NamedTuple):
    """A sequence of inferred states: everything (B, T, ...)."""

    latent: Latent
    log_probs: Tensor  # of the posterior (B, T, G, C)


class RSSM(nn.Module):
    """Core, prior and posterior. Takes `first` to mean: forget what came before this step."""

    def __init__(self, core: Callable[[int], RecurrentCore], action_size: int, token_size: int, config: Rssm):
        super().__init__()
        self.config = config
        self.groups, self.classes = config.stoch, config.classes
        self.code_size = self.groups * self.classes
        self.z_input = Layer(self.code_size, config.hidden)
        self.action_input = Layer(action_size, config.hidden)
        self.input_size = 2 * config.hidden
        self.core = core(self.input_size)
        self.memory_keys = tuple(sorted(self.core.initial(1)))
        self.feature_size = self.core.feature_size + self.code_size
        self.query: nn.Sequential | None = None
        if config.read_after_observation:
            if not self.core.read_size:
                raise UserError(
                    f"rssm.read_after_observation: {type(self.core).__name__} has no memory that can be read twice; "
                    "set it to false or choose another core"
                )
            self.query = nn.Sequential(
                Layer(self.code_size, config.hidden), Linear(config.hidden, self.core.query_size)
            )
            self.feature_size += self.core.read_size
        self.recurrent = config.posterior == "recurrent"
        seen = token_size + (self.core.feature_size if self.recurrent else 0)
        self.prior = self._logits(self.core.feature_size, config.prior_layers)
        self.posterior = self._logits(seen, config.posterior_layers)

    def _logits(self, in_size: int, layers: int) -> nn.Sequential:
        hidden = self.config.hidden
        return nn.Sequential(MLP(in_size, hidden, layers), Linear(hidden, self.code_size))

    def initial(self, batch: int) -> tuple[State, Tensor]:
        """Empty memory (B, ...) and zero code z (B, G, C)."""
        device = next(self.parameters()).device
        return self.core.initial(batch), torch.zeros(batch, self.groups, self.classes, device=device)

    def feature(self, latent: Latent, dtype: torch.dtype) -> Tensor:
        """What heads, actor and critic read: [h, flat z] (..., F + G * C), or [h, flat z, r] (... + R), in `dtype`."""
        code = latent.z.flatten(-2).to(dtype)
        parts = [latent.h.to(dtype), code]
        if self.query is not None:
            outer = code.shape[:-1]  # the core reads rows
            memory = {key: value.flatten(0, len(outer) - 1) for key, value in latent.state.items()}
            answer = self.core.read(self.query(code).flatten(0, -2), memory)
            parts.append(answer.unflatten(0, outer).to(dtype))
        return torch.cat(parts, -1)

    def core_input(self, z: Tensor, action: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
        """Input x (..., 2 * hidden) from the code z (..., G, C) and action (..., A) before it, zero where first (...).

        An action beyond [-1, 1] is scaled back to it, since the environment clips what is sampled without bounds.
        """
        # `where` and not a product: what came before a reset may be anything, and 0 * NaN is NaN.
        forget = first.unsqueeze(-1)
        action = torch.where(forget, 0.0, action / action.abs().clamp(min=1))
        code = torch.where(forget, 0.0, z.flatten(-2))
        return torch.cat([self.z_input(code.to(dtype)), self.action_input(action.to(dtype))], -1)

    def prior_log_probs(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        """The prior log p(z | h) (..., G, C) for h (..., F)."""
        return self._log_probs(self.prior(h.to(dtype)))

    def _log_probs(self, logits: Tensor) -> Tensor:
        return unimix_log_probs(logits.unflatten(-1, (self.groups, self.classes)), self.config.unimix)

    def _sample(self, log_probs: Tensor, uniform: Tensor) -> Tensor:
        probs = log_probs.exp()
        return straight_through(categorical_sample(probs, uniform), probs)

    def imagine_step(self, state: State, z: Tensor, action: Tensor, uniform: Tensor, dtype: torch.dtype) -> Latent:
        """One step without observation: memory (B, ...), z (B, G, C), action (B, A), uniform (B, G) noise."""
        first = torch.zeros(z.shape[0], dtype=torch.bool, device=z.device)
        h, state = self.core.step(self.core_input(z, action, first, dtype), state, first)
        return Latent(state, h, self._sample(self.prior_log_probs(h, dtype), uniform))

    def observe_step(
        self, state: State, z: Tensor, action: Tensor, first: Tensor, token: Tensor, uniform: Tensor
    ) -> tuple[Latent, Tensor]:
        """One step with an observation: memory (B, ...), z (B, G, C), action before it (B, A), token (B, E).

        Returns the new state and the posterior's log-probabilities (B, G, C). Computes in the dtype of the token.
        """
        h, state = self.core.step(self.core_input(z, action, first, token.dtype), state, first)
        seen = torch.cat([h.to(token.dtype), token], -1) if self.recurrent else token
        log_probs = self._log_probs(self.posterior(seen))
        return Latent(state, h, self._sample(log_probs, uniform)), log_probs

    def scan_step(self, carry: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        """`observe_step` in the form that `scan` runs: the memory in the order of its keys, then z."""
        *memory, z = carry
        latent, log_probs = self.observe_step(dict(zip(self.memory_keys, memory, strict=True)), z, *inputs)
        return (*(latent.state[key] for key in self.memory_keys), latent.z), (latent.h, log_probs)

    def observe(
        self, state: State, z: Tensor, action: Tensor, first: Tensor, token: Tensor, uniform: Tensor,
        chain: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]] | None = None,
        batched: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]] | None = None,
    ) -> Posterior:  # fmt: skip
        """Infer the states of a sequence.

        Args:
            state: memory before the first step (B, ...).
            z: code before the first step (B, G, C).
            action: the actions that led to each step (B, T, A).
            first: (B, T) bool.
            token: encoded observations (B, T, E).
            uniform: noise in [0, 1) (B, T, G).
            chain: `scan_step` of a frozen or compiled twin, for the loop; this module's own if None.
            batched: `scan_step` of this module, compiled or not, for the gradients of the weights.
        """
        if not self.recurrent:
            return self._observe_in_parallel(state, z, action, first, token, uniform)
        inputs = tuple(tensor.transpose(0, 1) for tensor in (action, first, token, uniform))
        carry = (*(state[key] for key in self.memory_keys), z)
        carries, (h, log_probs) = scan(
            chain or self.scan_step, batched or self.scan_step, tuple(self._step_parameters()), carry, inputs
        )
        *memory, codes = (tensor.transpose(0, 1) for tensor in carries)
        latent = Latent(dict(zip(self.memory_keys, memory, strict=True)), h.transpose(0, 1), codes)
        return Posterior(latent, log_probs.transpose(0, 1))

    def _step_parameters(self) -> list[nn.Parameter]:
        """What `scan_step` reads: everything but the prior."""
        modules = (self.z_input, self.action_input, self.core, self.posterior)
        return [parameter for module in modules for parameter in module.parameters()]

    def _observe_in_parallel(
        self, state: State, z: Tensor, action: Tensor, first: Tensor, token: Tensor, uniform: Tensor
    ) -> Posterior:
        log_probs = self._log_probs(self.posterior(token))
        codes = self._sample(log_probs, uniform)
        before = torch.cat([z.unsqueeze(1), codes[:, :-1]], 1)
        x = self.core_input(before, action, first, token.dtype)
        h, states = self.core.sequence(x, state, first, keep=range(x.shape[1]))
        return Posterior(Latent(states, h, codes), log_probs)
