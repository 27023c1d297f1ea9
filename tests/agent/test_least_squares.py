"""The least-squares read against regressions and exact solutions in fp64, and against a loop over steps."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from finite_differences import check_gradients
from torch import Tensor

from agent.cores import memory as forms
from agent.cores.least_squares import (
    TRACE_FLOOR,
    _conjugate_gradients,
    least_squares_read,
    least_squares_read_sequence,
    with_keys,
)
from agent.cores.memory import Memory

B, H, K, V = 2, 3, 5, 4
ITERATIONS = 15
RIDGE = torch.tensor([0.05, 0.1, 0.7], dtype=torch.float64)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Memory]
"""q, k (B, H, T, K), [v, k] (B, H, T, V + K), log gates (B, H, T), first (B, T), memory [C | G]."""


def used_memory(batch: int = B, heads: int = H, key: int = K, value: int = V) -> Memory:
    """What six writes of different weights leave."""
    k = torch.randn(batch, heads, 6, key, dtype=torch.float64) * key**-0.5
    v = torch.randn(batch, heads, 6, value, dtype=torch.float64)
    weighted = k * torch.rand(batch, heads, 6, 1, dtype=torch.float64)
    m = torch.randn(batch, heads, dtype=torch.float64)
    return Memory(weighted.mT @ with_keys(k, v), weighted.sum(-2), m)


def make_inputs(steps: int, batch: int = B, heads: int = H, key: int = K, value: int = V) -> Inputs:
    """All in fp64, with gates of all sizes and a reset in most streams."""
    q, k = torch.randn(2, batch, heads, steps, key, dtype=torch.float64)
    k = k * key**-0.5
    v = torch.randn(batch, heads, steps, value, dtype=torch.float64)
    log_input = 3 * torch.randn(batch, heads, steps, dtype=torch.float64)
    log_forget = F.logsigmoid(3 * torch.randn(batch, heads, steps, dtype=torch.float64) + 2)
    first = torch.zeros(batch, steps, dtype=torch.bool)
    first[0, steps // 2] = first[-1, steps // 3] = first[-1, steps - 1] = True
    return q, k, with_keys(k, v), log_input, log_forget, first, used_memory(batch, heads, key, value)


def exact_read(q: Tensor, memory: Memory, ridge: Tensor) -> Tensor:
    """By a solver: q (B, H, K), memory [C | G], ridge (H,) -> (B, H, V)."""
    key = q.shape[-1]
    C, G = memory.C[..., :-key], memory.C[..., -key:]
    strength = ridge * (G.diagonal(dim1=-2, dim2=-1).sum(-1) + TRACE_FLOOR) / key
    A = G + strength[..., None, None] * torch.eye(key, dtype=G.dtype)
    x = torch.linalg.solve(A, q / key**0.5)
    return torch.einsum("...k,...kv->...v", x, C)


def to(dtype: torch.dtype, inputs: Inputs) -> Inputs:
    """q, k, v in `dtype`, the rest in fp32."""
    q, k, v, log_input, log_forget, first, memory = inputs
    products = [x.to(dtype) for x in (q, k, v)]
    return (*products, log_input.float(), log_forget.float(), first, Memory(*(x.float() for x in memory)))  # type: ignore[return-value]


def with_leaves(inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
    """The inputs as functions of q, k, v and gates, and these."""
    q, k, both, log_input, log_forget, *rest = inputs
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, both[..., : -k.shape[-1]], log_input, log_forget)]
    q, k, v, *gates = leaves
    return (q, k, with_keys(k, v), *gates, *rest), leaves  # type: ignore[return-value]


def gradients(results: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """At the leaves, of a weighting of all results that is the same for results of the same shapes."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) * r).sum() for r in results)
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]


# ---- the definition ------------------------------------------------------------------------------------------


