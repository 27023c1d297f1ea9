"""The two-part gradient of `scan` against plain autograd through a Python loop, in fp64."""

import pytest
import torch
from finite_differences import check_gradients
from torch import Tensor, nn

from agent.cores.scan import scan
from agent.networks import Frozen

B, T = 3, 5


class Step(nn.Module):
    """Two memories that feed each other, a flag that empties one, and four outputs, one of them constant."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4 + 2 + 3, 4)
        self.gate = nn.Linear(4, 2, bias=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.double()

    def forward(
        self, carry: tuple[Tensor, ...], inputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        slow, fast = carry
        x, first = inputs
        slow = torch.where(first.unsqueeze(-1), torch.zeros_like(slow), slow)
        slow = torch.tanh(self.mix(torch.cat([slow, fast, x], -1))) + 0.5 * slow
        fast = torch.sigmoid(self.gate(slow)) * fast
        return (slow, fast), (slow * x.sum(-1, keepdim=True), fast.sin(), x.square(), torch.ones_like(fast))


def loop(step: Step, carry: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    columns: list[list[Tensor]] = []
    for t in range(inputs[0].shape[0]):
        carry, outputs = step(carry, tuple(tensor[t] for tensor in inputs))
        columns.append([*carry, *outputs])
    return [torch.stack(column) for column in zip(*columns, strict=True)]


def problem() -> tuple[Step, tuple[Tensor, ...], tuple[Tensor, ...]]:
    step = Step()
    carry = (
        torch.randn(B, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(B, 2, dtype=torch.float64, requires_grad=True),
    )
    x = torch.randn(T, B, 3, dtype=torch.float64, requires_grad=True)
    first = torch.zeros(T, B, dtype=torch.bool)
    first[2, 1] = first[0, 2] = True
    return step, carry, (x, first)


def run(step: Step, carry: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    carries, outputs = scan(step, step, tuple(step.parameters()), carry, inputs)
    return [*carries, *outputs]


@pytest.mark.parametrize("read", [range(6), [0], [1], [2], [3], [4], [0, 3], [1, 2]], ids=lambda read: str(list(read)))
def test_values_and_all_gradients_equal_a_plain_loop(read: list[int]) -> None:
    step, carry, inputs = problem()
    results, expected = run(step, carry, inputs), loop(step, carry, inputs)
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = [torch.randn_like(result) for result in results]
    sources = [*carry, inputs[0], *step.parameters()]
    ours, theirs = (
        torch.autograd.grad(
            sum((found[i] * weights[i]).sum() for i in read if found[i].requires_grad),
            sources,
            allow_unused=True,
            materialize_grads=True,
        )
        for found in (results, expected)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert any(gradient.abs().max() > 0 for gradient in ours)


def test_gradients_equal_finite_differences() -> None:
    step, carry, inputs = problem()
    check_gradients(lambda: run(step, carry, inputs), [*carry, inputs[0], *step.parameters()])


def test_a_frozen_chain_gives_the_same_gradients() -> None:
    step, carry, inputs = problem()
    twin = Frozen(step, torch.float64).module
    gradients = []
    for chain in (step, twin):
        carries, outputs = scan(chain, step, tuple(step.parameters()), carry, inputs)
        loss = sum(tensor.square().sum() for tensor in (*carries, *outputs))
        gradients.append(torch.autograd.grad(loss, [*carry, inputs[0], *step.parameters()]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert all(parameter.grad is None for parameter in twin.parameters())


def test_without_gradients_nothing_is_recorded() -> None:
    step, carry, inputs = problem()
    with torch.no_grad():
        results = run(step, carry, inputs)
        expected = loop(step, carry, inputs)
    for ours, theirs in zip(results, expected, strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_second_backward_is_refused() -> None:
    step, carry, inputs = problem()
    loss = run(step, carry, inputs)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward called twice"):
        loss.backward()
