"""The kernels of the plain read over a sequence against a loop over steps in fp64, as in test_kernels.py."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import pytest
import torch
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
from agent.cores.kernels import one_step, plain_sequence
from agent.cores.memory import MAX_LOG_NORMALISER, NORMALISER_EPS, Memory
from agent.cores.reads import OrthoRead, OrthoReadConfig, PlainRead

FP32 = 2e-5  # relative error of tensors, by norm; of gradients, five times that
BF16 = 0.01  # of y and of the gradients of q, k and v in bf16, where the last figure of a number is 0.004 of it
BF16_SUMS = 0.03  # of the other gradients in bf16, sums that may nearly cancel
NAMES = ("q", "k", "v", "log_input", "log_forget", "C", "n", "m")

Form = Callable[..., tuple[Tensor, Memory]]


def naive(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, first: Tensor, memory: Memory
) -> tuple[Tensor, Memory]:
    """One step after the other."""
    outputs = []
    for t, after in enumerate(each_memory(k, v, log_input, log_forget, first, memory)):
        normaliser = torch.maximum(*overlap_and_floor(q[:, :, t], after)) + NORMALISER_EPS
        outputs.append((q[:, :, t, None] @ after.C).squeeze(-2) / normaliser[..., None])
    return torch.stack(outputs, 2), after


def overlap_and_floor(q: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    """What the normaliser is the larger of, (B, H) each, for q (B, H, K)."""
    return (q * memory.n).sum(-1).abs(), (-memory.m).clamp(max=MAX_LOG_NORMALISER).exp()


def overlapping(inputs: Inputs) -> float:
    """The share of steps whose normaliser is |q'n|."""
    q, *written = wide(inputs)
    pairs = (overlap_and_floor(q[:, :, t], after) for t, after in enumerate(each_memory(*written)))
    return float(torch.stack([overlap > floor for overlap, floor in pairs]).double().mean())


def shifted(inputs: Inputs, shift: float) -> Inputs:
    """Everything written, and the memory, exp(shift) times as large."""
    q, k, v, log_input, log_forget, first, memory = inputs
    return q, k, v, log_input + shift, log_forget, first, memory._replace(m=memory.m + shift)


def make_weights(inputs: Inputs) -> list[Tensor]:
    """How much y, C and n count in a loss; that of y is the same number in bf16."""
    q, _, v, *_, memory = inputs
    return [torch.randn(*q.shape[:3], v.shape[-1]).bfloat16(), torch.randn(memory.C.shape), torch.randn(memory.n.shape)]


