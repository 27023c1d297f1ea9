"""The attention window against a computation in NumPy that knows no batches, buffers or masks."""

from collections.abc import Callable

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from agent import config as configuration
from agent.agent import Agent
from agent.cores import make_core
from agent.cores.attention import AttentionConfig, AttentionWindow
from agent.networks import Frozen

INPUT, B, T, PAST = 5, 3, 12, 9
WIDTH, BLOCKS, HEADS, HEAD_SIZE, UNITS = 10, 2, 3, 4, 7
SIZE = HEADS * HEAD_SIZE

Memory = list[tuple[np.ndarray, np.ndarray]]
"""For each step of the episode so far its keys and its values, both (BLOCKS, SIZE)."""


def small_core(window: int, blocks: int = BLOCKS) -> AttentionWindow:
    config = AttentionConfig(window=window, width=WIDTH, blocks=blocks, heads=HEADS, head_size=HEAD_SIZE, units=UNITS)
    core = AttentionWindow(INPUT, config).double()
    for parameter in core.parameters():  # so that no scale is 1, no bias 0, and attention is far from even
        parameter.data += 0.3 * torch.randn_like(parameter)
    return core


def numbers(core: AttentionWindow) -> Callable[[str], np.ndarray]:
    parameters = {key: value.numpy() for key, value in core.state_dict().items()}
    return parameters.__getitem__


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2) + 1e-4) * scale


def naive_step(core: AttentionWindow, x: np.ndarray, memory: Memory) -> np.ndarray:
    """One step x (X,) of one stream -> h (F,); the memory, which is the whole episode, grows by this step."""
    p = numbers(core)
    stream = p("input.weight") @ x + p("input.bias")
    memory.append((np.zeros((BLOCKS, SIZE)), np.zeros((BLOCKS, SIZE))))
    seen = list(enumerate(reversed(memory)))[: core.window]  # distance and step, this one first
    for b in range(BLOCKS):
        block = f"blocks.{b}."
        mixed = p(block + "queries_keys_values.weight") @ rms(stream, p(block + "attention_norm.scale"))
        query, memory[-1][0][b], memory[-1][1][b] = mixed[:SIZE], mixed[SIZE : 2 * SIZE], mixed[2 * SIZE :]
        read = []
        for head in range(HEADS):
            own = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
            scores = [score(query[own], keys[b, own], distance) for distance, (keys, _) in seen]
            weights = np.exp(scores) / np.sum(np.exp(scores))
            read.append(sum(w * values[b, own] for w, (_, (_, values)) in zip(weights, seen, strict=True)))
        stream = stream + p(block + "attention_out.weight") @ np.concatenate(read)
        hidden = p(block + "gate_up.weight") @ rms(stream, p(block + "feed_forward_norm.scale"))
        gate, up = hidden[:UNITS], hidden[UNITS:]
        stream = stream + p(block + "down.weight") @ (gate / (1 + np.exp(-gate)) * up)
    return rms(stream, p("norm.scale"))


def score(query: np.ndarray, key: np.ndarray, distance: int) -> float:
    """A rotary score from the distance alone: pairs as complex numbers, turned against each other by it."""
    half = HEAD_SIZE // 2
    turn = np.exp(1j * distance * 10_000.0 ** (-2 * np.arange(half) / HEAD_SIZE))
    q, k = query[:half] + 1j * query[half:], key[:half] + 1j * key[half:]
    return float((q * k.conj() * turn).sum().real) / np.sqrt(HEAD_SIZE)


def as_state(core: AttentionWindow, memory: Memory) -> dict[str, np.ndarray]:
    """What the core should keep of an episode: the last steps, the newest last, zeros where there are none yet."""
    state = {
        "keys": np.zeros((core.window, BLOCKS, SIZE)),
        "values": np.zeros((core.window, BLOCKS, SIZE)),
        "taken": np.zeros(core.window),
    }
    for place, (keys, values) in enumerate(reversed(memory[-core.window :]), 1):
        state["keys"][-place], state["values"][-place], state["taken"][-place] = keys, values, 1
    return state


