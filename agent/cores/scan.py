"""A loop over time whose gradient is taken in two parts, because that is several times cheaper.

Plain autograd through T steps forms, at every step, the gradient of every weight from a handful of rows and adds it
to a sum: T products that are limited by memory traffic, and T additions as large as the weights. Here the chain
of steps backward in time carries the gradient of the memory alone. Once it is known what arrives at each step, one
batched call over all T x B rows gives the gradients of weights and inputs. The result is the same as plain
autograd's, to rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Step = Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]
"""(memory (B, ...), inputs (B, ...)) -> (memory after the step (B, ...), outputs (B, ...)), rows independent."""


def scan(chain: Step, batched: Step, parameters: Tensors, carry: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
    """Run a step over time.

    Args:
        chain: the step as it runs through time, with the gradient of its memory.
        batched: the same function with the gradients of weights and inputs; called with T * B rows in backward, so
            it must find the same weights then (a `functional_call` around `scan` is over by that time).
        parameters: what `batched` learns.
        carry: memory before the first step, tensors (B, ...).
        inputs: tensors (T, B, ...).

    Returns:
        The memory after each step (T, B, ...) and the outputs of each step (T, B, ...).
    """
    record = torch.is_grad_enabled()
    flat = _Scan.apply(chain, batched, record, len(carry), len(inputs), *carry, *inputs, *parameters)
    return tuple(flat[: len(carry)]), tuple(flat[len(carry) :])


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chain: Step, batched: Step, record: bool, n_carry: int, n_inputs: int, *tensors: Tensor
    ) -> Tensors:
        carry = tuple(tensor.detach() for tensor in tensors[:n_carry])
        # Contiguous in time: compiled code copies an input that begins at an odd address, as flags of one step may.
        inputs = tuple(tensor.detach().contiguous() for tensor in tensors[n_carry : n_carry + n_inputs])
        ctx.batched, ctx.n_carry, ctx.n_inputs = batched, n_carry, n_inputs
        ctx.tape = []
        carries, outputs = [], []
        for now in zip(*(tensor.unbind(0) for tensor in inputs), strict=True):
            if record:
                carry = tuple(tensor.detach().requires_grad_() for tensor in carry)
            with torch.set_grad_enabled(record):
                after, output = chain(carry, now)
            if record:
                ctx.tape.append((carry, (*after, *output)))
            carry = after
            carries.append([tensor.detach() for tensor in after])
            outputs.append([tensor.detach() for tensor in output])
        passed = _stack(carries)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:n_carry], *inputs, *tensors[n_carry + n_inputs :], *passed)
        return (*passed, *_stack(outputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if not ctx.tape:
            raise RuntimeError("scan: backward called twice, or forward ran without gradients")
        n_carry, n_inputs = ctx.n_carry, ctx.n_inputs
        tensors = ctx.saved_tensors
        start, tensors, passed = tensors[:n_carry], tensors[n_carry:-n_carry], tensors[-n_carry:]
        inputs, parameters = tensors[:n_inputs], tensors[n_inputs:]
        # Once, and not at every step: a compiled backward pass copies what does not lie as it did when it was compiled.
        grads = tuple(grad if grad is None else grad.contiguous() for grad in grads)
        arriving, carry_grad = _chain_backward(ctx.tape, grads, n_carry)
        ctx.tape = []

        wanted = ctx.needs_input_grad[5 + n_carry : 5 + n_carry + n_inputs]
        before = (torch.cat([first.unsqueeze(0), after[:-1]]) for first, after in zip(start, passed, strict=True))
        with torch.enable_grad():
            rows = tuple(
                tensor.detach().flatten(0, 1).requires_grad_(want) for tensor, want in zip(inputs, wanted, strict=True)
            )
            after, output = ctx.batched(tuple(t.detach().flatten(0, 1) for t in before), rows)
        sources = [row for row in rows if row.requires_grad]
        found = iter(_grad((*after, *output), [*sources, *parameters], arriving))
        input_grads = [
            next(found).view_as(tensor) if row.requires_grad else None for tensor, row in zip(inputs, rows, strict=True)
        ]
        return (None, None, None, None, None, *carry_grad, *input_grads, *found)


def _chain_backward(
    tape: list[tuple[Tensors, Tensors]], grads: Sequence[Tensor | None], n_carry: int
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Carry the gradient of the memory from the last step to before the first.

    Returns all that arrives at each step's memory and outputs, as rows (T * B, ...), and the gradient of the memory
    before the first step (B, ...). None is a zero that nothing has to be added to.
    """
    from_outside, of_outputs = grads[:n_carry], grads[n_carry:]
    arriving: list[list[Tensor]] = []
    carry_grad = [torch.zeros_like(tensor) for tensor in tape[-1][0]]
    for t in reversed(range(len(tape))):
        carry, results = tape[t]
        now = [b if a is None else a[t] + b for a, b in zip(from_outside, carry_grad, strict=True)]
        arriving.append(now)
        carry_grad = _grad(results, carry, [*now, *(grad if grad is None else grad[t] for grad in of_outputs)])
    rows = [tensor.flatten(0, 1) for tensor in _stack(arriving[::-1])]
    return [*rows, *(grad if grad is None else grad.flatten(0, 1) for grad in of_outputs)], carry_grad


def _grad(results: Sequence[Tensor], sources: Sequence[Tensor], arriving: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of `results` at `sources`, zero where there is no path."""
    pairs = [
        (result, grad)
        for result, grad in zip(results, arriving, strict=True)
        if result.requires_grad and grad is not None
    ]
    grads = torch.autograd.grad(
        [result for result, _ in pairs], list(sources), [grad for _, grad in pairs], allow_unused=True
    )
    return [torch.zeros_like(source) if grad is None else grad for grad, source in zip(grads, sources, strict=True)]


def _stack(steps: Sequence[Sequence[Tensor]]) -> Tensors:
    """T lists of tensors (B, ...) -> tensors (T, B, ...)."""
    return tuple(torch.stack(list(column)) for column in zip(*steps, strict=True))
