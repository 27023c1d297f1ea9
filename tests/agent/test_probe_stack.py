"""Stacked seeds learn what single ones learn, under plain torch; kernels fold the axis of seeds into the batch."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from agent.cores.folding import fold
from agent.cores.memory import Memory, empty, polynomial_read_sequence
from agent.probe.config import Probe, resolve
from agent.probe.model import make_model
from agent.probe.optimizer import StackedAdamW, learning_rate
from agent.probe.training import Trainer

SMALL = {
    "mlstm": "mlstm:width=12:heads=2:head_dim=8",
    "ortho_mlstm": "ortho_mlstm:width=12:heads=2:head_dim=8",
    "mesa": "mesa:width=12:heads=2:head_dim=8:ridge_learned=true",
    "attention": "attention:width=12:heads=2:head_size=4:units=8:window=16",
    "gru": "gru:deter=16:hidden=8:blocks=4",
}
QUICK = [
    "embedding=8", "task.vocab=16", "task.noise_vocab=4", "task.length=12", "training.batch=4", "training.seeds=3",
    "training.steps=6", "training.warmup=2", "evaluation.sequences=8", "evaluation.every=3", "compute.device=cpu",
]  # fmt: skip


def probe(core: str, *settings: str) -> Probe:
    return resolve(SMALL.get(core, core), "quick", [*QUICK, *settings], {})


@pytest.fixture
def fp64() -> Iterator[None]:
    """In fp32, AdamW would blow up the rounding of gradients that are 0, as an orthogonalised read has some."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained_alone(config: Probe, seed: int, steps: int) -> nn.Module:
    """One seed by plain torch, on the data that the stack gives it."""
    data = Trainer(dataclasses.replace(config, training=dataclasses.replace(config.training, seeds=1, first_seed=seed)))
    model = make_model(config, data.task.vocab, seed)
    training = config.training
    optimizer = torch.optim.AdamW(model.parameters(), training.lr, weight_decay=training.weight_decay)
    for step in range(steps):
        batch = data._data(step)
        logits, _ = model(batch.inputs[0], torch.float64)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets[0].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(training, step)
        optimizer.step()
    return model


@pytest.mark.parametrize("core", SMALL)
@pytest.mark.parametrize("at_once", [10**6, 100])
def test_stacked_seeds_learn_as_three_single_runs(core: str, at_once: int, fp64: None) -> None:
    config = probe(core, f"compute.tokens_at_once={at_once}", "training.clip=0.5")
    trainer = Trainer(config)
    trainer.stack.dtype = torch.float64
    assert len(trainer.stack.groups(4 * 11)) == {10**6: 1, 100: 2}[at_once]
    trainer.train(4)
    for place, seed in enumerate(trainer.seeds):
        for key, value in trained_alone(config, seed, 4).named_parameters():
            torch.testing.assert_close(trainer.stack.parameters[key][place], value.detach(), rtol=1e-6, atol=1e-7)


def test_gradients_of_seeds_do_not_mix() -> None:
    trainer = Trainer(probe("mlstm"))
    batch = trainer._data(0)
    losses, gradients = trainer.stack.gradients(batch)
    changed = batch._replace(inputs=batch.inputs.clone())
    changed.inputs[1] = (changed.inputs[1] + 1) % 16
    other_losses, other = trainer.stack.gradients(changed)
    for seed, same in enumerate((True, False, True)):
        assert torch.equal(losses[seed], other_losses[seed]) == same
        assert torch.equal(gradients["head.weight"][seed], other["head.weight"][seed]) == same


def test_each_seed_is_clipped_by_its_own_norm() -> None:
    config = dataclasses.replace(
        probe("mlstm").training, clip=1.0, weight_decay=0.0, beta1=0.0, beta2=0.0, lr=1.0, warmup=0, schedule="constant"
    )
    seen = []
    parameters = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 2, 2)}
    optimizer = StackedAdamW(parameters, config)
    optimizer.optimizer.step = lambda: seen.extend(parameter.grad.clone() for parameter in optimizer.parameters)  # type: ignore[method-assign,assignment]
    small, large = 0.1 * torch.ones(7), 5.0 * torch.ones(7)
    both = torch.stack([small, large])
    optimizer.step({"a": both[:, :3].clone(), "b": both[:, 3:].reshape(2, 2, 2).clone()}, 0)
    found = torch.cat([seen[0], seen[1].flatten(1)], 1)
    torch.testing.assert_close(found[0], small)
    torch.testing.assert_close(found[1], large / large.norm(), atol=1e-5, rtol=1e-5)


def test_a_seed_that_diverges_leaves_the_others_alone() -> None:
    whole, broken = Trainer(probe("mlstm")), Trainer(probe("mlstm"))
    broken.stack.parameters["head.weight"][1] = float("nan")
    whole.train(3)
    broken.train(3)
    for key, value in whole.stack.parameters.items():
        assert torch.equal(value[[0, 2]], broken.stack.parameters[key][[0, 2]])
    assert broken.curves["accuracy"][0][1] <= 0.2


