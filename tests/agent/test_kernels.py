"""The Triton kernels against a loop over steps in fp64: on CUDA, or with Triton's interpreter where there is none."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from memory_inputs import (
    CUDA,
    CUDA_SIZES,
    DEVICE,
    SIZES,
    Inputs,
    at,
    each_memory,
    error,
    make_inputs,
    on_device,
    wide,
)
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from agent.cores import kernels
from agent.cores import memory as reference
from agent.cores.kernels import one_step, sequence
from agent.cores.kernels.tuning import DIMS, chunk_length
from agent.cores.maps import chebyshev_fit, make_map
from agent.cores.memory import NORM_FLOOR, Memory

FP32 = 2e-5  # relative error of tensors, by norm
BF16 = 0.03  # the same in bf16, where the last figure of an operand is 0.004 of it
BF16_GATES = 0.05  # of the gradients of gates, sums that nearly cancel; that of m is the product of C and its own
NAMES = ("q", "k", "v", "log_input", "log_forget", "C", "m")

requires_cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")


def coefficients(degree: int = 17) -> Tensor:
    return torch.from_numpy(chebyshev_fit(make_map("cubic", 5), degree)).float().to(DEVICE)


def naive(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory, c: Tensor
) -> tuple[Tensor, Memory]:
    """One step after the other, with the matrix f(A) A written out and the stabiliser taken as constant."""
    outputs = []
    for t, state in enumerate(each_memory(k, v, log_input, log_forget, first, memory)):
        C = state.C
        A = C / (C.square().sum((-2, -1), keepdim=True) + NORM_FLOOR**2).sqrt()
        G = 2 * A @ A.mT - torch.eye(A.shape[-2]).to(A)
        now, after = torch.eye(A.shape[-2]).to(A).expand_as(G), G
        f = torch.zeros_like(G)
        for weight in c:
            f = f + weight * now
            now, after = after, 2 * G @ after - now
        outputs.append((q[:, :, t, None] @ f @ A).squeeze(-2))
    return torch.stack(outputs, 2), state


def gradients(
    form: Callable[..., tuple[Tensor, Memory]], inputs: Inputs, c: Tensor, weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The results y, C, n, m of a form, and the gradients of NAMES for the given weights of y and C."""
    q, k, v, log_input, log_forget, first, memory = inputs
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, log_input, log_forget, memory.C, memory.m)]
    y, after = form(*leaves[:5], first, Memory(leaves[5], memory.n, leaves[6]), c)
    loss = (y * weights[0].to(y)).sum() + (after.C * weights[1].to(after.C)).sum()
    return [y, *after], list(torch.autograd.grad(loss, leaves))


def assert_follows_naive(inputs: Inputs, c: Tensor, chunk: int = 64) -> None:
    """Results and gradients, within the bounds of their precision; memories are in fp32 in either."""
    batch, heads, steps, key = inputs[0].shape
    value = inputs[2].shape[-1]
    weights = torch.randn(batch, heads, steps, value).bfloat16(), torch.randn(batch, heads, key, value)

    def kernel(*arguments: object) -> tuple[Tensor, Memory]:
        return sequence.polynomial_read_sequence(*arguments, chunk=chunk)  # type: ignore[arg-type]

    ours, our_gradients = gradients(kernel, inputs, c, weights)
    theirs, their_gradients = gradients(naive, wide(inputs), c.double(), weights)
    assert ours[0].dtype == inputs[2].dtype
    assert all(x.dtype == torch.float32 for x in ours[1:])
    narrow = inputs[2].dtype == torch.bfloat16
    for name, a, b in zip(("y", "C", "n", "m"), ours, theirs, strict=True):
        assert error(a, b) < (BF16 if narrow and name == "y" else FP32), name
    bounds = [BF16] * 3 + [BF16_GATES] * 2 + [BF16] if narrow else [5 * FP32] * len(NAMES)
    emptied = inputs[5][:, 0].all()  # then what it held has a gradient of exactly 0, and so has its decay
    for name, a, b, bound in zip(NAMES, our_gradients, their_gradients, bounds, strict=False):
        assert b.norm() > 0 or emptied, name
        assert error(a, b) < bound, name