def test_it_answers_with_the_ridge_regression_of_values_on_keys() -> None:
    """By NumPy's least squares on all writes of an episode, in unstabilised weights."""
    steps = 9
    q, k, both, log_input, log_forget, first, _ = make_inputs(steps)
    first = torch.zeros_like(first)
    memory = Memory(*(x.double() for x in forms.empty(B, H, K, V + K)))
    y, _ = least_squares_read_sequence(
        q, k, both, log_input, log_forget, first, memory, RIDGE, ITERATIONS, chunk=4
    )  # fmt: skip
    for b, h, t in np.ndindex(B, H, steps):
        decay = log_forget[b, h, : t + 1].flip(0).cumsum(0).flip(0) - log_forget[b, h, : t + 1]
        weights = (log_input[b, h, : t + 1] + decay).exp().numpy()
        keys, values = k[b, h, : t + 1].numpy(), both[b, h, : t + 1, :V].numpy()
        mean_eigenvalue = (weights * (keys**2).sum(-1)).sum() / K
        # Ridge regression is least squares with K more rows.
        rows = np.concatenate(
            [np.sqrt(weights)[:, None] * keys, np.sqrt(RIDGE[h].item() * mean_eigenvalue) * np.eye(K)]
        )
        targets = np.concatenate([np.sqrt(weights)[:, None] * values, np.zeros((K, V))])
        W = np.linalg.lstsq(rows, targets)[0]
        expected = (q[b, h, t].numpy() / np.sqrt(K)) @ W
        # What differs: TRACE_FLOOR, against traces of about 1 and more.
        np.testing.assert_allclose(y[b, h, t].numpy(), expected, rtol=0.02, atol=2e-3)


def test_read_is_the_exact_solution_with_its_gradients() -> None:
    q, memory, ridge = torch.randn(B, H, K, dtype=torch.float64), used_memory(), RIDGE.clone()
    leaves = [x.requires_grad_() for x in (q, memory.C, ridge)]
    ours, exact = least_squares_read(q, memory, ridge, ITERATIONS), exact_read(q, memory, ridge)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)
    (dq, dC, dridge), (exact_dq, exact_dC, exact_dridge) = gradients([ours], leaves), gradients([exact], leaves)
    torch.testing.assert_close((dq, dridge), (exact_dq, exact_dridge), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(dC[..., :V], exact_dC[..., :V], rtol=1e-8, atol=1e-10)
    # A Gram matrix moves only among the symmetric ones, of which a gradient is the symmetric part.
    exact_dG = exact_dC[..., V:]
    torch.testing.assert_close(dC[..., V:], (exact_dG + exact_dG.mT) / 2, rtol=1e-8, atol=1e-10)


def test_gradcheck_of_a_read() -> None:
    q, memory, ridge = torch.randn(1, H, 3, dtype=torch.float64), used_memory(1, H, 3, 2), RIDGE.clone()

    def function(q: Tensor, C: Tensor, ridge: Tensor) -> Tensor:
        return least_squares_read(q, memory._replace(C=C), ridge, ITERATIONS)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (q, memory.C, ridge)])


def test_neither_the_scale_of_gates_nor_that_of_keys_matters() -> None:
    inputs = make_inputs(9)
    q, k, both, log_input, log_forget, first, memory = inputs
    memory = memory._replace(C=1e3 * memory.C)  # far from TRACE_FLOOR, as are keys of such length
    k, v = 30 * k, both[..., :V]

    def read(q: Tensor, k: Tensor, log_input: Tensor, memory: Memory) -> Tensor:
        given = (q, k, with_keys(k, v), log_input, log_forget, first, memory)
        return least_squares_read_sequence(*given, RIDGE, ITERATIONS, chunk=4)[0]

    y = read(q, k, log_input, memory)
    heavier = read(q, k, log_input + 40, memory._replace(m=memory.m + 40))
    torch.testing.assert_close(heavier, y, rtol=1e-9, atol=1e-11)
    scale = torch.cat([torch.full((V,), 7.0), torch.full((K,), 49.0)]).double()
    longer = read(7 * q, 7 * k, log_input, memory._replace(C=scale * memory.C))
    torch.testing.assert_close(longer, y, rtol=1e-4, atol=1e-4)


