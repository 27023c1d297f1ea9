"""How long recurrent cores take. Each is first checked against its own steps, and a wrong one is not timed."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.config import resolve
from agent.cores import RecurrentCore, State, make_core, registered_cores
from agent.cores.mlstm import MLSTM
from agent.errors import UserError
from agent.networks import Frozen
from agent.schema import Config

FORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "mesa": {
        "30 iterations": ("core.iterations=30", "core.ridge=0.1"),
        "20 iterations": ("core.iterations=20", "core.ridge=0.3"),
    },
    "ortho_mlstm": {form: (f"core.form={form}",) for form in ("polynomial", "exact")},
}
"""For a core that can compute its function in several ways: the name of each, and the settings that choose it."""

READS = ("read", "read_training", "read_loop", "read_loop_training")
PASSES = ("step", "forward", "training", "loop", "loop_training", *READS)
"""One step as imagination takes it. A sequence without gradients, and with those of inputs and weights; the same two as
a loop of steps under ordinary autograd. And these four of what one block of a matrix core does with its memory alone,
from queries, keys, values and gates to what is read."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest error of an output, state or gradient, relative to its norm."""
NEGLIGIBLE = 1e-2  # a gradient's error is seen relative to at least this share of the largest gradient's norm

PAST = 8  # steps that fill the memory with which a sequence begins
CHECKED = 4  # streams that are compared with a loop of steps, which takes long and much memory for many
WARM_UP_CALLS, WARM_UP_SECONDS = 3, 0.2

Row = dict[str, Any]


class Case(NamedTuple):
    """One core in one form and size."""

    name: str
    form: str
    config: Config

    def make(self, device: torch.device) -> RecurrentCore:
        """A new core of this kind, always with the same weights."""
        torch.manual_seed(0)
        return make_core(self.name, self.input_size, self.config.core).to(device)

    @property
    def input_size(self) -> int:
        """Width of x as the RSSM builds it."""
        return 2 * self.config.rssm.hidden

    def dtype(self, device: torch.device) -> torch.dtype:
        """Precision of matrix products, as the agent chooses it."""
        chosen = self.config.precision
        bf16 = chosen == "bf16" or (chosen == "auto" and device.type == "cuda")
        return torch.bfloat16 if bf16 else torch.float32


def list_cases(
    names: Sequence[str] | None,
    sizes: Sequence[str | None],
    device: str | None,
    settings: Sequence[str],
    forms: Sequence[str] | None = None,
) -> list[Case]:
    """Every form of every core at every size.

    Args:
        names: cores to take; None is all that are registered.
        sizes: names of sizes; None leaves this choice to the configuration.
        device: "auto", "cpu" or "cuda".
        settings: "key=value", laid over every core's file.
        forms: the forms to take; of a core that has none of them, and for None, all.

    Raises:
        UserError: a name or a setting is unknown or not allowed.
    """
    known = sorted({form for core in FORMS.values() for form in core})
    if unknown := set(forms or ()) - set(known):
        raise UserError(f"--forms {min(unknown)}: choose from {', '.join(known)}")
    cases = []
    for size in sizes:
        for name in names or sorted(registered_cores()):
            own = FORMS.get(name, {"": ()})
            wanted = [form for form in own if form in (forms or ())] or own
            for form in wanted:
                # Nothing of an environment is used, but a configuration is complete only with one.
                config = resolve("dmc_walker", name, size, device=device, settings=[*own[form], *settings])
                cases.append(Case(name, form, config))
    return cases


class Inputs(NamedTuple):
    """What a core is given: x (B, T, X) in the dtype of products, state (B, ...), first (B, T)."""

    x: Tensor
    state: State
    first: Tensor