def gradients(form: Form, inputs: Inputs, weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The results y, C, n, m of a form, and the gradients of NAMES for the given weights of y, C and n."""
    q, k, v, log_input, log_forget, first, memory = inputs
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, log_input, log_forget, *memory)]
    y, after = form(*leaves[:5], first, Memory(*leaves[5:]))
    losses = [(x * weight.to(x)).sum() for x, weight in zip((y, after.C, after.n), weights, strict=True)]
    return [y, *after], list(torch.autograd.grad(sum(losses), leaves))


def assert_follows_naive(inputs: Inputs, chunk: int = 64) -> None:
    """Results and gradients, within the bounds of their precision; memories are in fp32 in either."""

    def kernel(*arguments: object) -> tuple[Tensor, Memory]:
        return plain_sequence.plain_read_sequence(*arguments, chunk=chunk)  # type: ignore[arg-type]

    weights = make_weights(inputs)
    ours, our_gradients = gradients(kernel, inputs, weights)
    theirs, their_gradients = gradients(naive, wide(inputs), weights)
    assert ours[0].dtype == inputs[2].dtype
    assert all(x.dtype == torch.float32 for x in ours[1:])
    narrow = inputs[2].dtype == torch.bfloat16
    for name, a, b in zip(("y", "C", "n", "m"), ours, theirs, strict=True):
        assert error(a, b) < (BF16 if narrow and name == "y" else FP32), name
    bounds = [BF16] * 3 + [BF16_SUMS] * 5 if narrow else [5 * FP32] * len(NAMES)
    for name, a, b, bound in zip(NAMES, our_gradients, their_gradients, bounds, strict=True):
        # What was emptied has a gradient of 0.
        assert (a - b).norm() < bound * b.norm() + 1e-7, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key", "value", "steps"), SIZES + CUDA_SIZES * CUDA)
def test_sequence_follows_the_step_loop_with_all_gradients(
    key: int, value: int, steps: int, dtype: torch.dtype
) -> None:
    assert_follows_naive(make_inputs(steps, key, value, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shift", "least", "most"), [(-3, 0, 0.05), (-2, 0.05, 0.3), (-1, 0.3, 0.6), (2, 0.9, 1)])
def test_either_normaliser(shift: float, least: float, most: float, dtype: torch.dtype) -> None:
    """The overlap is the larger of the two at few or many of the steps."""
    inputs = shifted(make_inputs(70, 16, 16, dtype), shift)
    assert least <= overlapping(inputs) <= most
    assert_follows_naive(inputs)


@pytest.mark.parametrize("chunk", [16, 40])
def test_any_chunk_gives_the_same(chunk: int) -> None:
    assert_follows_naive(make_inputs(70, 16, 16), chunk)


def test_from_a_memory_that_is_emptied_at_once_or_was_empty() -> None:
    inputs = make_inputs(40, 16, 16)
    inputs[5][0, 0] = True
    assert_follows_naive(inputs)
    assert_follows_naive((*inputs[:6], reference.empty(2, 2, 16, 16, inputs[0].device)))


def test_agrees_with_the_reference_function() -> None:
    """Which has the gradients of the stabiliser too: they cancel where the memory counts as what it stands for."""
    inputs = make_inputs(90, 16, 16)
    weights = make_weights(inputs)

    def absolute(form: Form) -> Form:
        def run(*arguments: Tensor) -> tuple[Tensor, Memory]:
            y, (C, n, m) = form(*arguments)
            return y, Memory(m.exp()[..., None, None] * C, m.exp()[..., None] * n, m)

        return run

    ours = gradients(absolute(plain_sequence.plain_read_sequence), inputs, weights)
    theirs = gradients(absolute(reference.plain_read_sequence), wide(inputs), weights)
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert error(a, b) < 5 * FP32


def test_steps_equal_the_sequence() -> None:
    inputs = make_inputs(40, 16, 16)
    y, after = plain_sequence.plain_read_sequence(*inputs)
    memory = inputs[6]
    for t in range(40):
        *now, first, _ = at(inputs, t)
        row, memory = one_step.step(*now, first, memory)
        assert error(row, y[:, :, t]) < 5 * FP32
    for a, b in zip(memory, after, strict=True):
        assert error(a, b) < FP32


@pytest.mark.parametrize("compiled", [False, True])
def test_models_side_by_side_are_as_one_by_one(compiled: bool) -> None:
    """Under vmap, with the models' axis in front of some arguments and no such axis at others."""
    models = [make_inputs(20, 16, 16) for _ in range(2)]
    first, n = models[0][5], models[0][6].n
    columns = zip(*((*inputs[:5], inputs[6].C, inputs[6].m) for inputs in models), strict=True)
    leaves = [torch.stack(column).requires_grad_() for column in columns]
    leaves.append(n.clone().requires_grad_())
    weights = [weight.to(DEVICE).float() for weight in make_weights(models[0])]

    def loss(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, m: Tensor, n: Tensor) -> Tensor:
        y, after = plain_sequence.plain_read_sequence(q, k, v, i, f, first, Memory(C, n, m))
        return (y * weights[0]).sum() + (after.C * weights[1]).sum() + (after.n * weights[2]).sum()

    side_by_side = torch.func.vmap(loss, in_dims=(0,) * 7 + (None,))
    if compiled:
        side_by_side = torch.compile(side_by_side, fullgraph=True, backend="aot_eager")
    *ours, our_n = torch.autograd.grad(side_by_side(*leaves).sum(), leaves)
    n_sum = torch.zeros_like(n)
    for model in range(2):
        own = [*(leaf[model].detach().requires_grad_() for leaf in leaves[:-1]), n.clone().requires_grad_()]
        *theirs, their_n = torch.autograd.grad(loss(*own), own)
        for a, b in zip(ours, theirs, strict=True):
            assert error(a[model], b) < FP32
        n_sum += their_n
    assert error(our_n, n_sum) < FP32


@pytest.mark.parametrize("axes", [(0, 1), (1, 2), (-1, -2)])
def test_tensors_may_lie_in_any_order(axes: tuple[int, int]) -> None:
    """With any two axes exchanged in device memory; (1, 2) is how layers lay them out."""

    def lay(x: Tensor) -> Tensor:
        return x.transpose(*axes).contiguous().transpose(*axes) if x.dim() > 2 else x.T.contiguous().T

    def run(*arguments: Tensor) -> tuple[Tensor, Memory]:
        *tensors, memory = arguments
        laid = [lay(x) for x in tensors]
        assert not any(x.is_contiguous() for x in laid)
        return plain_sequence.plain_read_sequence(*laid, Memory(*(lay(x) for x in memory)))

    inputs = make_inputs(70, 16, 16)
    weights = make_weights(inputs)
    ours = gradients(run, inputs, [lay(weight) for weight in weights])
    theirs = gradients(plain_sequence.plain_read_sequence, inputs, weights)
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize(
    ("shift", "decay", "bound"),
    [(-200, 1, 1e-4), (-80, 0, 1e-4), (-20, 1, 1e-4), (0, 100, 2e-4), (200, 1, 2e-3)],
)
def test_extreme_gates(shift: float, decay: float, bound: float) -> None:
    """Where all is written strongly, nothing but the overlap is divided by, and in some steps it nearly cancels."""
    q, k, v, log_input, log_forget, first, _ = make_inputs(80, 16, 16)
    empty = reference.empty(2, 2, 16, 16, q.device)
    inputs = (q, k, v, 5 * log_input + shift, decay * log_forget, first, empty)
    weights = make_weights(inputs)
    ours, our_gradients = gradients(plain_sequence.plain_read_sequence, inputs, weights)
    theirs, their_gradients = gradients(naive, wide(inputs), weights)
    for name, a, b in zip(NAMES, our_gradients, their_gradients, strict=True):
        assert error(a, b) < bound, name
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b) < bound


