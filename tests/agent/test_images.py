"""Image networks against an independent computation in NumPy fp64, their size, and agents that see images."""

import functools
import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from agent import config as configuration
from agent.agent import Agent
from agent.behavior import Behavior
from agent.errors import UserError
from agent.networks import Conv, parameter_count
from agent.spaces import Image, from_gymnasium
from agent.world_model import WorldModel
from agent.world_model.images import ImageDecoder, ImageEncoder, stacked

Make = Callable[..., Any]
Array = np.ndarray


def fp64(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def shaken(module: torch.nn.Module) -> Any:
    """The module in fp64 with no parameter at a special value, as biases of 0 are."""
    module = module.double()
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return module


def convolved(x: Array, conv: Conv) -> Array:
    """(H, W, in) -> (H, W, out) by the definition: for every place the sum over the square around it."""
    weight, bias = fp64(conv.weight), fp64(conv.bias)
    (height, width, _), reach = x.shape, weight.shape[-1] // 2
    result = np.tile(bias, (height, width, 1))
    for row in range(height):
        for column in range(width):
            for down in range(-reach, reach + 1):
                for right in range(-reach, reach + 1):
                    if 0 <= row + down < height and 0 <= column + right < width:
                        tap = weight[:, :, down + reach, right + reach]
                        result[row, column] += tap @ x[row + down, column + right]
    return result


def normed(x: Array, scale: Tensor) -> Array:
    """RMSNorm over the last axis, then SiLU."""
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-4) * fp64(scale)
    return x / (1 + np.exp(-x))


