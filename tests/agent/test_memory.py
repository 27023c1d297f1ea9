"""The matrix memory in all its forms, against its definition in unstabilised numbers and against a loop over steps."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from finite_differences import check_gradients
from torch import Tensor

from agent.cores import memory as forms
from agent.cores.maps import chebyshev_fit, make_map, on_matrices, on_scalars
from agent.cores.memory import NORM_FLOOR, Memory

B, H, K, V = 2, 3, 5, 4
CUBIC = make_map("cubic", 5)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Memory]
Form = Callable[..., tuple[Tensor, Memory]]


def coefficients(degree: int = 21, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(chebyshev_fit(CUBIC, degree)).to(dtype)


def cubic(A: Tensor) -> Tensor:
    return on_matrices(CUBIC, A)


def make_inputs(steps: int, batch: int = B, heads: int = H, key: int = K, value: int = V) -> Inputs:
    """q, k, v, log gates, first, a used memory: in fp64, with gates of all sizes and a reset in most streams."""
    q, k = torch.randn(2, batch, heads, steps, key, dtype=torch.float64)
    v = torch.randn(batch, heads, steps, value, dtype=torch.float64)
    log_input = 3 * torch.randn(batch, heads, steps, dtype=torch.float64)
    log_forget = F.logsigmoid(3 * torch.randn(batch, heads, steps, dtype=torch.float64) + 2)
    first = torch.zeros(batch, steps, dtype=torch.bool)
    first[0, steps // 2] = first[-1, steps // 3] = first[-1, steps - 1] = True
    memory = Memory(
        torch.randn(batch, heads, key, value, dtype=torch.float64),
        torch.randn(batch, heads, key, dtype=torch.float64),
        torch.randn(batch, heads, dtype=torch.float64),
    )
    return q, k * key**-0.5, v, log_input, log_forget, first, memory


def flat(inputs: Inputs) -> list[Tensor]:
    """What is differentiable."""
    return [*inputs[:5], *inputs[6]]


def to(dtype: torch.dtype, inputs: Inputs) -> Inputs:
    """q, k, v in `dtype`, the rest in fp32."""
    q, k, v, log_input, log_forget, first, memory = inputs
    products = [x.to(dtype) for x in (q, k, v)]
    return (*products, log_input.float(), log_forget.float(), first, Memory(*(x.float() for x in memory)))  # type: ignore[return-value]


def assert_equal_with_gradients(ours: Sequence[Tensor], theirs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    weights = [torch.randn_like(x) for x in theirs]
    gradients = []
    for results in (ours, theirs):
        loss = sum((w * x).sum() for w, x in zip(weights, results, strict=True))
        gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


PLAIN = (forms.plain_read, forms.plain_read_sequence)
POLYNOMIAL = (
    lambda q, memory: forms.polynomial_read(q, memory, coefficients()),
    lambda *inputs, **options: forms.polynomial_read_sequence(*inputs, coefficients(), **options),
)
EXACT = (
    lambda q, memory: forms.matrix_read(q, memory, cubic),
    lambda *inputs, chunk: forms.matrix_read_sequence(*inputs, cubic),
)
READS = pytest.mark.parametrize(("read", "sequence"), [PLAIN, POLYNOMIAL, EXACT], ids=["plain", "polynomial", "exact"])


# ---- the definition ------------------------------------------------------------------------------------------


def test_steps_follow_the_unstabilised_definition() -> None:
    inputs = make_inputs(9)
    q, k, v, log_input, log_forget, first, memory = (x.numpy() if isinstance(x, Tensor) else x for x in inputs)
    C = np.exp(memory.m.numpy())[..., None, None] * memory.C.numpy()
    n = np.exp(memory.m.numpy())[..., None] * memory.n.numpy()
    _, ours_end = forms.read_by_steps(forms.plain_read, *inputs)
    ours, _ = forms.read_by_steps(forms.plain_read, *inputs)
    for t in range(9):
        keep = ~first[:, None, t] * np.exp(log_forget[..., t])
        write = np.exp(log_input[..., t])
        C = keep[..., None, None] * C + write[..., None, None] * k[:, :, t, :, None] * v[:, :, t, None, :]
        n = keep[..., None] * n + write[..., None] * k[:, :, t]
        overlap = np.einsum("bhk,bhk->bh", q[:, :, t], n)
        expected = np.einsum("bhk,bhkv->bhv", q[:, :, t], C) / np.maximum(np.abs(overlap), 1)[..., None]
        # The small constant of the normaliser is relative to exp(-m).
        np.testing.assert_allclose(ours[:, :, t].numpy(), expected, rtol=1e-3, atol=1e-6)
    scale = ours_end.m.exp()
    np.testing.assert_allclose((scale[..., None, None] * ours_end.C).numpy(), C, rtol=1e-10)
    np.testing.assert_allclose((scale[..., None] * ours_end.n).numpy(), n, rtol=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(("degree", "bound"), [(17, 0.014), (21, 0.0044)])
def test_polynomial_is_near_the_map_of_the_singular_values(rank: int, degree: int, bound: float) -> None:
    C = torch.randn(50, H, K, rank, dtype=torch.float64) @ torch.randn(50, H, rank, V, dtype=torch.float64)
    q = F.normalize(torch.randn(50, H, K, dtype=torch.float64), dim=-1)
    memory = Memory(C, torch.zeros(50, H, K), torch.zeros(50, H))
    u, s, v = np.linalg.svd((C / C.norm(dim=(-2, -1), keepdim=True)).numpy(), full_matrices=False)
    expected = np.einsum("bhk,bhkr,bhr,bhrv->bhv", q.numpy(), u, on_scalars(CUBIC, s), v)
    exact = forms.matrix_read(q, memory, cubic).numpy()
    np.testing.assert_allclose(exact, expected, atol=1e-5)
    polynomial = forms.polynomial_read(q, memory, coefficients(degree)).numpy()
    error = np.linalg.norm(polynomial - expected, axis=-1).max()
    assert bound / 10 < error < bound + 1e-5


def test_mixed_coefficients_are_a_mix_of_reads() -> None:
    q, memory = make_inputs(1)[0][:, :, 0], make_inputs(1)[6]
    mixed = 0.3 * coefficients()
    mixed[0] += 0.7
    expected = 0.3 * forms.polynomial_read(q, memory, coefficients())
    expected += 0.7 * (q.unsqueeze(-2) @ forms.unit(memory.C)).squeeze(-2)
    torch.testing.assert_close(forms.polynomial_read(q, memory, mixed), expected)


@pytest.mark.parametrize("terms", [1, 2])
def test_few_coefficients_will_do(terms: int) -> None:
    q, memory = make_inputs(1)[0][:, :, 0], make_inputs(1)[6]
    A = forms.unit(memory.C)
    c = torch.tensor([0.5, 2.0], dtype=torch.float64)[:terms]
    function = 0.5 * A + (2 * (2 * A @ A.mT @ A - A) if terms == 2 else 0)
    torch.testing.assert_close(forms.polynomial_read(q, memory, c), (q.unsqueeze(-2) @ function).squeeze(-2))


# ---- parallel forms ------------------------------------------------------------------------------------------


@READS
@pytest.mark.parametrize(("steps", "chunk"), [(1, 64), (13, 4), (16, 8), (13, 64)])
def test_sequence_equals_steps_with_gradients(read: Form, sequence: Form, steps: int, chunk: int) -> None:
    inputs = make_inputs(steps)
    leaves = [x.requires_grad_() for x in flat(inputs)]
    y, end = sequence(*inputs, chunk=chunk)
    expected, expected_end = forms.read_by_steps(read, *inputs)
    assert_equal_with_gradients([y, *end], [expected, *expected_end], leaves)


@READS
def test_sequence_may_start_from_an_empty_memory(read: Form, sequence: Form) -> None:
    inputs = (*make_inputs(13)[:6], Memory(*(x.double() for x in forms.empty(B, H, K, V))))
    leaves = [x.requires_grad_() for x in inputs[:5]]
    y, end = sequence(*inputs, chunk=4)
    expected, expected_end = forms.read_by_steps(read, *inputs)
    assert_equal_with_gradients([y, *end], [expected, *expected_end], leaves)


@READS
def test_gradients_equal_finite_differences(read: Form, sequence: Form) -> None:
    inputs = make_inputs(5, batch=1, heads=1, key=3, value=2)
    leaves = [x.requires_grad_() for x in flat(inputs)]

    def function() -> list[Tensor]:
        y, end = sequence(*inputs, chunk=2)
        return [y, *end]

    check_gradients(function, leaves)


@pytest.mark.parametrize("steps", [[0], [12], [3, 4, 11], [7, 2, 2, 12], range(13)])
def test_memories_at_equal_the_loop_with_gradients(steps: Sequence[int]) -> None:
    inputs = make_inputs(13)
    leaves = [x.requires_grad_() for x in flat(inputs)]
    ours = forms.memories_at(*inputs[1:], steps, chunk=4)
    states = [inputs[6]]
    for t in range(13):
        now = (*(x[:, :, t] for x in inputs[1:5]), inputs[5][:, t])
        states.append(forms.write(*now, states[-1]))
    expected = [torch.stack([getattr(states[t + 1], part) for t in steps], 1) for part in Memory._fields]
    assert_equal_with_gradients(list(ours), expected, leaves)


# ---- numerical care ------------------------------------------------------------------------------------------


@READS
@pytest.mark.parametrize("log_input", [-1e4, -50.0, 50.0, 1e4])
def test_the_first_gate_cannot_overflow(read: Form, sequence: Form, log_input: float) -> None:
    inputs = to(torch.float32, make_inputs(6))
    q, k, v, gate, log_forget, first, _ = inputs
    first = torch.zeros_like(first)
    gate = gate.clone()
    gate[..., 0] = log_input
    memory = forms.empty(B, H, K, V)
    leaves = [x.requires_grad_() for x in (q, k, v, gate, log_forget)]
    for run in (sequence, lambda *inputs, chunk: forms.read_by_steps(read, *inputs)):
        y, end = run(q, k, v, gate, log_forget, first, memory, chunk=4)
        assert y.isfinite().all()
        assert all(part.isfinite().all() for part in end)
        for gradient in torch.autograd.grad(y.square().sum() + sum(x.square().sum() for x in end[:2]), leaves):
            assert gradient.isfinite().all()


def test_what_is_written_first_has_weight_one() -> None:
    _, k, v, _, _, first, _ = (x[:, :, 0] if isinstance(x, Tensor) and x.dim() > 2 else x for x in make_inputs(1))
    for gate in (-50.0, 50.0):
        for memory, emptied in ((forms.empty(B, H, K, V), False), (make_inputs(1)[6], True)):
            log_input, log_forget = torch.full((B, H), gate), torch.full((B, H), -1.0)
            after = forms.write(k, v, log_input, log_forget, torch.full((B,), emptied), memory)
            torch.testing.assert_close(after.C, k[..., :, None] * v[..., None, :])
            torch.testing.assert_close(after.n, k)
            torch.testing.assert_close(after.m, log_input, check_dtype=False)


@pytest.mark.parametrize("read", [PLAIN[0], POLYNOMIAL[0], EXACT[0]], ids=["plain", "polynomial", "exact"])
def test_an_empty_memory_answers_zero_with_finite_gradients(read: Form) -> None:
    q = torch.randn(B, H, K)
    memory = forms.empty(B, H, K, V)
    leaves = [x.requires_grad_() for x in (q, memory.C)]
    y = read(q, memory)
    assert torch.equal(y, torch.zeros(B, H, V))
    for gradient in torch.autograd.grad(y.sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("read", [POLYNOMIAL[0], EXACT[0]], ids=["polynomial", "exact"])
def test_gradients_of_a_vanishing_memory_stay_bounded(read: Form) -> None:
    q, direction = F.normalize(torch.randn(B, H, K), dim=-1), torch.randn(B, H, K, V)
    direction /= direction.norm(dim=(-2, -1), keepdim=True)
    slope = 1.5**5 * 1.1  # of the map at 0, and of its fit
    for norm in (1e-12, 1e-6, NORM_FLOOR, 1.0):
        C = (norm * direction).requires_grad_()
        y = read(q, Memory(C, torch.zeros(B, H, K), torch.zeros(B, H)))
        (gradient,) = torch.autograd.grad(y.sum(), C)
        assert gradient.norm(dim=(-2, -1)).max() <= slope * V**0.5 / NORM_FLOOR
        if norm < 1e-5:  # linear there: what is next to nothing is not scaled up
            assert y.norm(dim=-1).max() <= slope * norm / NORM_FLOOR * 1.01
        if norm == 1:
            assert gradient.norm(dim=(-2, -1)).max() < 20


@pytest.mark.parametrize(("dtype", "cosine"), [(torch.float32, 1 - 1e-6), (torch.bfloat16, 0.998)])
@pytest.mark.parametrize("writes", [1, 4])
def test_gradients_at_low_rank_are_no_noise(dtype: torch.dtype, cosine: float, writes: int) -> None:
    """The whole sequence form against exact maps of matrices in fp64, where memories have rank 1 to 4."""
    q, k, v, log_input, log_forget, first, _ = make_inputs(writes, batch=4, key=32, value=32)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1) * 32**-0.5
    q, k, v = (x.bfloat16().double() for x in (q, k, v))
    weight = torch.randn_like(v)
    gradients = []
    for kind in (torch.float64, dtype):
        memory = forms.empty(4, H, 32, 32)
        leaves = [x.to(kind).requires_grad_() for x in (q, k, v)]
        wide = torch.promote_types(kind, torch.float32)
        memory = Memory(*(x.to(wide) for x in memory))
        gates = (log_input.to(wide), log_forget.to(wide), torch.zeros_like(first))
        if kind == torch.float64:
            y, _ = forms.read_by_steps(
                lambda q, m: forms.polynomial_read(q, m, coefficients()), *leaves, *gates, memory
            )
        else:
            y, _ = forms.polynomial_read_sequence(*leaves, *gates, memory, coefficients(dtype=torch.float32))
        gradients.append(torch.autograd.grad((y * weight).sum(), leaves))
    for exact, ours in zip(*gradients, strict=True):
        assert F.cosine_similarity(exact.flatten(), ours.double().flatten(), dim=0) > cosine


@pytest.mark.parametrize("remember", [2.0, 9.0])
@pytest.mark.parametrize("name", ["plain", "polynomial"])
def test_very_long_sequences_are_stable(name: str, remember: float) -> None:
    """In fp32 against fp64; what is remembered for some 10 or 10,000 steps."""
    steps = 16384
    q, k, v, log_input, _, first, memory = make_inputs(steps, batch=1, heads=1, key=8, value=8)
    log_forget = F.logsigmoid(remember + torch.randn(1, 1, steps, dtype=torch.float64))
    first = torch.zeros_like(first)
    first[0, 5000] = True
    inputs: Inputs = (q, k, v, log_input, log_forget, first, memory)
    with torch.no_grad():
        if name == "plain":
            exact, exact_end = forms.plain_read_sequence(*inputs)
            ours, end = forms.plain_read_sequence(*to(torch.float32, inputs))
        else:
            exact, exact_end = forms.polynomial_read_sequence(*inputs, coefficients())
            ours, end = forms.polynomial_read_sequence(*to(torch.float32, inputs), coefficients().float())
    for a, b in zip(end, exact_end, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()
    # Compared in direction: where q'n is near 0, the plain read divides by it.
    error = (F.normalize(ours, dim=-1) - F.normalize(exact, dim=-1)).norm(dim=-1)[0, 0]
    assert error.max() < 1e-2
    assert error[-1000:].mean() < 2e-5


@pytest.mark.parametrize("name", ["plain", "polynomial"])
def test_products_in_bf16_keep_the_memory_in_fp32(name: str) -> None:
    inputs = to(torch.bfloat16, make_inputs(100, key=16, value=16))
    same = to(torch.float32, inputs)
    c = (coefficients().float(),) if name == "polynomial" else ()
    function = forms.polynomial_read_sequence if c else forms.plain_read_sequence
    (y, end), (exact, exact_end) = function(*inputs, *c), function(*same, *c)
    assert y.dtype == torch.bfloat16
    for ours, theirs in zip(end, exact_end, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert 0 < (y.float() - exact).norm() < 0.01 * exact.norm()
    one = forms.polynomial_read(inputs[0][:, :, -1], end, *c) if c else forms.plain_read(inputs[0][:, :, -1], end)
    assert one.dtype == torch.bfloat16
    assert (one.float() - exact[:, :, -1]).norm() < 0.03 * exact[:, :, -1].norm()
