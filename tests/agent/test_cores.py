"""The contract that every registered core keeps, and the block GRU against its formulas."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from finite_differences import check_gradients
from torch import Tensor

from agent.cores import RecurrentCore, State, make_core, registered_cores
from agent.cores.gru import BlockGRU
from agent.cores.gru import BlockGRUConfig as GRUConfig
from agent.optimizer import LaProp
from agent.schema import Config, Optimizer

INPUT, B, T = 6, 3, 7
BF16_DRIFT = 0.03  # largest share of a stream's outputs, in norm, that 64 steps with products in bf16 may be off

MakeCore = Callable[..., RecurrentCore]


@pytest.fixture(params=sorted(registered_cores()))
def core_of_size_debug(request: pytest.FixtureRequest, debug_config: Callable[..., Config]) -> MakeCore:
    """Function of a dtype and a seed: a new core of each kind."""
    config = debug_config(core=request.param).core

    def make(dtype: torch.dtype = torch.float64, seed: int = 0) -> RecurrentCore:
        torch.manual_seed(seed)
        return make_core(request.param, INPUT, config).to(dtype)

    return make


@pytest.fixture
def core(core_of_size_debug: MakeCore) -> RecurrentCore:
    return core_of_size_debug()


def one_by_one(core: RecurrentCore, x: Tensor, state: State, first: Tensor) -> tuple[Tensor, State]:
    """T calls of `step` with ordinary autograd: h (B, T, F) and the state after every step (B, T, ...)."""
    outputs, states = [], []
    for t in range(x.shape[1]):
        h, state = core.step(x[:, t], state, first[:, t])
        outputs.append(h)
        states.append(state)
    return torch.stack(outputs, 1), {key: torch.stack([s[key] for s in states], 1) for key in state}


def used_state(core: RecurrentCore, batch: int = B) -> State:
    """A memory (B, ...) that holds something, as three random inputs leave it."""
    dtype = next(core.parameters()).dtype
    state = {key: value.to(dtype) for key, value in core.initial(batch).items()}
    with torch.no_grad():
        x = torch.randn(batch, 3, INPUT, dtype=dtype)
        _, states = one_by_one(core, x, state, torch.zeros(batch, 3, dtype=torch.bool))
    return {key: value[:, -1].clone() for key, value in states.items()}


def some_first() -> Tensor:
    first = torch.zeros(B, T, dtype=torch.bool)
    first[0, 3] = first[1, 0] = first[1, 5] = True
    return first


def inputs() -> Tensor:
    return torch.randn(B, T, INPUT, dtype=torch.float64)


def test_declares_what_it_is(core: RecurrentCore) -> None:
    assert isinstance(core.parallel_in_time, bool)
    state = core.initial(4)
    for value in state.values():
        assert value.shape[0] == 4
        assert value.dtype == torch.float32
    h, after = core.step(torch.randn(4, INPUT).double(), state, torch.zeros(4, dtype=torch.bool))
    assert h.shape == (4, core.feature_size)
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in state.items()}


def test_sequence_equals_steps_with_values_and_all_gradients(core: RecurrentCore) -> None:
    x, state = inputs().requires_grad_(), used_state(core)
    for value in state.values():
        value.requires_grad_()
    sources = [x, *state.values(), *core.parameters()]
    h_weight = torch.randn(B, T, core.feature_size, dtype=torch.float64)
    state_weights = {key: torch.randn(B, T, *value.shape[1:], dtype=torch.float64) for key, value in state.items()}
    results, gradients = [], []
    for h, states in (
        core.sequence(x, state, some_first(), keep=range(T)),
        one_by_one(core, x, state, some_first()),
    ):
        loss = (h * h_weight).sum() + sum((states[key] * state_weights[key]).sum() for key in states)
        results.append([h, *(states[key] for key in sorted(states))])
        gradients.append(torch.autograd.grad(loss, sources))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
        assert theirs.abs().max() > 0


def test_imagination_may_carry_a_memory_in_bf16(core_of_size_debug: MakeCore) -> None:
    """Over the steps of an imagination; what is read the second time too."""
    core = core_of_size_debug(torch.float32)
    state, x, first = used_state(core), torch.randn(B, 15, INPUT), torch.zeros(B, 15, dtype=torch.bool)
    same = core.for_imagination(state, torch.float32)
    assert all(same[key] is value for key, value in state.items())
    light = core.for_imagination(state, torch.bfloat16)
    assert {key: value.shape for key, value in light.items()} == {key: value.shape for key, value in state.items()}
    with torch.no_grad():
        h, states = one_by_one(core, x, light, first)
        exact, exact_states = one_by_one(core, x, state, first)
    assert {key: value.dtype for key, value in states.items()} == {key: value.dtype for key, value in light.items()}
    assert h.dtype == exact.dtype
    assert (h - exact).norm() < 0.01 * exact.norm()
    if core.read_size:
        query = torch.randn(B, core.query_size)
        answer, true = (core.read(query, {k: v[:, -1] for k, v in s.items()}) for s in (states, exact_states))
        assert answer.dtype == true.dtype
        assert (answer - true).norm() < 0.02 * true.norm()


def test_a_sequence_may_be_cut_anywhere(core: RecurrentCore) -> None:
    x, first, state = inputs(), some_first(), used_state(core)
    whole, end = core.sequence(x, state, first)
    for cut in (1, 3, 4, 6):
        head, carried = core.sequence(x[:, :cut], state, first[:, :cut])
        tail, cut_end = core.sequence(x[:, cut:], carried, first[:, cut:])
        torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(cut_end, end, rtol=1e-10, atol=1e-12)


def test_the_carried_memory_matters(core: RecurrentCore) -> None:
    x, first = inputs(), torch.zeros(B, T, dtype=torch.bool)
    empty = {key: value.double() for key, value in core.initial(B).items()}
    with_memory, _ = core.sequence(x, used_state(core), first)
    without, _ = core.sequence(x, empty, first)
    assert (with_memory - without)[:, 0].abs().max() > 1e-4


def test_keep_gives_the_memory_after_the_chosen_steps(core: RecurrentCore) -> None:
    x, first, state = inputs(), some_first(), used_state(core)
    _, states = one_by_one(core, x, state, first)
    _, last = core.sequence(x, state, first)
    torch.testing.assert_close(last, {key: value[:, -1] for key, value in states.items()}, rtol=1e-10, atol=1e-12)
    for keep in ([0], [T - 1], [1, 4, 5], range(T)):
        _, kept = core.sequence(x, state, first, keep=keep)
        expected = {key: value[:, list(keep)] for key, value in states.items()}
        torch.testing.assert_close(kept, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("poison", [5.0, float("inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 4])
def test_nothing_passes_a_reset(core: RecurrentCore, poison: float, at: int) -> None:
    first = torch.zeros(B, T, dtype=torch.bool)
    first[:, at] = True
    x = inputs()
    empty = {key: value.double() for key, value in core.initial(B).items()}
    poisoned = x.clone()
    poisoned[:, :at] = poison
    state = {key: torch.full_like(value, poison) for key, value in used_state(core).items()}
    fresh, fresh_end = core.sequence(x[:, at:], empty, torch.zeros(B, T - at, dtype=torch.bool))
    for run in (core.sequence, lambda *arguments: one_by_one(core, *arguments)):
        h, states = run(poisoned, state, first)
        torch.testing.assert_close(h[:, at:], fresh, rtol=1e-10, atol=1e-12)
        if run == core.sequence:
            torch.testing.assert_close(states, fresh_end, rtol=1e-10, atol=1e-12)


def test_no_gradient_passes_a_reset(core: RecurrentCore) -> None:
    first = torch.zeros(B, T, dtype=torch.bool)
    first[:, 4] = True
    x, state = inputs().requires_grad_(), used_state(core)
    for value in state.values():
        value.requires_grad_()
    h, _ = core.sequence(x, state, first)
    # What cannot reach h at all, as a normaliser that is not read, has a gradient of zero too.
    x_gradient, *state_gradients = torch.autograd.grad(
        h[:, 4:].square().sum(), [x, *state.values()], allow_unused=True, materialize_grads=True
    )
    assert torch.equal(x_gradient[:, :4], torch.zeros(B, 4, INPUT, dtype=torch.float64))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in state_gradients)
    assert x_gradient[:, 4:].abs().amax((0, 2)).min() > 0


def test_an_infinite_memory_that_is_cleared_leaves_gradients_finite(core: RecurrentCore) -> None:
    first = torch.zeros(B, T, dtype=torch.bool)
    first[:, 0] = True
    state = {key: torch.full_like(value, float("inf")) for key, value in used_state(core).items()}
    h, _ = core.sequence(inputs(), state, first)
    for gradient in torch.autograd.grad(h.square().sum(), list(core.parameters())):
        assert gradient.isfinite().all()


def test_streams_do_not_see_each_other(core: RecurrentCore) -> None:
    x, first, state = inputs(), some_first(), used_state(core)
    together, end = core.sequence(x, state, first)
    for stream in range(B):
        alone = slice(stream, stream + 1)
        h, alone_end = core.sequence(x[alone], {key: value[alone] for key, value in state.items()}, first[alone])
        torch.testing.assert_close(h, together[alone], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(alone_end, {key: value[alone] for key, value in end.items()})


def test_gradients_equal_finite_differences(core: RecurrentCore) -> None:
    x = inputs()[:, :3].clone().requires_grad_()
    first, state = some_first()[:, 3:6], used_state(core)
    for value in state.values():
        value.requires_grad_()

    def function() -> list[Tensor]:
        h, after = core.sequence(x, state, first)
        return [h, *after.values()]

    check_gradients(function, [x, *state.values(), *core.parameters()])


def test_drift_of_bf16_is_bounded_and_memory_stays_fp32(core_of_size_debug: MakeCore) -> None:
    core = core_of_size_debug(torch.float32)
    x, first = torch.randn(8, 64, INPUT), torch.zeros(8, 64, dtype=torch.bool)
    exact, _ = core.sequence(x, core.initial(8), first)
    rough, state = core.sequence(x.bfloat16(), core.initial(8), first)
    assert all(value.dtype == torch.float32 for value in state.values())
    drift = (rough.float() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    assert 0 < drift.max() < BF16_DRIFT


def test_weights_survive_save_and_load(core_of_size_debug: MakeCore) -> None:
    a, b = core_of_size_debug(seed=1), core_of_size_debug(seed=2)
    x, first, state = inputs(), some_first(), used_state(a)
    expected, _ = a.sequence(x, state, first)
    assert not torch.equal(b.sequence(x, state, first)[0], expected)
    b.load_state_dict(a.state_dict())
    assert torch.equal(b.sequence(x, state, first)[0], expected)


def test_unknown_core_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        make_core("abacus", INPUT, None)


# ---- the block GRU -----------------------------------------------------------------------------------------


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def rms(x: np.ndarray, scale: Tensor) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-4) * scale.detach().numpy()


def make_gru(deter: int = 24, hidden: int = 5, blocks: int = 4, input_size: int = 10) -> BlockGRU:
    core = BlockGRU(input_size, GRUConfig(deter=deter, hidden=hidden, blocks=blocks)).double()
    for parameter in core.parameters():  # so that no scale is 1 and no bias 0
        parameter.data += 0.3 * torch.randn_like(parameter)
    return core


def reference_gru(core: BlockGRU, h: np.ndarray, x1: np.ndarray, x2: np.ndarray) -> np.ndarray:
    """A step from h (B, D), the code's x1 and the action's x2, block by block over [h_b, x0, x1, x2]."""
    blocks, width = core.blocks, core.feature_size // core.blocks
    past = core.past.linear
    x0 = silu(rms(h @ past.weight.detach().numpy().T + past.bias.detach().numpy(), core.past.norm.scale))
    own_weights, shared = np.split(core.mix.weight.detach().numpy(), [width])
    own_weights, shared = own_weights.reshape(blocks, width, width), shared.reshape(core.feature_size, -1)
    mixed = []
    for b in range(blocks):
        own = slice(b * width, (b + 1) * width)
        inputs = np.concatenate([h[:, own], x0, x1, x2], -1)
        weight = np.concatenate([own_weights[b], shared[own].T], 0)
        mixed.append(inputs @ weight + core.mix.bias.detach().numpy()[own])
    hidden = silu(rms(np.concatenate(mixed, -1), core.norm.scale))
    result = np.empty_like(h)
    for b in range(blocks):
        own = slice(b * width, (b + 1) * width)
        gates = hidden[:, own] @ core.gates.weight[b].detach().numpy()
        gates = gates + core.gates.bias.detach().numpy()[3 * width * b : 3 * width * (b + 1)]
        r, c, u = gates[:, :width], gates[:, width : 2 * width], sigmoid(gates[:, 2 * width :] - 1)
        result[:, own] = u * np.tanh(sigmoid(r) * c) + (1 - u) * h[:, own]
    return result


def test_gru_step_follows_the_formulas() -> None:
    core = make_gru()
    h = torch.randn(4, 24, dtype=torch.float64)
    x1, x2 = torch.randn(2, 4, 5, dtype=torch.float64)
    ours, state = core.step(torch.cat([x1, x2], -1), {"deter": h}, torch.zeros(4, dtype=torch.bool))
    expected = reference_gru(core, h.numpy(), x1.numpy(), x2.numpy())
    np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(state["deter"], ours)


def test_gru_is_initialised_for_the_full_width_of_all_blocks() -> None:
    core = BlockGRU(128, GRUConfig(deter=512, hidden=64, blocks=8))
    mixed = 512 + 8 * (64 + 128)  # [h_b, x0, x1, x2] of all blocks
    for weight, fan_in in (
        (core.past.linear.weight, 512),
        (core.mix.weight[:64], mixed),  # of h
        (core.mix.weight[64:], mixed),  # of [x0, x1, x2]
        (core.gates.weight, 512),
    ):
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.02)
    assert torch.equal(core.initial(3)["deter"], torch.zeros(3, 512))


def test_gru_mixing_weights_are_clipped_by_their_joint_norm() -> None:
    """Seen from outside, through the linear map, however the weights are stored."""
    mix = make_gru().mix
    h, s = 1e-3 * torch.randn(4, 24).double(), torch.randn(4, 15).double()
    upstream = 5 * torch.randn(4, 24).double()

    @torch.no_grad()
    def kernels() -> Tensor:
        """The whole map (24 + 15, 24): rows of h, of which only the block of its output is not zero, then of s."""
        return mix(torch.eye(39, 24).double(), torch.eye(39).double()[:, 24:]) - mix.bias

    before = kernels()
    gradients = torch.autograd.grad((mix(h, s) * upstream).sum(), list(mix.parameters()))
    # With an eps this large the first update is lr / eps = 1 times the clipped gradient.
    config = Optimizer(lr=1e6, behavior_lr=None, agc=0.3, beta1=0.9, beta2=0.99, eps=1e6, warmup=0)
    LaProp(list(mix.parameters()), config).step([gradient.clone() for gradient in gradients])

    in_block = torch.block_diag(*[torch.ones(6, 6).double()] * 4)
    gradient = torch.cat([(h.T @ upstream) * in_block, s.T @ upstream])
    limit = 0.3 * before.norm()
    assert gradient.norm() > 2 * limit
    assert gradient[:24].norm() < 0.3 * before[:24].norm()  # alone, the weights of h would not be clipped
    torch.testing.assert_close(kernels() - before, -gradient * limit / gradient.norm(), rtol=1e-4, atol=1e-8)


def test_gru_width_must_divide() -> None:
    with pytest.raises(ValueError, match="deter"):
        GRUConfig(deter=10, hidden=4, blocks=4)