def test_old_writes_are_recalled_that_the_plain_read_loses() -> None:
    """As many writes as dimensions, of random keys, the first of weight e^-3."""
    steps = 64
    q, k, v = torch.randn(3, 1, 8, steps, 64, dtype=torch.float64)
    k = F.normalize(k, dim=-1) / 8
    log_input = torch.linspace(-3, 0, steps, dtype=torch.float64).expand(1, 8, steps)
    first = torch.zeros(1, steps, dtype=torch.bool)
    memory = Memory(*(x.double() for x in forms.empty(1, 8, 64, 128)))
    _, memory = forms.read_by_steps(
        lambda q, _: q, q, k, with_keys(k, v), log_input, torch.zeros_like(log_input), first, memory
    )
    ridge = torch.full((8,), 0.1, dtype=torch.float64)
    right = []
    for read in (
        lambda q: least_squares_read(q, memory, ridge, 30),
        lambda q: forms.plain_read(q, memory._replace(C=memory.C[..., :64])),
    ):
        y = torch.stack([read(8 * k[:, :, t]) for t in range(16)], 2)  # the oldest quarter
        found = torch.einsum("bhtv,bhsv->bhts", y, F.normalize(v, dim=-1)).argmax(-1)
        right.append((found == torch.arange(16)).double().mean().item())
    assert right[0] > 0.8 and right[1] < 0.3


# ---- T steps at once -----------------------------------------------------------------------------------------


def both_forms(inputs: Inputs, ridge: Tensor, chunk: int) -> list[list[Tensor]]:
    """y and the last memory, at once and one step after the other."""
    y, end = least_squares_read_sequence(*inputs, ridge, ITERATIONS, chunk=chunk)
    expected, expected_end = forms.read_by_steps(lambda q, m: least_squares_read(q, m, ridge, ITERATIONS), *inputs)
    return [[y, *end], [expected, *expected_end]]


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(("steps", "chunk"), [(1, 64), (13, 4), (16, 8), (13, 64)])
def test_sequence_equals_steps_with_gradients(steps: int, chunk: int, empty: bool) -> None:
    inputs = make_inputs(steps)
    if empty:
        inputs = (*inputs[:6], Memory(*(x.double() for x in forms.empty(B, H, K, V + K))))
    inputs, leaves = with_leaves(inputs)
    ridge = RIDGE.clone().requires_grad_()
    leaves += [ridge, *([] if empty else [x.requires_grad_() for x in inputs[6]])]
    ours, theirs = both_forms(inputs, ridge, chunk)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for a, b in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_gradients_of_a_sequence_equal_finite_differences() -> None:
    (*_, first, memory), (q, k, v, *gates) = with_leaves(make_inputs(5, batch=1, key=3, value=2))
    ridge = RIDGE.clone()
    leaves = [q, k, v, *gates, *(x.requires_grad_() for x in (*memory, ridge))]

    def function() -> list[Tensor]:
        written = with_keys(k, v)
        y, end = least_squares_read_sequence(q, k, written, *gates, first, memory, ridge, ITERATIONS, chunk=2)
        return [y, *end]

    check_gradients(function, leaves)


def test_chosen_memories_hold_the_gram_matrix_of_their_keys() -> None:
    inputs = make_inputs(13)
    _, k, both, log_input, log_forget, first, memory = inputs
    steps = [2, 3, 11]
    found = forms.memories_at(*inputs[1:], steps, chunk=4)
    G = memory.m.exp()[..., None, None] * memory.C[..., V:]
    grams = []
    for t in range(13):
        keep = (log_forget[..., t].exp() * ~first[:, None, t])[..., None, None]
        G = keep * G + log_input[..., t, None, None].exp() * k[:, :, t, :, None] * k[:, :, t, None, :]
        grams.append(G)
    for place, step in enumerate(steps):
        scale = found.m[:, place].exp()[..., None, None]
        torch.testing.assert_close(scale * found.C[:, place, ..., V:], grams[step])


# ---- numerical care ------------------------------------------------------------------------------------------


