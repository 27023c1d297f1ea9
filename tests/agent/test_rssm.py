"""The RSSM against a plain loop, and what may and may not reach what."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from agent.cores import State, make_core
from agent.networks import Frozen
from agent.schema import Config
from agent.world_model.rssm import RSSM

B, T, ACTION, TOKEN = 3, 6, 2, 5

MakeRSSM = Callable[[str], RSSM]


@pytest.fixture
def make_rssm(debug_config: Callable[..., Config]) -> MakeRSSM:
    def make(posterior: str) -> RSSM:
        config = debug_config(f"rssm.posterior={posterior}")
        return RSSM(lambda size: make_core("gru", size, config.core), ACTION, TOKEN, config.rssm).double()

    return make


@pytest.fixture(params=["recurrent", "observation"])
def rssm(request: pytest.FixtureRequest, make_rssm: MakeRSSM) -> RSSM:
    return make_rssm(request.param)


class Experience:
    """A random start and a random sequence, in fp64 and with gradients."""

    def __init__(self, rssm: RSSM):
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64).requires_grad_()

        self.state: State = {key: random(*value.shape) for key, value in rssm.core.initial(B).items()}
        choice = torch.randint(rssm.classes, (B, rssm.groups))
        self.z = torch.nn.functional.one_hot(choice, rssm.classes).double().requires_grad_()
        self.action, self.token = random(B, T, ACTION), random(B, T, TOKEN)
        self.first = torch.zeros(B, T, dtype=torch.bool)
        self.first[0, 2] = self.first[1, 0] = True
        self.uniform = torch.rand(B, T, rssm.groups, dtype=torch.float64)

    def sources(self) -> list[Tensor]:
        return [*self.state.values(), self.z, self.action, self.token]

    def observe(self, rssm: RSSM, **twins: Callable) -> list[Tensor]:
        found = rssm.run(
            self.state, self.z, rssm.know(self.z, self.action, self.first, self.token, self.uniform), **twins
        )
        latent = found.latent
        return [latent.h, latent.z, found.log_probs, *(latent.state[key] for key in sorted(latent.state))]

    def loop(self, rssm: RSSM) -> list[Tensor]:
        state, z = self.state, self.z
        columns = []
        for t in range(T):
            latent, log_probs = rssm.observe_step(
                state, z, self.action[:, t], self.first[:, t], self.token[:, t], self.uniform[:, t]
            )
            state, z = latent.state, latent.z
            columns.append([latent.h, z, log_probs, *(state[key] for key in sorted(state))])
        return [torch.stack(column, 1) for column in zip(*columns, strict=True)]


def gradients(results: list[Tensor], sources: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a weighting of all results that is the same at every call."""
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(result.shape, generator=random, dtype=torch.float64) for result in results]
    loss = torch.stack([(w * r).sum() for w, r in zip(weights, results, strict=True)]).sum()
    return torch.autograd.grad(loss, sources, allow_unused=True, materialize_grads=True)