def test_a_reset_hides_what_came_before() -> None:
    q, k, v, log_input, log_forget, first, memory = make_inputs(80, 16, 16)
    first[:] = False
    first[:, 0] = True
    infinite = Memory(*(torch.full_like(x, float("inf")) for x in memory))
    inputs = (q, k, v, log_input, log_forget, first, infinite)
    weights = make_weights(inputs)
    results, found = gradients(plain_sequence.plain_read_sequence, inputs, weights)
    fresh = (q, k, v, log_input, log_forget, torch.zeros_like(first), reference.empty(2, 2, 16, 16, q.device))
    expected, expected_gradients = gradients(plain_sequence.plain_read_sequence, fresh, weights)
    for a, b in zip([*results, *found[:4]], [*expected, *expected_gradients[:4]], strict=True):
        assert error(a, b) < FP32
    assert not found[4][..., 0].any()
    for x in found[5:]:
        assert torch.equal(x, torch.zeros_like(x))

    first[:, 0] = False
    first[:, 30] = True
    weights[0][:, :, :30] = 0
    _, found = gradients(plain_sequence.plain_read_sequence, (*inputs[:5], first, memory), weights)
    for x in found[:5]:
        assert torch.equal(x[:, :, :30], torch.zeros_like(x[:, :, :30]))
        assert x[:, :, 31:].abs().amax() > 0
    assert not found[4][..., 30].any()
    for x in found[5:]:
        assert torch.equal(x, torch.zeros_like(x))