def pooled(x: Array) -> Array:
    squares = [x[row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return np.max(squares, axis=0)


def repeated(x: Array) -> Array:
    return np.kron(x, np.ones((2, 2, 1)))


def test_a_convolution_is_the_sum_over_the_square_around_each_place() -> None:
    conv = shaken(Conv(3, 4, 5))
    x = torch.randn(2, 6, 7, 3, dtype=torch.float64)
    expected = np.stack([convolved(fp64(image), conv) for image in x])
    np.testing.assert_allclose(fp64(conv(x)), expected, rtol=1e-10, atol=1e-12)


def test_a_convolution_starts_with_outputs_as_large_as_its_inputs() -> None:
    weight = Conv(24, 400, 5).weight.detach()
    assert weight.std().item() == pytest.approx((25 * 24) ** -0.5, rel=0.02)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_convolution_in_bf16_is_near_the_one_in_fp32() -> None:
    conv, x = Conv(8, 8, 5), torch.randn(2, 6, 6, 8)
    conv.bias.data = torch.randn(8)
    result = conv(x.bfloat16())
    assert result.dtype == torch.bfloat16
    assert (result.float() - conv(x)).abs().max() < 0.05


def test_encoder_is_four_times_convolution_pool_norm_silu_of_all_images_stacked() -> None:
    images = {"wrist": Image(32, 16, 1), "front": Image(32, 16, 3)}
    encoder = shaken(ImageEncoder(images, depth=2))
    shown = {key: torch.randint(256, (2, 3, *image.shape), dtype=torch.uint8) for key, image in images.items()}
    tokens = encoder(shown, torch.float64)
    assert tokens.shape == (2, 3, encoder.token_size) and encoder.token_size == 2 * 1 * 8
    for b, t in [(0, 0), (1, 2)]:
        x = np.concatenate([shown["front"][b, t].numpy(), shown["wrist"][b, t].numpy()], -1) / 255 - 0.5
        for conv, norm in zip(encoder.convs, encoder.norms, strict=True):
            x = normed(pooled(convolved(x, conv)), norm.scale)
        # The picture is turned into a number between -0.5 and 0.5 in fp32, whatever follows.
        np.testing.assert_allclose(fp64(tokens[b, t]), x.reshape(-1), rtol=1e-5, atol=1e-6)


def test_decoder_lays_blocks_out_as_channels_and_doubles_the_resolution_four_times() -> None:
    images = {"wrist": Image(16, 32, 1), "front": Image(16, 32, 3)}
    decoder = shaken(ImageDecoder(images, memory_size=24, code_size=6, depth=4, units=5))
    memory, code = torch.randn(2, 24, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    decoded = decoder(memory, code)
    assert {key: value.shape for key, value in decoded.items()} == {"front": (2, 16, 32, 3), "wrist": (2, 16, 32, 1)}
    weight, bias = fp64(decoder.from_memory.weight), fp64(decoder.from_memory.bias)
    layer, linear = decoder.from_code
    for n in range(2):
        x = np.zeros((1, 2, 16))  # a sixteenth of the resolution, 4 * depth channels
        for block in range(8):
            out = fp64(memory[n])[3 * block : 3 * block + 3] @ weight[block] + bias[4 * block : 4 * block + 4]
            for column in range(2):
                for channel in range(2):
                    x[0, column, 2 * block + channel] += out[2 * column + channel]
        hidden = fp64(layer.linear.weight) @ fp64(code[n]) + fp64(layer.linear.bias)
        hidden = normed(hidden, layer.norm.scale)
        x += (fp64(linear.weight) @ hidden + fp64(linear.bias)).reshape(1, 2, 16)
        x = normed(x, decoder.norm.scale)
        for conv, norm in zip(decoder.convs, decoder.norms, strict=True):
            x = normed(convolved(repeated(x), conv), norm.scale)
        x = 1 / (1 + np.exp(-convolved(repeated(x), decoder.output)))
        np.testing.assert_allclose(fp64(decoded["front"][n]), x[..., :3], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(fp64(decoded["wrist"][n]), x[..., 3:], rtol=1e-5, atol=1e-6)


def test_channels_are_those_of_the_reference() -> None:
    images = {"image": Image(64, 64, 3)}
    encoder, decoder = ImageEncoder(images, depth=4), ImageDecoder(images, 512, 128, depth=4, units=64)
    assert [tuple(conv.weight.shape[:2]) for conv in encoder.convs] == [(8, 3), (12, 8), (16, 12), (16, 16)]
    assert [tuple(conv.weight.shape[:2]) for conv in decoder.convs] == [(16, 16), (12, 16), (8, 12)]
    assert tuple(decoder.output.weight.shape) == (3, 8, 5, 5)


def test_sizes_that_do_not_fit_say_what_to_set() -> None:
    with pytest.raises(UserError, match=r"multiple of 16 pixels.*image is 84 x 84; set env\.options\.image_size"):
        stacked({"image": Image(84, 84, 3)})
    with pytest.raises(
        UserError, match=r"be of one size, but a is 64 x 64, b is 32 x 64; set env\.options\.image_size"
    ):
        stacked({"a": Image(64, 64, 3), "b": Image(32, 64, 3)})
    with pytest.raises(UserError, match=r"width, 20, and 4 times heads\.depth, 2"):
        ImageDecoder({"image": Image(16, 16, 3)}, 20, 6, depth=2, units=4)


PICTURE = spaces.Box(0, 255, (64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("observations", "action", "expected"),
    [
        ({"image": PICTURE}, spaces.Discrete(17), 687_875),
        (
            {key: spaces.Box(-1, 1, (n,), np.float32) for key, n in [("a", 14), ("b", 1), ("c", 9)]},
            spaces.Box(-1, 1, (6,), np.float32),
            640_867,
        ),
    ],
    ids=["image", "walker proprio"],
)
def test_size_1m_has_the_published_number_of_parameters(
    observations: dict[str, gymnasium.Space[Any]], action: gymnasium.Space[Any], expected: int
) -> None:
    config = configuration.resolve(env="dmc_walker", size="1m", device="cpu")
    seen = {key: from_gymnasium(space, key) for key, space in observations.items()}
    acting: Any = from_gymnasium(action, "action")
    with torch.device("meta"):
        model = WorldModel(seen, acting, config)
        behavior = Behavior(model.rssm.feature_size, acting, config)
    assert parameter_count(model, behavior) == expected


@pytest.mark.parametrize("core", sorted(configuration.config_names("core")))
@pytest.mark.parametrize("size", configuration.config_names("size"))
def test_every_core_decodes_images_at_every_size(core: str, size: str) -> None:
    config = configuration.resolve(env="dmc_walker", core=core, size=size, device="cpu")
    with torch.device("meta"):
        model = WorldModel({"image": Image(64, 64, 3)}, from_gymnasium(spaces.Discrete(2), "action"), config)  # type: ignore[arg-type]
    assert model.decoder.images is not None


# ---- a whole agent --------------------------------------------------------------------------------------------

MIXED = {
    "front": spaces.Box(0, 255, (16, 16, 3), np.uint8),
    "place": spaces.Box(-np.inf, np.inf, (3,), np.float32),
    "wrist": spaces.Box(0, 255, (16, 16, 1), np.uint8),
}


@pytest.fixture
def make_seeing_agent(make_agent: Make) -> Callable[..., Agent]:
    """Function of settings and a core: an agent that sees two images and three reals."""
    return lambda *settings, core="gru": make_agent(spaces.Discrete(3), settings, core=core, observations=MIXED)


def observation(amount: int) -> dict[str, Tensor]:
    images = {key: torch.randint(256, (amount, *MIXED[key].shape), dtype=torch.uint8) for key in ("front", "wrist")}
    return images | {"place": torch.randn(amount, 3)}


def test_the_loss_of_an_image_is_the_squared_error_over_its_pixels(make_seeing_agent: Make) -> None:
    model = make_seeing_agent().world_model
    shown = {key: value.unflatten(0, (2, 2)) for key, value in observation(4).items()}
    feature = torch.randn(2, 2, model.rssm.feature_size)
    decoded, losses = model.decoder(feature), model.decoder.losses(feature, shown)
    assert losses.keys() == MIXED.keys()
    expected = ((fp64(decoded["front"]) - fp64(shown["front"]) / 255) ** 2).sum((-3, -2, -1))
    np.testing.assert_allclose(fp64(losses["front"]), expected, rtol=1e-5)
    memory, code = feature[..., : model.rssm.core.feature_size], feature[..., model.rssm.core.feature_size :]
    assert torch.equal(decoded["wrist"], model.decoder.images(memory, code)["wrist"])


@pytest.mark.parametrize("core", ["gru", "mlstm", "ortho_mlstm", "mesa", "attention"])
def test_every_core_acts_on_images_and_learns_from_them(make_seeing_agent: Make, make_replay: Make, core: str) -> None:
    agent = make_seeing_agent(core=core)
    replay = make_replay(agent)
    agent.attach(replay)
    before = [parameter.detach().clone() for parameter in agent.learner.parameters]
    for _ in range(3):  # the warm-up begins at a learning rate of 0
        agent.update(replay.sample(agent.config.train.batch_size))
    metrics = agent.take_metrics()
    assert metrics["skipped_updates"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    moved = {
        name
        for (name, parameter), old in zip(agent.world_model.named_parameters(), before, strict=False)
        if not torch.equal(parameter, old)
    }
    named = dict(agent.world_model.named_parameters())
    # After three updates, few of those that the output's small gradient reaches last may still stand where they stood.
    assert {name for name in named if "images" in name and "norms" not in name} <= moved
    carry = agent.initial(2)
    for first in (True, False):
        action, carry = agent.act(observation(2), torch.full((2,), first), carry)
    assert action.shape == (2,)


def test_replay_keeps_bytes_of_what_encoder_or_decoder_take(make_seeing_agent: Make) -> None:
    agent = make_seeing_agent("observation.encode=front", "observation.decode=front|place")
    rows, _ = agent.row_specs()
    assert rows["front"] == ((16, 16, 3), torch.uint8)
    assert "place" in rows and "wrist" not in rows
    encoder, decoder = agent.world_model.encoder, agent.world_model.decoder
    assert encoder.mlp is None and encoder.images.keys == ["front"]
    assert list(decoder.outputs) == ["place"] and list(decoder.images.channels) == ["front"]
    values = observation(2) | {key: torch.zeros(2) for key in ("reward", "is_first", "is_last", "is_terminal")}
    row = agent.row(values, torch.zeros(2), agent.initial(2))
    assert set(row) == set(rows) | {key for key in row if key.startswith("state/")} | {"z"}


@pytest.mark.parametrize("key", ["observation.encode", "observation.decode"])
def test_patterns_that_match_nothing_name_what_there_is(make_seeing_agent: Make, key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: 'imag' matches no entry.* front, place, wrist"):
        make_seeing_agent(f"{key}=imag")
    with pytest.raises(UserError, match=rf"{key}: .*regular expression"):
        make_seeing_agent(f"{key}='['")


def test_imagination_costs_and_yields_what_it_does_without_images(make_seeing_agent: Make) -> None:
    """The frozen model's encoder and decoder are not called in it."""
    agent = make_seeing_agent()
    state, z = agent.world_model.rssm.initial(4)
    h = torch.zeros(4, agent.world_model.rssm.core.feature_size)
    frozen = agent.learner.frozen_world_model.module
    frozen.encoder.forward = frozen.decoder.forward = functools.partial(pytest.fail, "imagination looked at images")
    from agent.world_model.rssm import Latent

    start = Latent({key: value.unsqueeze(0) for key, value in state.items()}, h.unsqueeze(0), z.unsqueeze(0))
    features, actions = agent.learner._imagine(start)
    assert features.shape == (6, 4, agent.world_model.rssm.feature_size) and actions.shape == (5, 4, 3)
