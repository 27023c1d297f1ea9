"""The mLSTM cores against their formulas, and what they have beyond the contract of `test_cores`."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agent.cores import RecurrentCore, State, make_core
from agent.cores.least_squares import TRACE_FLOOR
from agent.cores.memory import EMPTY
from agent.cores.mlstm import MLSTM
from agent.cores.rotary import rotate, turns
from agent.schema import Config

INPUT, B, T = 6, 3, 11

MakeCore = Callable[..., MLSTM]


@pytest.fixture
def make(debug_config: Callable[..., Config]) -> MakeCore:
    """Function of a name, settings and a dtype: a core with weights that are nowhere 0 or 1."""

    def make(name: str, *settings: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> RecurrentCore:
        config = debug_config(*(f"core.{setting}" for setting in settings), core=name).core
        torch.manual_seed(seed)
        core = make_core(name, INPUT, config).to(dtype)
        for parameter in core.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        return core

    return make


def start(core: RecurrentCore) -> State:
    dtype = next(core.parameters()).dtype
    return {key: value.to(dtype) for key, value in core.initial(B).items()}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    first = torch.zeros(B, T, dtype=torch.bool)
    first[0, 4] = first[1, 0] = first[2, 9] = True
    return torch.randn(B, T, INPUT, dtype=dtype), first


def loop(core: RecurrentCore, x: Tensor, state: State, first: Tensor) -> tuple[Tensor, State]:
    outputs = []
    for t in range(x.shape[1]):
        h, state = core.step(x[:, t], state, first[:, t])
        outputs.append(h)
    return torch.stack(outputs, 1), state


def gradients_of(core: RecurrentCore, h: Tensor, weight: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((h * weight).sum(), list(core.parameters())))


# ---- formulas ------------------------------------------------------------------------------------------------


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def silu(x: Any) -> Any:
    return x * sigmoid(x)


def rms(x: Any, scale: Any) -> Any:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-4) * scale


def cubic_read(C: Any) -> Any:
    u, s, v = np.linalg.svd(C / np.linalg.norm(C))
    for _ in range(5):
        s = s * (3 - s**2) / 2
    return u @ np.diag(s) @ v


def reference(core: MLSTM, x: Any, first: Any) -> Any:
    """One stream x (T, X) from empty memories, head by head and step by step in unstabilised numbers."""
    weights = {key: value.detach().numpy() for key, value in core.state_dict().items()}
    config, results = core.config, []
    heads, d = config.heads, config.head_dim
    x = x @ weights["input.weight"].T + weights["input.bias"]
    for index in range(config.blocks):
        prefix = f"blocks.{index}."
        w = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        C, G, n, heaviest = np.zeros((heads, d, d)), np.zeros((heads, d, d)), np.zeros((heads, d)), np.zeros(heads)
        past: list[Any] = []
        results, clock = [], 0
        for t in range(len(x)):
            if first[t]:
                C, G, n, heaviest, past, clock = 0 * C, 0 * G, 0 * n, 0 * heaviest, [], 0
            clock += 1
            u, z = np.split(w["up.weight"] @ rms(x[t], w["norm.scale"]), 2)
            past = [*past, u][-config.conv :]
            c = silu(sum(w["conv"][:, -1 - ago] * past[-1 - ago] for ago in range(len(past))) + w["conv_bias"])
            parts = []
            for name, branch in (("query", c), ("key", c), ("value", u)):
                weight = w[f"{name}.weight"]  # (blocks, width, width)
                by_block = np.einsum("gd,gde->ge", branch.reshape(len(weight), -1), weight)
                parts.append((by_block.reshape(-1) + w[f"{name}.bias"]).reshape(heads, d))
            i, f = np.split(w["gates"] @ np.concatenate([p.reshape(-1) for p in parts]) + w["gates_bias"], 2)
            i, f = (np.exp(i) if config.input_gate == "exponential" else sigmoid(i)), sigmoid(f)
            q, k, v = parts
            if config.unit_norm:
                q, k = (part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (q, k))
            for head in range(config.rotary_heads):  # pairs as complex numbers
                turn = np.exp(1j * clock * np.pi * (2 * np.arange(d // 2) * config.rotary_heads + 2 * head + 1)
                              / (config.rotary_heads * d))  # fmt: skip
                for part in (q, k):
                    pairs = (part[head, : d // 2] + 1j * part[head, d // 2 :]) * turn
                    part[head] = np.concatenate([pairs.real, pairs.imag])
            k = k / np.sqrt(d)
            C = f[:, None, None] * C + i[:, None, None] * k[:, :, None] * v[:, None, :]
            G = f[:, None, None] * G + i[:, None, None] * k[:, :, None] * k[:, None, :]
            n, heaviest = f[:, None] * n + i[:, None] * k, np.maximum(f * heaviest, i)
            y = np.empty((heads, d))
            for head in range(heads):
                if hasattr(config, "map"):
                    y[head] = q[head] @ cubic_read(C[head])
                elif hasattr(config, "ridge"):
                    strength = config.ridge * (np.trace(G[head]) + TRACE_FLOOR * heaviest[head]) / d
                    y[head] = np.linalg.solve(G[head] + strength * np.eye(d), q[head] / np.sqrt(d)) @ C[head]
                else:
                    y[head] = q[head] @ C[head] / max(abs(q[head] @ n[head]), 1)
            y = rms(y, w["head_norm.scale"]).reshape(-1)
            results.append(x[t] + w["down.weight"] @ ((y + w["skip"] * c) * silu(z)))
        x = np.stack(results)
    return rms(x, weights["norm.scale"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlstm", ["unit_norm=false", "input_gate=exponential"]),
        ("mlstm", ["unit_norm=true", "input_gate=sigmoid", "conv=3", "blocks=1"]),
        ("mlstm", ["qkv_block=2"]),
        ("mlstm", ["rotary_heads=0"]),
        ("ortho_mlstm", ["form=exact", "rotary_heads=2"]),
        ("mesa", ["rotary_heads=2"]),
        ("ortho_mlstm", ["form=exact"]),
        ("ortho_mlstm", ["degree=41"]),
        ("mesa", []),
        ("mesa", ["unit_norm=false", "input_gate=sigmoid", "ridge=0.3"]),
    ],
)
def test_core_follows_the_formulas(make: MakeCore, name: str, settings: list[str]) -> None:
    core = make(name, *settings)
    x, first = inputs()
    expected = np.stack([reference(core, x[b].numpy(), first[b].numpy()) for b in range(B)])
    for run in (core.sequence, lambda *arguments: loop(core, *arguments)):
        h, _ = run(x, start(core), first)
        # What differs: the constants that keep divisions by almost nothing apart.
        np.testing.assert_allclose(h.detach().numpy(), expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    "settings",
    [
        ["input_gate=sigmoid"],
        ["unit_norm=false"],
        ["form=exact"],
        ["form=exact", "map=pe3", "alpha_start=0.3"],
        ["map=pe2", "degree=25"],
        ["degree=17", "alpha_start=0.5"],
        ["alpha_start=0.0"],
        ["degree=1"],
        ["rotary_heads=2"],
        ["ridge=0.3", "iterations=20"],
        ["ridge_learned=true", "unit_norm=false"],
    ],
    ids=" ".join,
)
def test_every_choice_has_equal_step_and_sequence(make: MakeCore, settings: list[str]) -> None:
    core = make("mesa" if "ridge" in settings[0] else "ortho_mlstm", *settings)
    x, first = inputs()
    weight = torch.randn(B, T, core.feature_size, dtype=torch.float64)
    (h, end), (expected, expected_end) = core.sequence(x, start(core), first), loop(core, x, start(core), first)
    torch.testing.assert_close(h, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(end, expected_end, rtol=1e-9, atol=1e-11)
    for a, b in zip(gradients_of(core, h, weight), gradients_of(core, expected, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_a_rotary_memory_goes_on_after_a_cut_and_is_asked_at_its_own_time(make: MakeCore) -> None:
    core, (x, first), query = make("mlstm", "rotary_heads=1"), inputs(), torch.randn(B, 16, dtype=torch.float64)
    h, end = core.sequence(x, start(core), first, keep=range(T))
    for cut in (3, 4, 5):
        head, carried = core.sequence(x[:, :cut], start(core), first[:, :cut])
        tail, after = core.sequence(x[:, cut:], carried, first[:, cut:])
        torch.testing.assert_close(torch.cat([head, tail], 1), h, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(after, {key: value[:, -1] for key, value in end.items()}, rtol=1e-10, atol=1e-12)
    assert end["clock"][..., 0].tolist() == [[*range(1, 5), *range(1, 8)], [*range(1, 12)], [*range(1, 10), 1, 2]]
    # A memory of the same writes, all k steps later, answers the same at its own time: only lags count.
    state = {key: value[:, -1] for key, value in end.items()}
    memory, turn = core.memory_of_block(1, state), turns(torch.full((B, 1), 5.0, dtype=torch.float64), 1, 8)
    later = rotate(memory.C.transpose(-1, -2), turn).transpose(-1, -2)
    n = rotate(memory.n.unsqueeze(2), turn).squeeze(2)
    moved = state | {"memory_1": later, "normaliser_1": n, "clock": state["clock"] + 5}
    torch.testing.assert_close(core.read(query, moved), core.read(query, state), rtol=1e-9, atol=1e-11)
    assert not torch.allclose(core.read(query, state | {"clock": state["clock"] + 5}), core.read(query, state))


@pytest.mark.parametrize("heads", [1, 3])
def test_rotary_heads_are_a_ring_of_as_many_steps_as_they_have_numbers(heads: int) -> None:
    dim, steps = 8, 8 * heads
    time = torch.arange(1.0, steps + 1, dtype=torch.float64).unsqueeze(0) + 1000
    keys = rotate(torch.ones(1, heads, steps, dim, dtype=torch.float64), turns(time, heads, dim))[0]  # (R, steps, D)
    together = torch.einsum("htd,hud->tu", keys, keys)
    torch.testing.assert_close(together, heads * dim * torch.eye(steps, dtype=torch.float64), rtol=0, atol=1e-9)


def test_polynomial_and_exact_form_are_the_same_core(make: MakeCore) -> None:
    x, first = inputs()
    polynomial, exact = make("ortho_mlstm", "degree=21"), make("ortho_mlstm", "form=exact")
    exact.load_state_dict(polynomial.state_dict())
    ours, theirs = (core.sequence(x, start(core), first)[0] for core in (polynomial, exact))
    assert 0 < (ours - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["polynomial", "exact"])
def test_at_alpha_zero_it_is_the_plain_core_bit_for_bit(make: MakeCore, form: str, dtype: torch.dtype) -> None:
    ortho = make("ortho_mlstm", "alpha_start=0.0", f"form={form}", dtype=torch.float32)
    plain = make("mlstm", "unit_norm=true", dtype=torch.float32, seed=1)
    plain.load_state_dict({k: v for k, v in ortho.state_dict().items() if not k.startswith("reader.")})
    x, first = inputs(torch.float32)
    x, query = x.to(dtype), torch.randn(B, plain.query_size).to(dtype)
    weight = torch.randn(B, T, plain.feature_size)
    for name in ("sequence", "loop"):
        results = []
        for core in (ortho, plain):
            run = core.sequence if name == "sequence" else lambda *arguments, core=core: loop(core, *arguments)
            h, end = run(x, start(core), first)
            results.append([h, *end.values(), core.read(query, end), *gradients_of(core, h, weight)])
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


# ---- what changes with training ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "dtype"),
    [
        ("mlstm", [], torch.bfloat16),
        ("ortho_mlstm", ["alpha_start=0"], torch.bfloat16),
        ("ortho_mlstm", [], torch.float32),
        ("mesa", [], torch.float32),
    ],
)
def test_imagination_rounds_matrices_that_are_read_plainly(
    make: MakeCore, name: str, settings: list[str], dtype: torch.dtype
) -> None:
    core = make(name, *settings)
    state = core.for_imagination(core.initial(2), torch.bfloat16)
    found = {key: value.dtype for key, value in state.items()}
    assert found == {key: dtype if key.startswith("memory_") else torch.float32 for key in found}


def test_linear_schedule_moves_alpha_and_says_when_it_is_zero(make: MakeCore) -> None:
    core = make("ortho_mlstm", "alpha_schedule=linear", "alpha_start=0.8", "alpha_end=0.0", "alpha_updates=100")
    x, first = inputs()
    alpha, coefficients = core.reader.alpha, core.reader.coefficients
    outputs = []
    for updates, expected, other_path in ((0, 0.8, False), (50, 0.4, False), (100, 0.0, True), (150, 0.0, False)):
        assert core.schedule(updates, {}) == other_path
        assert float(core.reader.alpha) == pytest.approx(expected)
        outputs.append(core.sequence(x, start(core), first)[0])
    assert core.reader.plain and core.reader.alpha is alpha and core.reader.coefficients is coefficients
    assert [torch.equal(a, b) for a, b in itertools.pairwise(outputs)] == [False, False, True]
    rising = make("ortho_mlstm", "alpha_schedule=linear", "alpha_start=0.0", "alpha_end=0.5", "alpha_updates=10")
    assert rising.reader.plain
    assert [rising.schedule(updates, {}) for updates in (0, 1, 5)] == [False, True, False]


@pytest.mark.parametrize(("side", "not_yet", "past"), [("above", 0.4, 0.6), ("below", 0.6, 0.4)])
def test_release_waits_for_the_metric(make: MakeCore, side: str, not_yet: float, past: float) -> None:
    settings = ["alpha_schedule=release", "alpha_updates=100", "alpha_metric=score", "alpha_bar=0.5"]
    core = make("ortho_mlstm", *settings, f"alpha_side={side}")
    for updates, metrics in ((10, {"score": not_yet}), (20, {}), (30, {"score": float("nan")}), (40, {"other": past})):
        assert not core.schedule(updates, metrics)
        assert float(core.reader.alpha) == 1
    core.schedule(50, {"score": past})
    assert float(core.reader.alpha) == 1
    core.schedule(75, {"score": not_yet})  # once released it stays so
    assert float(core.reader.alpha) == pytest.approx(0.75)

    resumed = make("ortho_mlstm", *settings, f"alpha_side={side}", seed=1)
    resumed.load_state_dict(core.state_dict())
    x, first = inputs()
    assert torch.equal(resumed.sequence(x, start(core), first)[0], core.sequence(x, start(core), first)[0])
    assert resumed.schedule(150, {}) and resumed.reader.plain
    again = make("ortho_mlstm", *settings, f"alpha_side={side}")
    again.load_state_dict(resumed.state_dict())
    assert again.reader.plain and not again.schedule(160, {})


def test_constant_schedule_and_plain_core_never_change(make: MakeCore) -> None:
    for core in (make("ortho_mlstm", "alpha_start=0.7"), make("mlstm")):
        before = {key: value.clone() for key, value in core.state_dict().items()}
        assert not core.schedule(10**6, {"loss/reconstruction": 0.0})
        torch.testing.assert_close(core.state_dict(), before)


# ---- the rest ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlstm", "ortho_mlstm", "mesa"])
@pytest.mark.parametrize("bias", [-50.0, 50.0])
def test_extreme_gates_give_finite_outputs_and_gradients(make: MakeCore, name: str, bias: float) -> None:
    core = make(name, dtype=torch.float32)
    for block in core.blocks:
        block.gates_bias.data[: core.config.heads] = bias
        block.gates_bias.data[core.config.heads :] = -bias
    x, first = inputs(torch.float32)
    for run in (core.sequence, lambda *arguments: loop(core, *arguments)):
        h, end = run(x, start(core), first)
        assert h.isfinite().all() and all(value.isfinite().all() for value in end.values())
        assert all(gradient.isfinite().all() for gradient in gradients_of(core, h, torch.randn_like(h)))


def test_it_begins_with_an_empty_memory_and_constant_gates(debug_config: Callable[..., Config]) -> None:
    core = make_core("mlstm", INPUT, debug_config("core.heads=4", core="mlstm").core)
    state = core.initial(2)
    parts = ("memory", "normaliser", "stabiliser", "conv")
    assert sorted(state) == sorted(["clock", *(f"{part}_{i}" for part in parts for i in range(2))])
    for key, value in state.items():
        assert (value == (EMPTY if key.startswith("stabiliser") else 0)).all()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    for block in core.blocks:
        assert (block.gates == 0).all()
        torch.testing.assert_close(block.gates_bias[4:], torch.tensor([3.0, 4.0, 5.0, 6.0]))
        assert 0 < block.gates_bias[:4].abs().max() < 0.5


def test_second_read_asks_the_last_memory_without_changing_it(make: MakeCore) -> None:
    core = make("mlstm", "unit_norm=false", "rotary_heads=0")
    x, first = inputs()
    _, state = core.sequence(x, start(core), first)
    query = torch.randn(B, core.query_size, dtype=torch.float64, requires_grad=True)
    before = {key: value.clone() for key, value in state.items()}
    answer = core.read(query, state)
    q = query.detach().numpy().reshape(B, core.config.heads, -1)
    y = np.einsum("bhk,bhkv->bhv", q, state["memory_1"].detach().numpy())  # the norm cancels the normaliser
    y /= np.sqrt((y**2).mean(-1, keepdims=True))
    assert answer.shape == (B, core.read_size)
    np.testing.assert_allclose(answer.detach().numpy(), y.reshape(B, -1), rtol=0.1, atol=0.02)
    torch.testing.assert_close(state, before, rtol=0, atol=0)
    gradients = torch.autograd.grad(answer.square().sum() + answer.sum(), [query, *core.blocks[1].key.parameters()])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("input_gate", ["exponential", "sigmoid"])
def test_diagnostics_are_norm_effective_rank_and_gates(make: MakeCore, input_gate: str) -> None:
    core = make("mlstm", f"input_gate={input_gate}")
    x, first = inputs()
    _, state = core.sequence(x, start(core), first)
    numbers = core.diagnostics(state)
    for index in range(2):
        C, m = (state[f"{part}_{index}"].detach().numpy() for part in ("memory", "stabiliser"))
        s = np.linalg.svd(C, compute_uv=False)
        norms = np.log(np.linalg.norm(C, axis=(-2, -1))) + m
        ranks = (s**2).sum(-1) ** 2 / (s**4).sum(-1)
        assert numbers[f"log_norm_{index}"].item() == pytest.approx(norms.mean())
        assert numbers[f"effective_rank_{index}"].item() == pytest.approx(ranks.mean())
    for block in core.blocks:
        block.gates.data.zero_()
    core.sequence(x, start(core), first)
    with torch.no_grad():
        core.step(x[:, 0] * 100, state, first[:, 0])  # acting leaves the statistics of training as they are
    for index, block in enumerate(core.blocks):
        input_bias, forget_bias = block.gates_bias.detach().view(2, -1)
        found = core.diagnostics(state)
        log_input = input_bias if input_gate == "exponential" else torch.nn.functional.logsigmoid(input_bias)
        torch.testing.assert_close(found[f"log_input_gate_{index}"], log_input.mean())
        torch.testing.assert_close(found[f"forget_gate_{index}"], forget_bias.sigmoid().mean())
    assert all(number.dim() == 0 and not number.requires_grad for number in numbers.values())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["form=polynomial", "map=polar"], "polar"),
        (["degree=20"], "degree"),
        (["alpha_start=1.5"], "alpha_start"),
        (["map=quintic"], "map"),
        (["conv=1"], "conv"),
        (["heads=0"], "heads"),
        (["input_gate=tanh"], "input_gate"),
    ],
)
def test_what_cannot_be_is_named(make: MakeCore, settings: list[str], named: str) -> None:
    with pytest.raises(Exception, match=named):
        make("ortho_mlstm", *settings)