@pytest.mark.parametrize("own_coefficients", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_models_side_by_side_are_as_one_by_one(own_coefficients: bool, compiled: bool) -> None:
    """Under vmap, with the models' axis in front of some arguments and no such axis at others."""
    models = [make_inputs(20, 16, 16) for _ in range(2)]
    first, n = models[0][5], models[0][6].n
    c = torch.stack([coefficients(9), 0.5 * coefficients(9)])
    leaves = [
        torch.stack(column).requires_grad_()
        for column in zip(*((*inputs[:5], inputs[6].C, inputs[6].m) for inputs in models), strict=True)
    ]
    weights = torch.randn(2, 20, 16, device=DEVICE), torch.randn(2, 16, 16, device=DEVICE)

    def loss(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, m: Tensor, c: Tensor) -> Tensor:
        y, after = sequence.polynomial_read_sequence(q, k, v, i, f, first, Memory(C, n, m), c)
        return (y * weights[0]).sum() + (after.C * weights[1]).sum()

    side_by_side = torch.func.vmap(loss, in_dims=(0,) * 7 + (0 if own_coefficients else None,))
    if compiled:
        side_by_side = torch.compile(side_by_side, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(side_by_side(*leaves, c if own_coefficients else c[0]).sum(), leaves)
    for model in range(2):
        own = [leaf[model].detach().requires_grad_() for leaf in leaves]
        theirs = torch.autograd.grad(loss(*own, c[model if own_coefficients else 0]), own)
        for name, a, b in zip(NAMES, ours, theirs, strict=True):
            assert error(a[model], b) < FP32, name


@pytest.mark.parametrize(("key", "value", "steps"), SIZES + CUDA_SIZES * CUDA)
def test_sequence_follows_the_step_loop_with_all_gradients(key: int, value: int, steps: int) -> None:
    assert_follows_naive(make_inputs(steps, key, value), coefficients())


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize(("key", "value", "steps"), SIZES + CUDA_SIZES * CUDA)
def test_sequence_in_bf16(key: int, value: int, steps: int, used: bool) -> None:
    """From a memory that was used, and from an empty one, whose rank is first 1 and then grows."""
    inputs = make_inputs(steps, key, value, torch.bfloat16)
    inputs[5][:, 0] = not used
    assert_follows_naive(inputs, coefficients(21))


@pytest.mark.parametrize("chunk", [16, 40])
def test_any_chunk_gives_the_same(chunk: int) -> None:
    assert_follows_naive(make_inputs(70, 16, 16), coefficients(), chunk)


def test_chunks_are_powers_of_two_that_fit() -> None:
    assert [chunk_length(chunk, 64, 64, 2) for chunk in (1, 16, 31, 40, 64, 500)] == [16, 16, 16, 32, 64, 64]
    assert chunk_length(64, 16, 128, 2) == 32
    assert chunk_length(64, 128, 16, 4) == 16


@pytest.mark.parametrize("terms", [1, 2, 4])
def test_any_number_of_coefficients(terms: int) -> None:
    assert_follows_naive(make_inputs(20, 16, 16), torch.randn(terms, device=DEVICE))


def test_agrees_with_the_reference_function() -> None:
    inputs, c = make_inputs(90, 16, 16), coefficients()
    weights = torch.randn(2, 2, 90, 16), torch.randn(2, 2, 16, 16)

    def by_direction(form: Callable[..., tuple[Tensor, Memory]]) -> Callable[..., tuple[Tensor, Memory]]:
        """The memory at the end counts by its direction alone, as when a read follows: the stabiliser cancels."""

        def run(*arguments: Tensor) -> tuple[Tensor, Memory]:
            y, after = form(*arguments)
            return y, after._replace(C=F.normalize(after.C.flatten(-2), dim=-1).view_as(after.C))

        return run

    ours = gradients(by_direction(sequence.polynomial_read_sequence), inputs, c, weights)
    theirs = gradients(by_direction(reference.polynomial_read_sequence), wide(inputs), c.double(), weights)
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert error(a, b) < 5 * FP32


def test_extreme_gates() -> None:
    q, k, v, log_input, log_forget, first, memory = make_inputs(80, 16, 16)
    empty = reference.empty(2, 2, 16, 16, q.device)
    for shift, decay in ((-200.0, 1.0), (200.0, 1.0), (0.0, 100.0), (-80.0, 0.0)):
        inputs = (q, k, v, 5 * log_input + shift, decay * log_forget, first, empty)
        y, after = sequence.polynomial_read_sequence(*inputs, coefficients())
        expected, expected_after = naive(*wide(inputs), coefficients().double())
        assert error(y, expected) < 5 * FP32
        assert error(after.C, expected_after.C) < 5 * FP32


def test_a_reset_hides_what_came_before() -> None:
    q, k, v, log_input, log_forget, first, memory = make_inputs(80, 16, 16)
    first[:] = False
    first[:, 0] = True
    infinite = Memory(*(torch.full_like(x, float("inf")) for x in memory))
    inputs = (q, k, v, log_input, log_forget, first, infinite)
    weights = torch.randn(2, 2, 80, 16), torch.randn(2, 2, 16, 16)
    results, found = gradients(sequence.polynomial_read_sequence, inputs, coefficients(), weights)
    fresh = (q, k, v, log_input, log_forget, torch.zeros_like(first), reference.empty(2, 2, 16, 16, q.device))
    expected, expected_gradients = gradients(sequence.polynomial_read_sequence, fresh, coefficients(), weights)
    for a, b in zip([*results, *found[:4]], [*expected, *expected_gradients[:4]], strict=True):
        assert error(a, b) < FP32
    assert torch.equal(found[5], torch.zeros_like(found[5]))

    first[:, 0] = False
    first[:, 30] = True
    weights[0][:, :, :30] = 0
    _, found = gradients(sequence.polynomial_read_sequence, (*inputs[:5], first, memory), coefficients(), weights)
    for x in found[:5]:
        assert torch.equal(x[:, :, :30], torch.zeros_like(x[:, :, :30]))
        assert x[:, :, 31:].abs().amax() > 0
    assert torch.equal(found[5], torch.zeros_like(found[5]))


def test_nothing_written_reads_as_nothing() -> None:
    q, k, v, log_input, log_forget, first, _ = make_inputs(20, 16, 16)
    inputs = (q, k, torch.zeros_like(v), log_input, log_forget, first, reference.empty(2, 2, 16, 16, q.device))
    weights = torch.randn(2, 2, 20, 16), torch.zeros(2, 2, 16, 16)
    (y, *_), found = gradients(sequence.polynomial_read_sequence, inputs, coefficients(), weights)
    assert torch.equal(y, torch.zeros_like(y))
    assert all(x.isfinite().all() for x in found)


def test_tensors_may_lie_in_any_order() -> None:
    inputs = make_inputs(70, 16, 16)
    q, k, v, log_input, log_forget, first, memory = inputs
    joined = torch.cat([q, k, v], -1).transpose(1, 2).contiguous().transpose(1, 2)  # as layers lay them out
    parts = joined.split(16, -1)
    gates = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (log_input, log_forget)]
    scattered = (
        *parts,
        *gates,
        first.T.contiguous().T,
        Memory(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in memory)),
    )
    weights = torch.randn(2, 70, 2, 16).transpose(1, 2), torch.randn(2, 2, 16, 16)
    ours = gradients(sequence.polynomial_read_sequence, scattered, coefficients(), weights)  # type: ignore[arg-type]
    theirs = gradients(sequence.polynomial_read_sequence, inputs, coefficients(), weights)
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key", "value"), [(16, 16), (16, 32)] + [(d, d) for d in DIMS] * CUDA)
def test_step_follows_the_reference(key: int, value: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(6, key, value, dtype)
    for c in (None, coefficients(), coefficients()[:1]):
        memory = inputs[6]._replace(n=inputs[6].n * 0.1)
        for t in range(6):
            *now, first, _ = at(inputs, t)
            y, after = one_step.step(*now, first, memory, c)
            *exact, exact_first, exact_memory = at((*wide(inputs)[:6], Memory(*(x.double() for x in memory))), t)
            expected = reference.write(*exact[1:], exact_first, exact_memory)
            if c is None:
                read = reference.plain_read(exact[0], expected)
            else:
                read = reference.polynomial_read(exact[0], expected, c.double())
            assert y.dtype == dtype
            assert error(y, read) < (FP32 if dtype == torch.float32 else 5e-3)
            for a, b in zip(after, expected, strict=True):
                assert a.dtype == torch.float32
                assert error(a, b) < FP32
            memory = after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_keeps_a_memory_in_bf16_and_computes_as_in_fp32(dtype: torch.dtype) -> None:
    *now, first, memory = at(make_inputs(1, 16, 16, dtype), 0)
    halved = memory._replace(C=memory.C.bfloat16())
    for c in (None, coefficients()):
        y, after = one_step.step(*now, first, halved, c)
        exact_y, exact = one_step.step(*now, first, halved._replace(C=halved.C.float()), c)
        assert torch.equal(y, exact_y)
        assert all(torch.equal(a, b) for a, b in zip(after, exact._replace(C=exact.C.bfloat16()), strict=True))


def test_a_step_from_an_infinite_memory_that_is_emptied() -> None:
    *now, _, memory = at(make_inputs(1, 16, 16), 0)
    infinite = Memory(*(torch.full_like(x, float("inf")) for x in memory))
    first = torch.ones(2, dtype=torch.bool, device=DEVICE)
    for c in (None, coefficients()):
        y, after = one_step.step(*now, first, infinite, c)
        expected_y, expected = one_step.step(*now, ~first, reference.empty(2, 2, 16, 16, now[0].device), c)
        assert y.isfinite().all()
        for a, b in zip((y, *after), (expected_y, *expected), strict=True):
            assert torch.equal(a, b)


def test_steps_equal_the_sequence() -> None:
    inputs, c = make_inputs(40, 16, 16), coefficients()
    y, after = sequence.polynomial_read_sequence(*inputs, c)
    memory = inputs[6]
    for t in range(40):
        *now, first, _ = at(inputs, t)
        row, memory = one_step.step(*now, first, memory, c)
        assert error(row, y[:, :, t]) < 5 * FP32
    for a, b in zip(memory, after, strict=True):
        assert error(a, b) < FP32


def test_without_gradients_nothing_is_kept() -> None:
    q, k, v, log_input, log_forget, first, memory = make_inputs(20, 16, 16)
    arguments = (q, k, v, log_input, log_forget, first, *memory, coefficients(), 64)
    kept = sequence.forward_op(*arguments, True)
    lean = sequence.forward_op(*arguments, False)
    assert all(error(a, b) < 1e-6 for a, b in zip(kept[:6], lean[:6], strict=True))
    assert all(x.numel() == 0 for x in lean[6:])


def test_operations_declare_what_they_return() -> None:
    inputs, c = make_inputs(20, 16, 32), coefficients()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(one_step.step_op, (*at(inputs, 0)[:6], *inputs[6], c), test_utils=checks)
    forward = (*inputs[:6], *inputs[6], c, 64, True)
    torch.library.opcheck(sequence.forward_op, forward, test_utils=checks)
    saved = sequence.forward_op(*forward)[4:]
    backward = (torch.randn_like(inputs[2]), torch.randn_like(inputs[6].C), *inputs[1:6], c, *saved)
    torch.library.opcheck(sequence.backward_op, backward, test_utils=checks)


def test_compiles_without_a_break() -> None:
    inputs, c = make_inputs(20, 16, 16), coefficients()
    weights = torch.randn(2, 2, 20, 16), torch.randn(2, 2, 16, 16)

    def function(*arguments: Tensor) -> tuple[Tensor, Memory]:
        y, after = sequence.polynomial_read_sequence(*arguments)  # type: ignore[arg-type]
        return y * 2, after

    backend = "inductor" if CUDA else "aot_eager"
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    ours, theirs = (gradients(form, inputs, c, weights) for form in (compiled, function))
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert error(a, b) < 1e-6


# ---- the choice -------------------------------------------------------------------------------------------------


def test_on_the_cpu_the_reference_runs() -> None:
    inputs, c = on_device(make_inputs(20, 16, 16), "cpu"), coefficients().cpu()
    ours, theirs = (form.polynomial_read_sequence(*inputs, c, chunk=16) for form in (kernels, reference))
    assert all(torch.equal(a, b) for a, b in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True))
    *now, first, memory = at(inputs, 0)
    after = reference.write(*now[1:], first, memory)
    reads = (c, reference.polynomial_read(now[0], after, c)), (None, reference.plain_read(now[0], after))
    for given, read in reads:
        y, found = kernels.step(*now, first, memory, given)
        assert all(torch.equal(a, b) for a, b in zip((y, *found), (read, *after), strict=True))
    halved, halved_after = kernels.step(*now, first, memory._replace(C=memory.C.bfloat16()))
    whole, after = kernels.step(*now, first, memory._replace(C=memory.C.bfloat16().float()))
    assert torch.equal(halved, whole)
    assert all(torch.equal(a, b) for a, b in zip(halved_after, after._replace(C=after.C.bfloat16()), strict=True))