def test_nothing_written_reads_as_nothing() -> None:
    q, k, v, log_input, log_forget, first, _ = make_inputs(20, 16, 16)
    inputs = (q, torch.zeros_like(k), v, log_input, log_forget, first, reference.empty(2, 2, 16, 16, q.device))
    (y, *_), found = gradients(plain_sequence.plain_read_sequence, inputs, make_weights(inputs))
    assert torch.equal(y, torch.zeros_like(y))
    assert all(x.isfinite().all() for x in found)


def test_operations_declare_what_they_return() -> None:
    inputs = make_inputs(70, 16, 32)
    checks = ("test_schema", "test_faketensor")
    forward = (*inputs[:6], *inputs[6], 64)
    torch.library.opcheck(plain_sequence.forward_op, forward, test_utils=checks)
    y, C, n, _, *starts = plain_sequence.forward_op(*forward)
    backward = (*(torch.randn_like(x) for x in (y, C, n)), *inputs[:6], y, *starts, 64)
    torch.library.opcheck(plain_sequence.backward_op, backward, test_utils=checks)


def test_compiles_without_a_break() -> None:
    inputs = make_inputs(20, 16, 16)
    weights = make_weights(inputs)

    def function(*arguments: Tensor) -> tuple[Tensor, Memory]:
        y, after = plain_sequence.plain_read_sequence(*arguments)  # type: ignore[arg-type]
        return y * 2, after

    compiled = torch.compile(function, backend="inductor" if CUDA else "aot_eager", fullgraph=True)
    ours, theirs = (gradients(form, inputs, weights) for form in (compiled, function))
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert error(a, b) < 1e-6


# ---- the choice -------------------------------------------------------------------------------------------------


def plain_reads() -> list[PlainRead | OrthoRead]:
    """The modules that read plainly."""
    config = OrthoReadConfig(
        map="cubic", map_steps=5, form="polynomial", degree=17, alpha_schedule="constant", alpha_start=0.0,
        alpha_end=0.0, alpha_updates=1, alpha_metric="", alpha_side="above", alpha_bar=0.0,
    )  # fmt: skip
    return [PlainRead(), OrthoRead(config)]


def test_on_the_cpu_the_reference_runs() -> None:
    inputs = on_device(make_inputs(20, 16, 16), "cpu")
    ours, theirs = (form.plain_read_sequence(*inputs, chunk=16) for form in (kernels, reference))
    assert all(torch.equal(a, b) for a, b in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True))


def test_the_reads_take_the_kernels_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(20, 16, 16)
    expected, expected_after = plain_sequence.plain_read_sequence(*inputs)
    calls = []
    run = plain_sequence.plain_read_sequence
    monkeypatch.setattr(kernels, "_fits", lambda q, k, v, dims: True)
    monkeypatch.setattr(plain_sequence, "plain_read_sequence", lambda *given: calls.append(1) or run(*given))
    for read in plain_reads():
        y, after = read.sequence(*inputs)
        assert all(torch.equal(a, b) for a, b in zip((y, *after), (expected, *expected_after), strict=True))
    assert len(calls) == 2


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_runs_in_a_cuda_graph() -> None:
    inputs = make_inputs(100, 32, 32, torch.bfloat16)
    weights = [weight.to(DEVICE) for weight in make_weights(inputs)]

    def run() -> list[Tensor]:
        results, found = gradients(kernels.plain_read_sequence, inputs, weights)
        return [x.detach() for x in (*results, *found)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for scale in (1.0, 0.5):
        inputs[0].mul_(scale)
        graph.replay()
        expected = run()
        torch.cuda.synchronize()
        for a, b in zip(captured, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