FORMS: dict[str, Callable[[Tensor, Memory], Tensor]] = {
    "step": lambda q, memory: least_squares_read(q, memory, RIDGE.to(memory.C.dtype), 30),
    # A step that writes nothing, so that the memory is read as it is.
    "sequence": lambda q, memory: least_squares_read_sequence(
        q.unsqueeze(2), torch.zeros_like(q).unsqueeze(2), torch.zeros(B, H, 1, V + K).to(q),
        torch.full((B, H, 1), forms.EMPTY).to(memory.C), torch.zeros(B, H, 1).to(memory.C),
        torch.zeros(B, 1, dtype=torch.bool), memory, RIDGE.to(memory.C.dtype), 30,
    )[0].squeeze(2),
}  # fmt: skip
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


@EVERY_FORM
def test_an_empty_memory_answers_zero_with_finite_gradients(form: str) -> None:
    q, memory = torch.randn(B, H, K), forms.empty(B, H, K, V + K)
    leaves = [x.requires_grad_() for x in (q, memory.C)]
    y = FORMS[form](q, memory)
    assert torch.equal(y, torch.zeros(B, H, V))
    assert all(gradient.isfinite().all() for gradient in gradients([y], leaves))


@EVERY_FORM
def test_a_memory_of_rank_one_answers_in_closed_form(form: str) -> None:
    """Where the residual is zero after two iterations of thirty."""
    k, v = F.normalize(torch.randn(B, H, K), dim=-1) * K**-0.5, torch.randn(B, H, V)
    memory = Memory(k[..., :, None] * with_keys(k, v)[..., None, :], k, torch.zeros(B, H))
    ridge = RIDGE.float()[:, None] * (1 / K + TRACE_FLOOR) / K
    leaves = [x.requires_grad_() for x in (k, memory.C)]
    y = FORMS[form](k * K**0.5, memory)
    torch.testing.assert_close(y, v / K / (1 / K + ridge), rtol=1e-5, atol=1e-6)
    for gradient in gradients([y], leaves):
        assert gradient.isfinite().all() and gradient.norm() < 1e3
    other = torch.randn(B, H, K)
    other = other - K * (other * k).sum(-1, keepdim=True) * k
    assert FORMS[form](other, memory).abs().max() < 1e-4


@EVERY_FORM
def test_a_zero_query_gives_zero_with_finite_gradients(form: str) -> None:
    q, memory = torch.zeros(B, H, K), Memory(*(x.float() for x in used_memory()))
    leaves = [x.requires_grad_() for x in (q, memory.C)]
    y = FORMS[form](q, memory)
    assert torch.equal(y, torch.zeros(B, H, V))
    dq, dC = gradients([y], leaves)
    assert dq.isfinite().all() and dq.abs().max() > 0
    assert torch.equal(dC, torch.zeros_like(dC))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_systems_of_any_scale_are_solved_in_fp32(scale: float) -> None:
    """As of gradients, whose squares are beyond fp32; and rows that are zero, or solved at once, stay so."""
    G = used_memory().C[..., V:]
    strength = torch.full((B, H, 1, 1), 0.05, dtype=torch.float64)
    b = torch.randn(B, H, 7, K, dtype=torch.float64)
    b[..., 2, :] = 0
    expected = torch.linalg.solve(G + 0.05 * torch.eye(K), b.mT).mT
    ours = _conjugate_gradients((scale * b).float(), strength.float(), 30, G.float()) / scale
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours[..., 2, :], torch.zeros(B, H, K))
    at_once = _conjugate_gradients(b.float(), strength.float(), 30, 0.15 * torch.eye(K).expand(B, H, K, K))
    torch.testing.assert_close(at_once, 5 * b.float())


@pytest.mark.parametrize("log_input", [-1e4, -50.0, 50.0, 1e4])
def test_the_first_gate_cannot_overflow(log_input: float) -> None:
    q, k, both, gate, log_forget, first, _ = to(torch.float32, make_inputs(6))
    gate = gate.clone()
    gate[..., 0] = log_input
    inputs: Inputs = (q, k, both, gate, log_forget, torch.zeros_like(first), forms.empty(B, H, K, V + K))
    inputs, leaves = with_leaves(inputs)
    for results in both_forms(inputs, RIDGE.float(), 4):
        assert all(result.isfinite().all() for result in results)
        assert all(gradient.isfinite().all() for gradient in gradients(results[:3], leaves))