def test_a_step_with_gradients_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_fits", lambda q, k, v, dims: True)
    calls = []
    monkeypatch.setattr(one_step, "step", lambda *arguments: calls.append(1) or (arguments[0], arguments[6]))
    *now, first, memory = at(make_inputs(1, 16, 16), 0)
    now[1].requires_grad_()
    y, _ = kernels.step(*now, first, memory, coefficients())
    assert y.grad_fn is not None
    assert not calls
    with torch.no_grad():
        kernels.step(*now, first, memory, coefficients())
    assert calls


def test_kernels_are_taken_where_they_fit() -> None:
    q, k, v, *_ = make_inputs(2, 16, 16)
    assert kernels._fits(q, k, v, DIMS) == CUDA
    for other in (q.double(), q[..., :12], q.half()):
        assert not kernels._fits(other, other, other, DIMS)
    assert not kernels._fits(q, k, v.bfloat16(), DIMS)


@requires_cuda
def test_runs_in_a_cuda_graph_with_coefficients_that_change() -> None:
    inputs = make_inputs(100, 32, 32, torch.bfloat16)
    c = coefficients()
    weights = torch.randn(2, 2, 100, 32, device=DEVICE), torch.randn(2, 2, 32, 32, device=DEVICE)

    def run() -> list[Tensor]:
        results, found = gradients(kernels.polynomial_read_sequence, inputs, c, weights)
        y, after = kernels.step(*at(inputs, 0), c)
        return [x.detach() for x in (*results, *found, y, *after)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for scale in (1.0, 0.5):
        c.mul_(scale)
        inputs[0].mul_(scale)
        graph.replay()
        expected = run()
        torch.cuda.synchronize()
        for a, b in zip(captured, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