@pytest.mark.parametrize(("schedule", "expected"), [("cosine", [0.5, 1.0, 0.5]), ("constant", [0.5, 1.0, 1.0])])
def test_learning_rate_warms_up_and_falls(schedule: str, expected: list[float]) -> None:
    training = dataclasses.replace(probe("mlstm").training, lr=2.0, steps=1000, warmup=10, schedule=schedule)
    rates = [learning_rate(training, step) / 2.0 for step in (4, 9, 500)]
    assert rates == pytest.approx(expected, abs=1e-3)
    assert learning_rate(dataclasses.replace(training, warmup=0), 0) == 2.0


# ---- a core that changes with training -----------------------------------------------------------------------

RELEASE = SMALL["ortho_mlstm"] + ":alpha_schedule=release:alpha_metric=accuracy:alpha_bar=0.5:alpha_updates=4"


def test_each_seed_is_released_by_its_own_metric() -> None:
    trainer = Trainer(probe(RELEASE))
    stack = trainer.stack
    assert stack.groups(1) == [[0, 1, 2]]
    tokens = trainer.test.inputs

    def logits() -> dict[int, Tensor]:
        return {seed: out[i] for group, _, out, _ in stack.run(tokens) for i, seed in enumerate(group)}

    before = logits()
    stack.schedule(10, [{"accuracy": value} for value in (0.9, 0.2, 0.6)])
    assert stack.groups(1) == [[0, 1, 2]], "released, but alpha is still 1"
    stack.schedule(12, [{"accuracy": 0.0}] * 3)  # half way
    half = logits()
    stack.schedule(14, [{"accuracy": 0.0}] * 3)
    assert stack.groups(1) == [[1], [0, 2]], "those that read plainly take a path of their own"
    after = logits()
    for seed, model in enumerate(stack.models):
        model.load_state_dict({key: value[seed] for key, value in stack.parameters.items()}, strict=False)
        with torch.no_grad():
            alone, _ = model(tokens, torch.float32)
        torch.testing.assert_close(after[seed], alone, atol=1e-5, rtol=1e-4)
        moved = [not torch.allclose(other[seed], before[seed], atol=1e-5) for other in (half, after)]
        assert moved == ([False, False] if seed == 1 else [True, True])
    trainer.train(2)
    assert torch.stack([trainer.stack.parameters["head.weight"][i] for i in range(3)]).isfinite().all()


def test_paths_and_shares_survive_saving(tmp_path: Path) -> None:
    trainer = Trainer(probe(RELEASE))
    trainer.stack.schedule(10, [{"accuracy": value} for value in (0.9, 0.2, 0.6)])
    trainer.stack.schedule(14, [{"accuracy": 0.0}] * 3)
    trainer.save(tmp_path)
    other = Trainer(probe(RELEASE))
    other.restore(tmp_path)
    assert other.stack.groups(1) == [[1], [0, 2]]
    for (_, _, ours, _), (_, _, theirs, _) in zip(
        trainer.stack.run(trainer.test.inputs), other.stack.run(other.test.inputs), strict=True
    ):
        assert torch.equal(ours, theirs)


# ---- kernels -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    """An operator that, as a kernel does, takes tensors of fixed rank and knows nothing of vmap by itself."""

    @torch.library.custom_op("test_probe::read", mutates_args=())
    def read(
        q: Tensor, k: Tensor, v: Tensor, gate: Tensor, first: Tensor, C: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert q.dim() == 4
        memory = empty(*C.shape)._replace(C=C)
        y, after = polynomial_read_sequence(q, k, v, gate, -gate.exp(), first, memory, coefficients)
        return y, after.C

    @read.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, first: Tensor, C: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(v), torch.empty_like(C)

    torch.library.register_vmap(read, fold(read, shared=(6,)))
    return read


@pytest.mark.parametrize("own_coefficients", [False, True])
def test_a_kernel_under_vmap_is_one_call_per_model(
    kernel: Callable[..., tuple[Tensor, Tensor]], own_coefficients: bool
) -> None:
    S, B, H, T, D = 3, 2, 2, 6, 4
    q, k, v = (torch.randn(S, B, H, T, D) for _ in range(3))
    gate = torch.randn(B, S, H, T)  # the models' axis need not be the first
    first = torch.rand(B, T) < 0.2  # the same for all models
    C = torch.randn(S, B, H, D, D)
    c = torch.randn(S, 3) if own_coefficients else torch.randn(3)
    y, after = vmap(kernel, in_dims=(0, 0, 0, 1, None, 0, 0 if own_coefficients else None))(q, k, v, gate, first, C, c)
    for s in range(S):
        memory = Memory(*empty(B, H, D, D))._replace(C=C[s])
        own = c[s] if own_coefficients else c
        expected = polynomial_read_sequence(q[s], k[s], v[s], gate[:, s], -gate[:, s].exp(), first, memory, own)
        torch.testing.assert_close(y[s], expected[0])
        torch.testing.assert_close(after[s], expected[1].C)