def make_inputs(core: RecurrentCore, size: int, batch: int, length: int, dtype: torch.dtype) -> Inputs:
    """Random inputs, a memory that holds something, and one reset in the middle of the first stream."""
    device = next(core.parameters()).device
    x = torch.randn(batch, PAST + length, size, device=device).to(dtype)
    first = torch.zeros(batch, PAST + length, dtype=torch.bool, device=device)
    first[0, PAST + length // 2] = True
    with torch.no_grad():
        _, state = step_by_step(core, x[:, :PAST].float(), core.initial(batch), first[:, :PAST])
    return Inputs(x[:, PAST:].contiguous(), state, first[:, PAST:].contiguous())


def step_by_step(core: RecurrentCore, x: Tensor, state: State, first: Tensor) -> tuple[Tensor, State]:
    """`sequence` as it is defined: T calls of `step` under ordinary autograd -> h (B, T, F) and the last state."""
    outputs = []
    for t in range(x.shape[1]):
        h, state = core.step(x[:, t], state, first[:, t])
        outputs.append(h)
    return torch.stack(outputs, 1), state


def largest_errors(core: RecurrentCore, inputs: Inputs) -> tuple[float, float]:
    """How far `sequence`, in the dtype of x, and its gradients are from steps in fp32, relative to their norms.

    And how far steps in that dtype are: 0 in fp32, and in bf16 what no form can be blamed for.
    """
    weight = torch.randn(*inputs.x.shape[:2], core.feature_size, device=inputs.x.device)

    def run(function: Callable[..., tuple[Tensor, State]], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        x = inputs.x.to(dtype).detach().requires_grad_()
        state = {key: value.detach().requires_grad_() for key, value in inputs.state.items()}
        h, after = function(x, state, inputs.first)
        sources = [x, *state.values(), *core.parameters()]
        gradients = torch.autograd.grad((h * weight).sum(), sources, allow_unused=True, materialize_grads=True)
        return [h.detach(), *(after[key].detach() for key in sorted(after))], list(gradients)

    def steps(*given: Any) -> tuple[Tensor, State]:
        return step_by_step(core, *given)

    true_outputs, true_gradients = run(steps, torch.float32)
    largest_gradient = max(gradient.norm().item() for gradient in true_gradients)

    def error(function: Callable[..., tuple[Tensor, State]]) -> float:
        outputs, gradients = run(function, inputs.x.dtype)
        errors = [_relative_error(ours, true, 0.0) for ours, true in zip(outputs, true_outputs, strict=True)]
        errors += [
            _relative_error(ours, true, NEGLIGIBLE * largest_gradient)
            for ours, true in zip(gradients, true_gradients, strict=True)
        ]
        return torch.tensor(errors).max().item()  # NaN where one is NaN

    return error(core.sequence), 0.0 if inputs.x.dtype == torch.float32 else error(steps)


def _relative_error(ours: Tensor, true: Tensor, least: float) -> float:
    return (ours.float() - true.float()).norm().item() / max(true.float().norm().item(), least, 1e-12)


def workload(core: RecurrentCore, inputs: Inputs, what: str) -> Callable[[], Any]:
    """The function without arguments that one of `PASSES` stands for."""
    x, state, first = inputs
    if what == "step":
        frozen = Frozen(core, x.dtype).module
        frozen_x, frozen_first = x[:, 0].contiguous(), first[:, 0].contiguous()
        return torch.no_grad()(lambda: frozen.step(frozen_x, state, frozen_first))
    if what in READS:
        function, leaves = _read_alone(core, inputs, by_steps="loop" in what)
    else:
        leaf = x.detach().requires_grad_()
        run = partial(step_by_step, core) if what.startswith("loop") else core.sequence
        function, leaves = lambda: run(leaf, state, first)[0], [leaf, *core.parameters()]
    if not what.endswith("training"):
        return torch.no_grad()(function)
    weight = torch.randn_like(function())
    return lambda: torch.autograd.grad((function() * weight).sum(), leaves, allow_unused=True)


def _read_alone(core: RecurrentCore, inputs: Inputs, by_steps: bool) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """What a block does between its projections, giving y (B, H, T, D), and the tensors it depends on."""
    assert isinstance(core, MLSTM)
    (batch, length, _), heads, size = inputs.x.shape, core.config.heads, core.config.head_dim
    q, k, v = (torch.randn(batch, heads, length, size, device=inputs.x.device).to(inputs.x.dtype) for _ in range(3))
    log_input, log_forget = (torch.randn(batch, heads, length, device=inputs.x.device) for _ in range(2))
    leaves = [q, k * size**-0.5, v, log_input, F.logsigmoid(log_forget + 4)]
    leaves = [tensor.detach().requires_grad_() for tensor in leaves]
    memory = core.memory_of_block(0, inputs.state)

    def at_once() -> Tensor:
        q, k, v, log_input, log_forget = leaves
        return core.reader.sequence(q, k, core.reader.written(k, v), log_input, log_forget, inputs.first, memory)[0]

    def loop() -> Tensor:
        q, k, v, log_input, log_forget = leaves
        steps = zip(*(part.unbind(2) for part in (q, k, core.reader.written(k, v), log_input, log_forget)), strict=True)
        outputs, now = [], memory
        for (q, k, v, log_input, log_forget), first in zip(steps, inputs.first.unbind(1), strict=True):
            y, now = core.reader.step(q, k, v, log_input, log_forget, first, now)
            outputs.append(y)
        return torch.stack(outputs, 2)

    return loop if by_steps else at_once, leaves


def captured(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function as a CUDA graph, captured after calls that set up what must not be set up in one."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def milliseconds(function: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """What each of `repeats` calls takes, after a warm-up: by CUDA events, or by the clock on the CPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    started, calls = time.perf_counter(), 0
    while calls < WARM_UP_CALLS or time.perf_counter() - started < WARM_UP_SECONDS:
        function()
        wait()
        calls += 1
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(repeats):
            function()
            marks.append(time.perf_counter())
        return [1000 * (after - before) for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    wait()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def measure(
    case: Case, batches: Sequence[int], lengths: Sequence[int], passes: Sequence[str], *,
    device: torch.device, repeats: int, graph: bool,
) -> Iterator[Row]:  # fmt: skip
    """Check and time one case: a row for each batch, length and pass, in which `refused` says why it has no times.

    A step does not depend on the length, so it is timed with the first one alone.
    """
    core, dtype = case.make(device), case.dtype(device)
    for batch in batches:
        for length in lengths:
            inputs, verdict = _checked(core, case.input_size, batch, length, dtype)
            for what in passes_at(case, length, lengths, passes):
                row: Row = {
                    "core": case.name, "form": case.form, "size": case.config.size, "precision": str(dtype)[6:],
                    "batch": batch, "length": 1 if what == "step" else length, "pass": what,
                }  # fmt: skip
                times = {} if "refused" in verdict else _timed(core, inputs, what, device, repeats, graph)
                yield row | verdict | times


def passes_at(case: Case, length: int, lengths: Sequence[int], passes: Sequence[str]) -> list[str]:
    """Those that are timed at one of the lengths: a step once, and a read only where there is a matrix."""
    has_matrix = issubclass(registered_cores()[case.name], MLSTM)
    known = [what for what in passes if has_matrix or what not in READS]
    return [what for what in known if what != "step" or length == lengths[0]]


def _checked(core: RecurrentCore, size: int, batch: int, length: int, dtype: torch.dtype) -> tuple[Inputs | None, Row]:
    try:
        inputs = make_inputs(core, size, batch, length, dtype)
        state = {key: value[:CHECKED] for key, value in inputs.state.items()}
        error, unavoidable = largest_errors(core, Inputs(inputs.x[:CHECKED], state, inputs.first[:CHECKED]))
    except torch.OutOfMemoryError:
        return None, {"refused": "out of memory"}
    allowed = max(TOLERANCE[dtype], 2 * unavoidable)
    if error <= allowed:  # NaN is not
        return inputs, {"error": error}
    return None, {"error": error, "refused": f"wrong: off by {error:.1g}, allowed is {allowed:.1g}"}


def _timed(
    core: RecurrentCore, inputs: Inputs | None, what: str, device: torch.device, repeats: int, graph: bool
) -> Row:
    assert inputs is not None
    try:
        function = workload(core, inputs, what)
        times = milliseconds(captured(function, device) if graph else function, device, repeats)
    except torch.OutOfMemoryError:
        return {"refused": "out of memory"}
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"ms": statistics.median(times), "ms_p10": deciles[0], "ms_p90": deciles[-1]}
