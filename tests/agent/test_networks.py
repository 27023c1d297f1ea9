"""Layers against NumPy fp64, their initialisation against the rule, and frozen twins."""

import numpy as np
import pytest
import torch
from torch import nn

from agent.networks import MLP, BlockLinear, Frozen, Layer, Linear, RMSNorm, parameter_count


def test_rms_norm() -> None:
    norm = RMSNorm(6)
    norm.scale.data = torch.randn(6)
    x = torch.randn(3, 4, 6) * torch.tensor([1e-3, 1.0, 100.0]).view(3, 1, 1)
    wide = x.double().numpy()
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-4) * norm.scale.detach().double().numpy()
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-5, atol=1e-7)


def test_rms_norm_of_bf16_is_computed_in_fp32() -> None:
    norm = RMSNorm(256)
    x = torch.randn(8, 256).bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


def test_block_linear_is_a_block_diagonal_matrix() -> None:
    layer = BlockLinear(12, 20, 4).double()
    layer.bias.data = torch.randn(20, dtype=torch.float64)
    dense = np.zeros((20, 12))
    for block in range(4):
        rows, columns = slice(5 * block, 5 * block + 5), slice(3 * block, 3 * block + 3)
        dense[rows, columns] = layer.weight[block].detach().numpy().T
    x = torch.randn(7, 12, dtype=torch.float64)
    expected = x.numpy() @ dense.T + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 3])
def test_mlp_is_linear_norm_silu_again_and_again(layers: int) -> None:
    mlp = MLP(5, 8, layers).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    hidden = x.numpy()
    for layer in mlp:
        assert isinstance(layer, Layer)
        hidden = hidden @ layer.linear.weight.detach().numpy().T + layer.linear.bias.detach().numpy()
        hidden = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-4)
        hidden = hidden / (1 + np.exp(-hidden))
    np.testing.assert_allclose(mlp(x).detach().numpy(), hidden, rtol=1e-10)
    assert parameter_count(mlp) == 5 * 8 + 2 * 8 + (layers - 1) * (8 * 8 + 2 * 8)


@pytest.mark.parametrize(
    ("layer", "std"),
    [
        (Linear(400, 300), 400**-0.5),
        (Linear(400, 300, scale=0.01), 0.01 * 400**-0.5),
        (Linear(400, 300, fan_in=1600), 1600**-0.5),
        (BlockLinear(512, 1024, 8), 512**-0.5),  # of the full input, not of a block's 64
        (BlockLinear(512, 1024, 8, fan_in=2048), 2048**-0.5),
    ],
)
def test_initial_weights_are_a_truncated_normal_of_variance_one_over_fan_in(layer: nn.Module, std: float) -> None:
    weight = layer.weight.detach()
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert abs(weight.mean().item()) < 0.02 * std
    cut = 2 * 1.1368 * std
    assert 0.95 * cut < weight.abs().max().item() <= 1.0001 * cut
    assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


def test_scale_zero_gives_zero() -> None:
    assert torch.equal(Linear(7, 5, scale=0.0)(torch.randn(3, 7)), torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [Linear(8, 8), BlockLinear(8, 8, 2), RMSNorm(8), Layer(8, 8), MLP(8, 8, 2)])
def test_dtype_follows_the_input_and_weights_stay_fp32(layer: nn.Module, dtype: torch.dtype) -> None:
    out = layer(torch.randn(3, 8, dtype=dtype))
    assert out.dtype == dtype
    out.sum().backward()
    for parameter in layer.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    layer.zero_grad()


def test_frozen_in_fp32_shares_storage_and_learns_nothing() -> None:
    mlp = MLP(4, 6, 2)
    frozen = Frozen(mlp, torch.float32)
    for twin, original in zip(frozen.module.parameters(), mlp.parameters(), strict=True):
        assert twin.data_ptr() == original.data_ptr()
        assert not twin.requires_grad
        assert original.requires_grad
    x = torch.randn(3, 4)
    before = frozen.module(x)
    with torch.no_grad():
        for original in mlp.parameters():
            original.add_(0.5)
    assert not torch.equal(frozen.module(x), before)
    assert torch.equal(frozen.module(x), mlp(x).detach())


def test_frozen_shares_buffers() -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    frozen = Frozen(module, torch.bfloat16)
    module[0].running_mean.fill_(5)
    module.load_state_dict(module.state_dict() | {"0.num_batches_tracked": torch.tensor(7)})
    assert torch.equal(frozen.module[0].running_mean, torch.full((3,), 5.0))
    assert frozen.module[0].num_batches_tracked == 7


def test_frozen_in_bf16_copies_matrices_when_refreshed_and_shares_vectors() -> None:
    mlp = MLP(4, 6, 2)
    frozen = Frozen(mlp, torch.bfloat16)
    twins = list(frozen.module.parameters())
    places = [twin.data_ptr() for twin in twins]
    old = [original.detach().clone() for original in mlp.parameters()]
    with torch.no_grad():
        for original in mlp.parameters():
            original.add_(0.5)
    for twin, original, before in zip(twins, mlp.parameters(), old, strict=True):
        if original.dim() > 1:
            assert torch.equal(twin, before.bfloat16())
        else:
            assert twin.data_ptr() == original.data_ptr()
    frozen.refresh()
    for twin, original in zip(twins, mlp.parameters(), strict=True):
        assert torch.equal(twin, original.detach().bfloat16() if original.dim() > 1 else original.detach())
    assert [twin.data_ptr() for twin in twins] == places  # a captured graph holds on to them
    x = torch.randn(3, 4).bfloat16()
    assert torch.equal(frozen.module(x), mlp(x).detach())
