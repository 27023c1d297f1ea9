"""The smallest sequence model around a core: tokens in, logits of the next token out."""

from typing import Any

import torch
from torch import Tensor, nn

from agent.cores import RecurrentCore, State, make_core
from agent.networks import Linear
from agent.probe.config import Probe


class SequenceModel(nn.Module):
    """Embedding, core, linear head. What happens between tokens is the core's alone."""

    def __init__(self, core: RecurrentCore, vocab: int, embedding: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab, embedding)
        self.core = core
        self.head = Linear(core.feature_size, vocab)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, State]:
        """Tokens (B, T) -> logits (B, T, vocab) in at least fp32, and the memory after the last step.

        Matrix products are in `dtype`.
        """
        x = self.embedding(tokens).to(dtype)
        state = self.core.initial(len(tokens))
        first = torch.zeros_like(tokens, dtype=torch.bool)
        if self.core.parallel_in_time:
            h, state = self.core.sequence(x, state, first)
        else:  # by steps under plain autograd, as loops with a gradient of their own cannot run for many models at once
            outputs = []
            for t in range(tokens.shape[1]):
                h, state = self.core.step(x[:, t], state, first[:, t])
                outputs.append(h)
            h = torch.stack(outputs, 1)
        logits = self.head(h.to(dtype))
        return logits.to(torch.promote_types(dtype, torch.float32)), state


def make_model(probe: Probe, vocab: int, seed: int, core: tuple[str, Any] | None = None) -> SequenceModel:
    """The model of one seed, on the CPU: equal seeds have equal weights, whatever is drawn elsewhere.

    `core` is a name and a configuration to take in the place of the probe's own.
    """
    name, config = core or (probe.core_name, probe.core)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SequenceModel(make_core(name, probe.embedding, config), vocab, probe.embedding)
