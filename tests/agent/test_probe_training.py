"""Evaluation against naive counting, and training that goes on as if it had never stopped."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_probe_stack import SMALL, probe

from agent.probe.config import core_for_swap
from agent.probe.model import make_model
from agent.probe.scoring import macro_accuracy, read_with, score
from agent.probe.training import BLOCK, Trainer, run

# ---- scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [10**6, 40])
def test_scores_are_what_is_counted_by_hand(at_once: int) -> None:
    config = probe("mlstm", f"compute.tokens_at_once={at_once}")
    trainer = Trainer(config)
    scores = score(trainer.stack, trainer.test, trainer.task.vocab)
    for seed in range(3):
        with torch.no_grad():
            logits, state = make_model(config, trainer.task.vocab, seed)(trainer.test.inputs, torch.float32)
        guesses, right, by_class = logits.argmax(-1), [], {value: [] for value in range(16)}
        for row, place in trainer.test.scored.nonzero().tolist():
            answer, guess = trainer.test.targets[row, place].item(), guesses[row, place].item()
            right.append(guess == answer)
            by_class[answer].append(guess == answer)
            by_class.setdefault(guess, [])
        assert scores.accuracy[seed] == pytest.approx(np.mean(right))
        guessed = {guesses[row, place].item() for row, place in trainer.test.scored.nonzero().tolist()}
        shares = [np.mean(by_class[c]) if by_class[c] else 0.0 for c in by_class if by_class[c] or c in guessed]
        assert scores.macro[seed] == pytest.approx(np.mean(shares))
        if at_once == 10**6:
            C = state["memory_0"].double()
            square = torch.linalg.svdvals(C) ** 2
            rank = (square.sum(-1) ** 2 / (square**2).sum(-1)).mean().item()
            assert scores.diagnostics["effective_rank_0"][seed] == pytest.approx(rank, rel=1e-4)


def test_macro_accuracy_leaves_out_classes_that_nobody_names() -> None:
    shown, guessed, right = (
        torch.tensor([row]) for row in ([4.0, 2.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0], [3.0, 1.0, 0.0, 0.0])
    )
    assert macro_accuracy(shown, guessed, right).item() == pytest.approx((0.75 + 0.5 + 0.0) / 3)


def test_weights_read_with_the_same_core_score_the_same_and_with_another_do_not() -> None:
    trainer = Trainer(probe("ortho_mlstm", "evaluation.swap=[mlstm, ortho_mlstm, gru]"))
    trainer.train(3)
    own = score(trainer.stack, trainer.test, 16)
    same = read_with(trainer.stack, trainer._stack(("ortho_mlstm", trainer.probe.core)).models)
    assert same is not None and score(same, trainer.test, 16).accuracy == own.accuracy
    swapped = trainer.swapped()
    assert set(swapped) == {"mlstm"}, "its own read and what does not fit are left out"
    plain = trainer._stack(("mlstm", core_for_swap(trainer.probe, "mlstm"))).models
    for seed, model in enumerate(plain):
        model.load_state_dict({key: value[seed] for key, value in trainer.stack.parameters.items()}, strict=False)
        with torch.no_grad():
            guesses = model(trainer.test.inputs, torch.float32)[0].argmax(-1)
        right = (guesses == trainer.test.targets)[trainer.test.scored].float().mean().item()
        assert swapped["mlstm"][seed] == pytest.approx(right)


def test_a_swapped_core_keeps_the_keys_that_both_have() -> None:
    config = core_for_swap(probe("mlstm:head_dim=24:unit_norm=true"), "ortho_mlstm")
    assert (config.head_dim, config.unit_norm, config.map) == (24, True, "cubic")
    assert core_for_swap(probe("mlstm"), "nothing") is None


# ---- training ------------------------------------------------------------------------------------------------


def stopping(step: int) -> Callable[[Trainer], bool]:
    return lambda trainer: trainer.step == step


@pytest.mark.parametrize(
    "core", ["mlstm", "ortho_mlstm:width=12:heads=2:head_dim=8:alpha_schedule=linear:alpha_updates=9"]
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(core: str, tmp_path: Path) -> None:
    config = probe(core, f"training.steps={BLOCK + 5}", "evaluation.every=7")
    whole = run(config, tmp_path / "whole", stopping(-1))
    for step in (3, BLOCK + 1):
        assert run(config, tmp_path / "parts", stopping(step)) is None
    parts = run(config, tmp_path / "parts", stopping(-1))
    assert whole is not None and parts is not None
    assert whole["steps"] == parts["steps"] == [7, 14, 21]
    for key in whole["curves"]:
        assert whole["curves"][key] == parts["curves"][key]
    assert whole["swap"] == parts["swap"]


def test_seeds_have_data_of_their_own_which_no_other_setting_changes() -> None:
    trainer, fewer = Trainer(probe("mlstm")), Trainer(probe("mlstm", "training.seeds=1", "training.first_seed=2"))
    batch = trainer._data(BLOCK + 3)
    assert batch.inputs.shape == (3, 4, 11)
    assert torch.equal(batch.inputs[2], fewer._data(BLOCK + 3).inputs[0])
    streams = [batch.inputs[0], batch.inputs[1], trainer._data(BLOCK + 4).inputs[0], trainer._data(3).inputs[0]]
    assert not any(torch.equal(a, b) for i, a in enumerate(streams) for b in streams[:i])
    assert not any(torch.equal(row, other) for row in batch.inputs[0] for other in trainer.test.inputs)


def test_the_result_says_when_each_seed_escaped_and_which_are_solved() -> None:
    trainer = Trainer(probe("mlstm", "evaluation.swap=[]", "evaluation.escape=1.5", "evaluation.solved=0.7"))
    trainer.floors = {"chance": 0.1, "bag": 0.2}
    trainer.evaluated = [10, 20, 30]
    trainer.curves = {"accuracy": [[0.1, 0.31, 0.3], [0.5, 0.1, 0.3], [0.9, 0.7, 0.3]]}
    trainer.seconds = 36.0
    result = trainer.result()
    assert result["escape_step"] == [20, 10, None]
    assert result["solved"] == 2
    assert result["escape_above"] == pytest.approx(0.3)
    assert result["seeds_per_hour"] == pytest.approx(300)


@pytest.mark.parametrize("settings", [["task.name=mqar", "task.pairs=3"], ["task.rebind=0.3"]])
def test_other_tasks_train_too(settings: list[str]) -> None:
    trainer = Trainer(probe("mlstm", *settings))
    trainer.train(6)
    assert trainer.evaluated == [3, 6]
    assert all(math.isfinite(value) for row in trainer.curves["loss"] for value in row)


def test_training_learns() -> None:
    """Of 20 tokens, the ten that may follow at all: keys and values take turns."""
    trainer = Trainer(
        probe(
            "mlstm", "task.vocab=21", "task.noise_vocab=1", "task.noise=0.0", "training.steps=120",
            "training.lr=2e-2", "training.batch=16", "training.seeds=2", "evaluation.every=10",
        )
    )  # fmt: skip
    trainer.train(120)
    losses = np.array(trainer.curves["loss"])  # (evaluations, seeds)
    assert (losses[0] > math.log(14)).all()
    assert (losses[-1] < math.log(11)).all()


@pytest.mark.parametrize("core", SMALL)
def test_every_core_has_numbers_of_its_own(core: str) -> None:
    trainer = Trainer(probe(core))
    trainer.train(3)
    ranked = {key for key in trainer.curves if "rank" in key}
    expected = {"mlstm": {"effective_rank_0"}, "mesa": {"effective_rank_0", "key_rank_0"}}
    assert ranked == expected.get(core.removeprefix("ortho_"), set())
    assert ("alpha" in trainer.curves) == (core == "ortho_mlstm")