def run_naively(
    core: AttentionWindow, x: Tensor, first: Tensor, memories: list[Memory]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Streams x (B, T, X), first (B, T) -> h (B, T, F) and the state after every step (B, T, ...)."""
    outputs, states = [], []
    for stream in range(len(memories)):
        for t in range(x.shape[1]):
            if first[stream, t]:
                memories[stream] = []
            outputs.append(naive_step(core, x[stream, t].numpy(), memories[stream]))
            states.append(as_state(core, memories[stream]))
    shape = x.shape[:2]
    return np.stack(outputs).reshape(*shape, -1), {
        key: np.stack([state[key] for state in states]).reshape(*shape, *states[0][key].shape) for key in states[0]
    }


@pytest.mark.parametrize("window", [1, 2, 4, 50])
def test_outputs_and_memories_are_those_of_the_naive_computation(window: int) -> None:
    core = small_core(window)
    past, x = torch.randn(B, PAST, INPUT).double(), torch.randn(B, T, INPUT).double()
    past_first, first = torch.zeros(B, PAST, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    past_first[0, 0] = past_first[1, 7] = True  # stream 1 has only two steps to carry in
    first[0, 5] = first[0, 7] = first[2, 0] = True
    memories: list[Memory] = [[] for _ in range(B)]
    _, before = run_naively(core, past, past_first, memories)
    expected, states = run_naively(core, x, first, memories)

    carried = {key: torch.from_numpy(value[:, -1]) for key, value in before.items()}
    for keep in (range(T), [0, 4, 5, 11]):
        h, kept = core.sequence(x, carried, first, keep=keep)
        np.testing.assert_allclose(h.detach(), expected, rtol=1e-9, atol=1e-11)
        assert set(kept) == set(states)
        for key, value in kept.items():
            np.testing.assert_allclose(value.detach(), states[key][:, list(keep)], rtol=1e-9, atol=1e-11)
    state = carried
    for t in range(T):
        h, state = core.step(x[:, t], state, first[:, t])
        np.testing.assert_allclose(h.detach(), expected[:, t], rtol=1e-9, atol=1e-11)
        for key, value in state.items():
            np.testing.assert_allclose(value.detach(), states[key][:, t], rtol=1e-9, atol=1e-11)


def test_a_step_sees_exactly_its_window() -> None:
    core = small_core(window=4, blocks=1)
    x = torch.randn(1, T, INPUT).double().requires_grad_()
    empty = {key: value.double() for key, value in core.initial(1).items()}
    h, _ = core.sequence(x, empty, torch.zeros(1, T, dtype=torch.bool))
    for t in range(T):
        (gradient,) = torch.autograd.grad(h[0, t].square().sum(), x, retain_graph=True)
        reached = gradient[0].abs().amax(-1)
        assert torch.equal(reached > 0, torch.tensor([t - 4 < s <= t for s in range(T)]))


def test_no_clock_runs_in_the_memory() -> None:
    core = small_core(window=4)
    x = torch.randn(1, 8, INPUT).double().repeat(1, 40, 1)
    empty = {key: value.double() for key, value in core.initial(1).items()}
    h, state = core.sequence(x, empty, torch.zeros(1, 320, dtype=torch.bool))
    torch.testing.assert_close(h[:, 8:16], h[:, -8:], rtol=1e-10, atol=1e-12)
    _, early = core.sequence(x[:, :16], empty, torch.zeros(1, 16, dtype=torch.bool))
    torch.testing.assert_close(state, early, rtol=1e-10, atol=1e-12)


def test_imagination_in_bf16_changes_no_number() -> None:
    core = small_core(window=4).float()
    frozen = Frozen(core, torch.bfloat16).module
    first = torch.zeros(3, dtype=torch.bool)
    with torch.no_grad():
        state = frozen.sequence(torch.randn(3, 6, INPUT).bfloat16(), core.initial(3), first[:, None].expand(3, 6))[1]
        light = core.for_imagination(state, torch.bfloat16)
        assert {key: value.dtype for key, value in light.items() if key != "taken"} == {
            "keys": torch.bfloat16, "values": torch.bfloat16,
        }  # fmt: skip
        for _ in range(6):
            x = torch.randn(3, INPUT).bfloat16()
            (h, state), (light_h, light) = frozen.step(x, state, first), frozen.step(x, light, first)
            assert torch.equal(h, light_h)
            assert all(torch.equal(value, light[key].float()) for key, value in state.items())


def test_an_empty_first_step_does_not_drown_the_others() -> None:
    core = make_core("attention", INPUT, configuration.resolve("dmc_walker", core="attention", size="1m").core)
    largest = []
    for x in (torch.zeros(B, 1, INPUT), torch.randn(B, 1, INPUT)):
        h, _ = core.step(x[:, 0], core.initial(B), torch.ones(B, dtype=torch.bool))
        gradients = torch.autograd.grad((h * torch.randn_like(h)).sum(), list(core.parameters()))
        largest.append(max(gradient.norm().item() for gradient in gradients))
    assert largest[0] < 5 * largest[1]


def test_heads_are_even() -> None:
    with pytest.raises(ValueError, match="head_size"):
        AttentionConfig(window=4, width=8, blocks=1, heads=2, head_size=3, units=8)


@pytest.mark.parametrize("size", ["debug", "1m", "12m", "25m", "50m", "100m", "200m", "400m"])
def test_an_agent_has_as_many_parameters_as_with_the_gru(size: str) -> None:
    widths = {"orientations": 14, "height": 1, "velocity": 9}
    observations = gymnasium.spaces.Dict(
        {key: gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32) for key, width in widths.items()}
    )
    action = gymnasium.spaces.Box(-1, 1, (6,), np.float32)
    count = {}
    for core in ("gru", "attention"):
        config = configuration.resolve("dmc_walker", core=core, size=size, device="cpu", settings=["compile=eager"])
        with torch.device("meta"):
            agent = Agent(observations, action, config, torch.device("meta"))
        count[core] = sum(agent.learner.parameter_counts().values())
    assert count["attention"] == pytest.approx(count["gru"], rel=0.1)


def test_a_memory_of_size_12m_stays_small() -> None:
    config = configuration.resolve("dmc_walker", core="attention", size="12m", device="cpu")
    state = make_core("attention", 8, config.core).initial(1)
    assert sum(value.numel() * value.element_size() for value in state.values()) < 132_000
