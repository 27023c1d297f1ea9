"""What the core mesa has beyond the contract of `test_cores` and the formulas of `test_mlstm`."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from agent.cores import State, make_core
from agent.cores.least_squares import TRACE_FLOOR
from agent.cores.mesa import Mesa
from agent.schema import Config

INPUT, B, T = 6, 3, 11

MakeCore = Callable[..., Mesa]


@pytest.fixture
def make(debug_config: Callable[..., Config]) -> MakeCore:
    """Function of settings: a core with weights that are nowhere 0 or 1."""

    def make(*settings: str, name: str = "mesa", dtype: torch.dtype = torch.float64) -> Mesa:
        config = debug_config(*(f"core.{setting}" for setting in settings), core=name).core
        torch.manual_seed(0)
        core = make_core(name, INPUT, config).to(dtype)
        for parameter in core.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        return core  # type: ignore[return-value]

    return make


def given(core: Mesa) -> tuple[Tensor, State, Tensor]:
    """Inputs, an empty memory and resets for `sequence`."""
    dtype = core.norm.scale.dtype
    first = torch.zeros(B, T, dtype=torch.bool)
    first[0, 4] = first[1, 0] = first[2, 9] = True
    state = {key: value.to(dtype) for key, value in core.initial(B).items()}
    return torch.randn(B, T, INPUT, dtype=dtype), state, first


def test_answers_a_second_read_with_its_last_memory(make: MakeCore) -> None:
    core = make("rotary_heads=0")
    d, state = core.config.head_dim, core.sequence(*given(core))[1]
    query = torch.randn(B, core.query_size, dtype=torch.float64, requires_grad=True)
    answer = core.read(query, state)
    q = query.detach().numpy().reshape(B, core.config.heads, d)
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    C, G = np.split(state["memory_1"].detach().numpy(), 2, -1)
    strength = core.config.ridge * (np.trace(G, axis1=-2, axis2=-1) + TRACE_FLOOR) / d
    x = np.linalg.solve(G + strength[..., None, None] * np.eye(d), q[..., None] / np.sqrt(d))
    y = (x * C).sum(-2)
    y /= np.sqrt((y**2).mean(-1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(answer.detach().numpy(), y.reshape(B, -1), rtol=1e-6, atol=1e-8)
    gradients = torch.autograd.grad(answer.square().sum() + answer.sum(), [query, *core.blocks[1].key.parameters()])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_keeps_the_gram_matrix_at_every_kept_step(make: MakeCore) -> None:
    core = make()
    assert core.initial(2)["memory_0"].shape == (2, core.config.heads, core.config.head_dim, 2 * core.config.head_dim)
    _, kept = core.sequence(*given(core), keep=[2, 7])
    for index in range(2):
        G = kept[f"memory_{index}"][..., core.config.head_dim :]
        torch.testing.assert_close(G, G.mT)
        assert torch.linalg.eigvalsh(G).min() > -1e-12 and G.diagonal(dim1=-2, dim2=-1).min() > 0


def test_tells_the_rank_of_its_keys(make: MakeCore) -> None:
    core = make()
    _, state = core.sequence(*given(core))
    numbers, plain = core.diagnostics(state), make(name="mlstm").diagnostics
    C, G = zip(*(state[f"memory_{index}"].chunk(2, -1) for index in range(2)), strict=True)
    for index in range(2):
        s = np.linalg.eigvalsh(G[index].detach().numpy())
        ranks = s.sum(-1) ** 2 / (s**2).sum(-1)
        assert numbers[f"key_rank_{index}"].item() == pytest.approx(ranks.mean())
    # The rest is that of the matrix alone.
    expected = plain(state | {f"memory_{index}": C[index] for index in range(2)})
    for key in ("log_norm_0", "effective_rank_1"):
        torch.testing.assert_close(numbers[key], expected[key])
    assert numbers["ridge"].item() == pytest.approx(0.1)
    assert all(number.dim() == 0 and not number.requires_grad for number in numbers.values())
    assert core.diagnostics(given(core)[1])["key_rank_0"] == 0


def test_ridge_is_learned_from_where_it_is_set_and_never_below_its_floor(make: MakeCore) -> None:
    core = make("ridge_learned=true", "ridge=0.2", "ridge_floor=0.05")
    h, _ = core.sequence(*given(core))
    (gradient,) = torch.autograd.grad((h * torch.randn_like(h)).sum(), [core.reader.free_ridge])
    assert gradient.abs().min() > 0
    core.reader.free_ridge.data.fill_(-1e3)
    torch.testing.assert_close(core.reader.ridges(), torch.full_like(gradient, 0.05))
    fixed = make("ridge=0.2")
    fresh = type(core.reader)(2, core.config)
    torch.testing.assert_close(fresh.ridges(), torch.full((2,), 0.2))
    assert [name for name, _ in fixed.named_parameters() if "ridge" in name] == []


def test_is_one_graph_for_the_compiler(make: MakeCore) -> None:
    core = make("iterations=2", "blocks=1", dtype=torch.float32)
    x, state, first = given(core)
    compiled = torch.compile(core.step, fullgraph=True, dynamic=False, backend="aot_eager")
    results = []
    for step in (core.step, compiled):
        h, _ = step(x[:, 0], state, first[:, 0])
        results.append([h, *torch.autograd.grad(h.square().sum(), list(core.parameters()))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("setting", "named"), [("ridge=0.03", "ridge_floor"), ("iterations=0", "iterations")])
def test_what_least_squares_cannot_do_is_named(make: MakeCore, setting: str, named: str) -> None:
    with pytest.raises(Exception, match=named):
        make(setting)
