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

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.cores import RecurrentCore, State
from agent.cores.scan import Step, Tensors, scan
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


class Known(NamedTuple):
    """What of T steps does not depend on the memory, and is computed for all of them at once: everything (B, T, ...).

    With an observation posterior that is the codes, and with them the core's input. With a recurrent one it is the
    action's part of the core's input, and the token's share of what the posterior's first layer makes of [h, token].
    """

    steps: Tensors  # what `scan_step` reads of each step
    codes: tuple[Tensor, Tensor] | None  # z and its log-probabilities (B, T, G, C)


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
        # Heads and actor read [h, z], and z has one 1 in each group. Beside an h many times as long they would hardly
        # see it, and with an observation posterior nothing else tells them what was observed just now.
        self.core.scale_output_(math.sqrt(self.groups / self.core.feature_size))
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
        code = torch.where(first.unsqueeze(-1), 0.0, z.flatten(-2))
        return torch.cat([self.z_input(code.to(dtype)), self._action_part(action, first, dtype)], -1)

    def _action_part(self, action: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
        action = torch.where(first.unsqueeze(-1), 0.0, action / action.abs().clamp(min=1))
        return self.action_input(action.to(dtype))

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
        x = self._action_part(action, first, token.dtype)
        return self._step(state, z, x, first, self._token_part(token), uniform)

    def _step(
        self, state: State, z: Tensor, x: Tensor, first: Tensor, seen: Tensor, uniform: Tensor
    ) -> tuple[Latent, Tensor]:
        """`observe_step` where the shares of action and token are known: x, seen (B, hidden)."""
        code = torch.where(first.unsqueeze(-1), 0.0, z.flatten(-2))
        h, state = self.core.step(torch.cat([self.z_input(code.to(x.dtype)), x], -1), state, first)
        log_probs = self._log_probs(self._memory_part(h.to(x.dtype), seen) if self.recurrent else seen)
        return Latent(state, h, self._sample(log_probs, uniform)), log_probs

    def _token_part(self, token: Tensor) -> Tensor:
        """What the posterior makes of tokens (..., E) alone: its logits, or a share of its first layer in fp32."""
        if not self.recurrent:
            return self.posterior(token)
        linear = self._first_layer.linear
        assert linear.bias is not None
        share = F.linear(token, linear.weight[:, self.core.feature_size :].to(token.dtype))
        return share.to(linear.bias.dtype) + linear.bias

    def _memory_part(self, h: Tensor, seen: Tensor) -> Tensor:
        """The posterior's logits from h (..., F) and the token's share (..., hidden) of its first layer."""
        layer, (layers, output) = self._first_layer, self.posterior.children()
        share = F.linear(h, layer.linear.weight[:, : self.core.feature_size].to(h.dtype)).to(seen.dtype)
        hidden = F.silu(layer.norm(share + seen)).to(h.dtype)
        for later in layers.children():
            hidden = hidden if later is layer else later(hidden)
        return output(hidden)

    @property
    def _first_layer(self) -> Layer:
        """Of the posterior."""
        return next(module for module in self.posterior.modules() if isinstance(module, Layer))

    def scan_step(self, carry: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        """One step in the form that `scan` runs.

        With a recurrent posterior, carry is the memory in the order of its keys, then z; inputs are those of `_step`.
        With an observation posterior z is known, and the core alone runs through time: carry is the memory.

        Returns:
            The carry after the step; h and, with a recurrent posterior, z and its log-probabilities. What is carried is
            there twice, as two tensors, so that it is the compiled step that adds up the gradients from outside and
            from later on.
        """
        if not self.recurrent:
            x, first = inputs
            h, state = self.core.step(x, self._named(carry), first)
            return tuple(state[key] for key in self.memory_keys), (h.clone(),)
        *memory, z = carry
        latent, log_probs = self._step(self._named(memory), z, *inputs)
        carried = (*(latent.state[key] for key in self.memory_keys), latent.z)
        return carried, (latent.h.clone(), latent.z.clone(), log_probs)

    def _named(self, memory: Sequence[Tensor]) -> State:
        return dict(zip(self.memory_keys, memory, strict=True))

    def observe(
        self, state: State, z: Tensor, action: Tensor, first: Tensor, token: Tensor, uniform: Tensor
    ) -> Posterior:
        """Infer the states of a sequence.

        Args:
            state: memory before the first step (B, ...).
            z: code before the first step (B, G, C).
            action: the actions that led to each step (B, T, A).
            first: (B, T) bool.
            token: encoded observations (B, T, E).
            uniform: noise in [0, 1) (B, T, G).
        """
        return self.run(state, z, self.know(z, action, first, token, uniform))

    def know(self, z: Tensor, action: Tensor, first: Tensor, token: Tensor, uniform: Tensor) -> Known:
        """The part of `observe` that works on all steps at once, whatever the core; arguments as there."""
        dtype, seen = token.dtype, self._token_part(token)
        if self.recurrent:
            return Known((self._action_part(action, first, dtype), first, seen, uniform), None)
        log_probs = self._log_probs(seen)
        codes = self._sample(log_probs, uniform)
        before = torch.cat([z.unsqueeze(1), codes[:, :-1]], 1)
        return Known((self.core_input(before, action, first, dtype), first), (codes, log_probs))

    @property
    def runs_in_parallel(self) -> bool:
        """Whether nothing of `observe` goes step by step."""
        return not self.recurrent and self.core.parallel_in_time

    def run(
        self, state: State, z: Tensor, known: Known, chain: Step | None = None, batched: Step | None = None
    ) -> Posterior:
        """The part of `observe` that memory runs through.

        Args:
            state: memory before the first step (B, ...).
            z: code before the first step (B, G, C).
            known: what `know` gave.
            chain: `scan_step` of a frozen or compiled twin, for the loop; this module's own if None.
            batched: `scan_step` of this module, compiled or not, for the gradients of the weights.
        """
        if known.codes is not None and self.core.parallel_in_time:
            x, first = known.steps
            h, state = self.core.sequence(x, state, first, keep=range(x.shape[1]))
            if self.query is None:  # nothing that learns reads them: a gradient of zeros would cost as a real one does
                state = {key: value.detach() for key, value in state.items()}
            codes, log_probs = known.codes
            return Posterior(Latent(state, h, codes), log_probs)
        carry = tuple(state[key] for key in self.memory_keys) + ((z,) if self.recurrent else ())
        carries, outputs = scan(
            chain or self.scan_step, batched or self.scan_step, tuple(self._step_parameters()),
            carry, tuple(tensor.transpose(0, 1) for tensor in known.steps),
        )  # fmt: skip
        h, *inferred = (tensor.transpose(0, 1) for tensor in outputs)
        codes, log_probs = known.codes or inferred
        memory = [tensor.transpose(0, 1) for tensor in carries[: len(self.memory_keys)]]
        return Posterior(Latent(self._named(memory), h, codes), log_probs)

    def _step_parameters(self) -> list[nn.Parameter]:
        """What `scan_step` reads."""
        modules = (self.z_input, self.core, self.posterior) if self.recurrent else (self.core,)
        return [parameter for module in modules for parameter in module.parameters()]