def test_observe_equals_a_plain_loop_with_values_and_all_gradients(rssm: RSSM) -> None:
    experience = Experience(rssm)
    ours, theirs = experience.observe(rssm), experience.loop(rssm)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    sources = [*experience.sources(), *rssm.parameters()]
    expected = gradients(theirs, sources)
    for a, b in zip(gradients(ours, sources), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    still = {id(parameter) for parameter in rssm.prior.parameters()}
    for source, gradient in zip(sources, expected, strict=True):
        assert (gradient.abs().max() > 0) != (id(source) in still)


def test_observe_with_a_frozen_chain_gives_the_same(rssm: RSSM) -> None:
    experience = Experience(rssm)
    twin = Frozen(rssm, torch.float64).module
    sources = [*experience.sources(), *rssm.parameters()]
    plain = gradients(experience.observe(rssm), sources)
    split = gradients(experience.observe(rssm, chain=twin.scan_step, batched=rssm.scan_step), sources)
    for a, b in zip(split, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_first_forgets_memory_code_and_action(rssm: RSSM) -> None:
    one, other = Experience(rssm), Experience(rssm)
    empty, zero = rssm.initial(B)
    first = torch.ones(B, dtype=torch.bool)
    token, uniform = one.token[:, 0], one.uniform[:, 0]
    a, _ = rssm.observe_step(one.state, one.z, one.action[:, 0], first, token, uniform)
    b, _ = rssm.observe_step(other.state, other.z, other.action[:, 0], first, token, uniform)
    c, _ = rssm.observe_step(
        {key: value.double() for key, value in empty.items()}, zero.double(),
        torch.zeros(B, ACTION, dtype=torch.float64), ~first, token, uniform,
    )  # fmt: skip
    for latent in (b, c):
        assert torch.equal(a.h, latent.h)
        assert torch.equal(a.z, latent.z)


@pytest.mark.parametrize("changed", ["state", "z", "action"])
def test_without_first_memory_code_and_action_all_matter(rssm: RSSM, changed: str) -> None:
    one, other = Experience(rssm), Experience(rssm)
    parts = {"state": one.state, "z": one.z, "action": one.action[:, 0]}
    others = {"state": other.state, "z": other.z, "action": other.action[:, 0]}
    go_on = torch.zeros(B, dtype=torch.bool)
    a, _ = rssm.observe_step(**parts, first=go_on, token=one.token[:, 0], uniform=one.uniform[:, 0])
    parts[changed] = others[changed]
    b, _ = rssm.observe_step(**parts, first=go_on, token=one.token[:, 0], uniform=one.uniform[:, 0])
    assert (a.h - b.h).abs().max() > 1e-6


def test_actions_beyond_one_are_scaled_back(rssm: RSSM) -> None:
    z = Experience(rssm).z
    action = torch.tensor([[3.0, 0.5], [-0.25, -7.0], [1.0, 0.0]], dtype=torch.float64)
    within = torch.tensor([[1.0, 0.5], [-0.25, -1.0], [1.0, 0.0]], dtype=torch.float64)
    first = torch.zeros(B, dtype=torch.bool)
    x = rssm.core_input(z, action, first, torch.float64)
    expected = torch.cat([rssm.z_input(z.flatten(1)), rssm.action_input(within)], -1)
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


def test_observation_posterior_ignores_memory_and_recurrent_does_not(make_rssm: MakeRSSM) -> None:
    for posterior, depends in (("observation", False), ("recurrent", True)):
        rssm = make_rssm(posterior)
        one, other = Experience(rssm), Experience(rssm)
        found = [rssm.observe(e.state, e.z, e.action, one.first, one.token, one.uniform) for e in (one, other)]
        differs = not torch.equal(found[0].log_probs, found[1].log_probs)
        assert differs == depends
        assert not torch.equal(found[0].latent.h, found[1].latent.h)


def test_codes_are_one_hot_and_probabilities_are_mixed_with_the_uniform(rssm: RSSM) -> None:
    with torch.no_grad():
        rssm.posterior[-1].weight.mul_(1000)
        _, z, log_probs, *_ = Experience(rssm).observe(rssm)
    torch.testing.assert_close(z.sum(-1), torch.ones(B, T, rssm.groups, dtype=torch.float64))
    assert ((z == 0) | (z == 1)).all()
    probs = log_probs.exp()
    torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))
    torch.testing.assert_close(probs.min().item(), 0.01 / rssm.classes)


def test_imagine_step_samples_the_prior_of_the_next_memory(rssm: RSSM) -> None:
    e = Experience(rssm)
    action, uniform = e.action[:, 0], e.uniform[:, 0]
    latent = rssm.imagine_step(e.state, e.z, action, uniform, torch.float64)
    first = torch.zeros(B, dtype=torch.bool)
    observed, _ = rssm.observe_step(e.state, e.z, action, first, e.token[:, 0], uniform)
    torch.testing.assert_close(latent.h, observed.h, rtol=1e-12, atol=1e-12)
    logits = rssm.prior(latent.h).unflatten(-1, (rssm.groups, rssm.classes))
    probs = 0.99 * logits.softmax(-1) + 0.01 / rssm.classes
    chosen = (probs.cumsum(-1) <= uniform.unsqueeze(-1)).sum(-1)
    assert torch.equal(latent.z.argmax(-1), chosen)


@pytest.mark.parametrize("core", ["mlstm", "ortho_mlstm", "mesa", "attention"])
def test_memory_and_code_begin_equally_long(core: str, debug_config: Callable[..., Config]) -> None:
    """Of a core that ends in a norm; heads and actor would hardly see z beside an h of the length of sqrt(F)."""
    config = debug_config(core=core)
    rssm = RSSM(lambda size: make_core(core, size, config.core), ACTION, TOKEN, config.rssm)
    state, z = rssm.initial(B)
    for _ in range(3):
        latent = rssm.imagine_step(state, z, torch.randn(B, ACTION), torch.rand(B, rssm.groups), torch.float32)
        state, z = latent.state, latent.z
    torch.testing.assert_close(latent.h.norm(dim=-1), z.flatten(1).norm(dim=-1), rtol=0.05, atol=0.0)