def nearly_rank_one(steps: int, heads: int = 4, key: int = 32) -> Inputs:
    """Keys that nearly agree, as those of most heads do, with numbers that bf16 holds, so that both see the same."""
    q, k, both, log_input, log_forget, first, _ = make_inputs(steps, 1, heads, key, key)
    k = F.normalize(torch.randn(1, heads, 1, key).double() * 4 + k * key**0.5, dim=-1) * key**-0.5
    q, k, v = (x.bfloat16().double() for x in (F.normalize(k + 0.03 * q, dim=-1), k, both[..., :key]))
    memory = Memory(*(x.double() for x in forms.empty(1, heads, key, 2 * key)))
    return q, k, with_keys(k, v), log_input / 3, log_forget, torch.zeros_like(first), memory


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 6e-3)])
def test_nearly_dependent_keys_do_no_harm_in_low_precision(dtype: torch.dtype, bound: float) -> None:
    """Values and gradients against exact solutions in fp64; with its products in bf16 it would be off by .04."""
    inputs = nearly_rank_one(48)
    ridge = torch.full((4,), 0.1, dtype=torch.float64)
    results = []
    for given, read in (
        (inputs, lambda *i: forms.read_by_steps(lambda q, m: exact_read(q, m, ridge), *i)),
        (to(dtype, inputs), lambda *i: least_squares_read_sequence(*i, ridge.float(), 30)),
    ):
        given, leaves = with_leaves(given)
        y, _ = read(*given)
        results.append([y, *gradients([y], leaves)])
        assert y.dtype == given[0].dtype
    for exact, ours in zip(*results, strict=True):
        assert (ours.double() - exact).norm() < bound * exact.norm()


def test_the_memory_stays_in_fp32() -> None:
    inputs = make_inputs(70, key=16, value=16)
    rough, same = to(torch.bfloat16, inputs), to(torch.float32, to(torch.bfloat16, inputs))
    (_, end), (_, exact_end) = (least_squares_read_sequence(*i, RIDGE.float(), ITERATIONS) for i in (rough, same))
    for ours, theirs in zip(end, exact_end, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    G = end.C[..., 16:]
    assert (G - G.mT).abs().max() < 1e-5 * G.abs().max()


@pytest.mark.parametrize("iterations", [15, 30])
def test_enough_iterations_come_close_at_full_size(iterations: int) -> None:
    """Head dimension 64, as many writes, weights down to e^-3: the figures that the configuration rests on."""
    k, v = torch.randn(2, 1, 8, 64, 64)
    k = F.normalize(k, dim=-1) / 8
    weights = torch.linspace(-3, 0, 64).exp()[:, None]
    memory = Memory((k * weights).mT @ with_keys(k, v), k.sum(-2), torch.zeros(1, 8))
    ridge = torch.full((8,), 0.1)
    q = 8 * k[:, :, 10]
    exact = exact_read(q.double(), Memory(*(x.double() for x in memory)), ridge.double())
    error = (least_squares_read(q, memory, ridge, iterations) - exact).norm() / exact.norm()
    assert error < {15: 0.03, 30: 2e-4}[iterations]
    assert iterations == 30 or error > 1e-3


@pytest.mark.parametrize("remember", [2.0, 9.0])
def test_very_long_sequences_are_stable(remember: float) -> None:
    """In fp32 against fp64; what is remembered for some 10 or 10,000 steps."""
    steps = 4096
    q, k, both, log_input, _, first, memory = make_inputs(steps, batch=1, heads=3, key=8, value=8)
    log_forget = F.logsigmoid(remember + torch.randn(1, 3, steps, dtype=torch.float64))
    first = torch.zeros_like(first)
    first[0, 1500] = True
    inputs: Inputs = (q, k, both, log_input, log_forget, first, memory)
    with torch.no_grad():
        exact, exact_end = least_squares_read_sequence(*inputs, RIDGE, ITERATIONS)
        ours, end = least_squares_read_sequence(*to(torch.float32, inputs), RIDGE.float(), ITERATIONS)
    for a, b in zip(end, exact_end, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()
    error = (ours - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < 1e-2
    assert error[..., -1000:].mean() < 1e-4
