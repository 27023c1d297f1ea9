"""What memories read, write by write, against loops over steps."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.cores import make_core
from agent.cores.attention import AttentionWindow
from agent.cores.core import RecurrentCore
from agent.cores.inspection import PIECE, look, mean_age
from agent.cores.memory import empty, read_by_steps
from agent.cores.reads import Read
from agent.schema import Config

INPUT, T = 6, PIECE + 9
READS = ["mlstm", "ortho_mlstm", "ortho_mlstm:form=exact", "ortho_mlstm:alpha_start=0.0", "mesa"]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
MakeCore = Callable[..., RecurrentCore]


@pytest.fixture
def make(debug_config: Callable[..., Config]) -> MakeCore:
    """Function of a name and settings: a core with weights that are nowhere 0 or 1."""

    def make(name: str, *settings: str, dtype: torch.dtype = torch.float64) -> RecurrentCore:
        config = debug_config(*(f"core.{setting}" for setting in settings), core=name).core
        torch.manual_seed(0)
        core = make_core(name, INPUT, config).to(dtype)
        for parameter in core.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        return core

    return make


def reader_of(make: MakeCore, name: str) -> Read:
    core, _, setting = name.partition(":")
    reader = make(core, *filter(None, [setting])).reader
    assert isinstance(reader, Read)
    return reader


def given(heads: int, size: int) -> Inputs:
    """q, k, v, log gates and first (2, T) with a reset."""
    q, k, v = torch.randn(3, 2, heads, T, size, dtype=torch.float64)
    log_input = torch.randn(2, heads, T, dtype=torch.float64)
    log_forget = F.logsigmoid(2 * torch.randn(2, heads, T, dtype=torch.float64) + 2)
    first = torch.zeros(2, T, dtype=torch.bool)
    first[0, T // 3] = first[1, T - 2] = True
    return q, k * size**-0.5, v, log_input, log_forget, first


@pytest.mark.parametrize("name", READS)
def test_values_times_their_weights_are_what_is_read(make: MakeCore, name: str) -> None:
    reader = reader_of(make, name)
    q, k, v, *rest = given(heads=2, size=8)
    written = reader.written(k, v)
    memory = empty(2, 2, 8, written.shape[-1])
    memory = type(memory)(*(part.double() for part in memory))
    with torch.no_grad():
        y, _ = read_by_steps(reader.read, q, k, written, *rest, memory)  # type: ignore[arg-type]
        weights, _ = look(reader, q, k, written, *rest, 8)  # type: ignore[arg-type]
    assert weights.shape == (2, 2, T, T)
    # Coefficients of the polynomial are rounded to fp32; the exact form inverts small singular values.
    torch.testing.assert_close(weights @ v, y, rtol=1e-5, atol=1e-6)
    assert weights.triu(1).abs().max() == 0
    assert weights[0, :, T // 3 :, : T // 3].abs().max() == 0, "what a reset emptied is read"


def test_plain_weights_and_ranks_are_those_of_a_loop_over_writes(make: MakeCore) -> None:
    q, k, v, log_input, log_forget, first = given(heads=2, size=8)
    weights, rank = look(reader_of(make, "mlstm"), q, k, v, log_input, log_forget, first, 8)
    for b, h in np.ndindex(2, 2):
        gate, C, n = np.zeros(T), np.zeros((8, 8)), np.zeros(8)
        for t in range(T):
            forget = 0.0 if first[b, t] else log_forget[b, h, t].exp().item()
            strength, key, value = log_input[b, h, t].exp().item(), k[b, h, t].numpy(), v[b, h, t].numpy()
            gate *= forget
            gate[t] = strength
            C, n = forget * C + strength * np.outer(key, value), forget * n + strength * key
            query = q[b, h, t].numpy()
            expected = gate * (k[b, h].numpy() @ query) / max(abs(query @ n), 1.0)
            np.testing.assert_allclose(weights[b, h, t].numpy(), expected, rtol=1e-4, atol=1e-6)
            s = np.linalg.svd(C, compute_uv=False) ** 2
            assert rank[b, h, t].item() == pytest.approx(s.sum() ** 2 / (s**2).sum(), rel=1e-6)


@pytest.mark.parametrize("name", ["mlstm", "ortho_mlstm", "mesa"])
def test_matrix_cores_tell_of_every_block_and_head(make: MakeCore, name: str) -> None:
    core = make(name)
    x, first = torch.randn(T, INPUT, dtype=torch.float64), torch.zeros(T, dtype=torch.bool)
    first[0] = True
    seen = core.inspect(x, first)
    blocks, heads = core.config.blocks, core.config.heads
    assert seen.weights is not None and seen.weights.shape == (blocks, heads, T, T)
    assert seen.rank is not None and seen.rank.shape == (blocks, heads, T)
    state = {key: value.double() for key, value in core.initial(1).items()}
    _, state = core.sequence(x[None], state, first[None])
    for block in range(blocks):
        expected = core.diagnostics(state)[f"effective_rank_{block}"]
        torch.testing.assert_close(seen.rank[block, :, -1].mean(), expected, rtol=1e-6, atol=0)


def test_attention_tells_what_it_reads(make: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make("attention", "window=5", dtype=torch.float32)
    assert isinstance(core, AttentionWindow)
    x, first = torch.randn(12, INPUT), torch.zeros(12, dtype=torch.bool)
    first[0] = first[7] = True
    attended: list[tuple[Tensor, Tensor]] = []  # values of all S steps, and what was read of them
    for block in core.blocks:
        plain = block._attend

        def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor, plain: Callable = plain) -> Tensor:
            attended.append((value, plain(query, key, value, *rest)))
            return attended[-1][1]

        monkeypatch.setattr(block, "_attend", attend)
    weights = core.inspect(x, first).weights
    assert weights is not None and weights.shape[2:] == (12, 12) and len(weights) == len(core.blocks)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    for own, (value, read) in zip(weights, attended, strict=True):
        values = value[0, core.window - 1 :].unflatten(-1, (len(own), -1)).transpose(0, 1)  # (heads, T, D)
        torch.testing.assert_close((own @ values).transpose(0, 1).flatten(1), read[0])
    assert weights[..., 7:, :7].abs().max() == 0 and weights[..., 6, :2].abs().max() == 0
    assert not core.blocks[0]._forward_pre_hooks


def test_a_vector_memory_tells_its_size_and_change(make: MakeCore) -> None:
    core = make("gru", dtype=torch.float32)
    x, first = torch.randn(5, INPUT), torch.tensor([True, False, False, True, False])
    seen = core.inspect(x, first)
    assert seen.weights is None and seen.rank is None and seen.size is not None and seen.change is not None
    h, _ = core.sequence(x[None], {"deter": torch.randn(1, core.feature_size)}, first[None])
    before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1) * ~first[:, None]
    torch.testing.assert_close(seen.size, h[0].norm(dim=-1))
    torch.testing.assert_close(seen.change, (h - before)[0].norm(dim=-1))


def test_mean_age_is_that_of_a_loop() -> None:
    weights = torch.randn(2, 7, 7).tril()
    for row, t in np.ndindex(2, 7):
        sizes = [abs(weights[row, t, u].item()) for u in range(t + 1)]
        expected = sum(size * (t - u) for u, size in enumerate(sizes)) / sum(sizes)
        assert mean_age(weights)[row, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert mean_age(torch.zeros(3, 3)).tolist() == [0, 0, 0]
