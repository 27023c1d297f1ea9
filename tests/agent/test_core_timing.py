import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agent import core_timing
from agent.core_timing import list_cases, measure
from agent.cores import State, core, registered_cores
from agent.cores.gru import BlockGRU

SCRIPT = Path(__file__).parents[2] / "scripts/benchmark_cores.py"
CPU = torch.device("cpu")

RunScript = Callable[..., int]


@pytest.fixture(autouse=True)
def _no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_timing, "WARM_UP_SECONDS", 0.0)


def test_every_core_is_checked_and_timed(
    run_script: RunScript, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cores.json"
    words = ["--size", "debug", "--device", "cpu", "--batch", "2,3", "--length", "4,6", "--repeats", "3"]
    assert run_script(*words, "--out", str(out)) == 0
    result = json.loads(out.read_text())
    points = {(row["core"], row["batch"], row["length"], row["pass"]) for row in result["rows"]}
    assert points == {
        (name, batch, length, what)
        for name in registered_cores()
        for batch in (2, 3)
        for what, lengths in (("step", [1]), ("forward", [4, 6]), ("training", [4, 6]))
        for length in lengths
    }
    for row in result["rows"]:
        assert 0 < row["ms_p10"] <= row["ms"] <= row["ms_p90"]
        assert row["error"] < 5e-4
    heading, columns, *lines = capsys.readouterr().out.splitlines()
    assert heading.startswith("cpu x")
    assert len(lines) == len(result["rows"])
    end = columns.index(" ms") + 3
    for line, row in zip(lines, result["rows"], strict=True):
        assert line[:end].endswith(f" {row['ms']:.3f}")


def test_loops_and_reads_are_timed_where_they_are_asked_for(run_script: RunScript, tmp_path: Path) -> None:
    out = tmp_path / "cores.json"
    words = ["--size", "debug", "--device", "cpu", "--length", "4,6", "--repeats", "2", "--out", str(out)]
    passes = ["loop", "loop_training", *core_timing.READS]
    assert run_script(*words, "--passes", ",".join(passes), "--forms", "polynomial") == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["core"] for row in rows if row["pass"] == "loop"} == set(registered_cores())
    assert {row["form"] for row in rows if row["core"] == "ortho_mlstm"} == {"polynomial"}
    assert {row["core"] for row in rows if row["pass"].startswith("read")} == {"mlstm", "ortho_mlstm", "mesa"}
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.parametrize("name", ["mlstm", "ortho_mlstm", "mesa"])
def test_what_is_timed_as_the_read_is_what_the_core_does_with_its_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case, *_) = list_cases([name], ["debug"], "cpu", [])
    core = case.make(CPU)
    inputs = core_timing.make_inputs(core, case.input_size, 2, 6, torch.float32)
    seen: list[tuple[Tensor, ...]] = []
    sequence = core.reader.sequence
    monkeypatch.setattr(core.reader, "sequence", lambda *given: seen.append(given[:6]) or sequence(*given))
    core_timing.workload(core, inputs, "forward")()
    core_timing.workload(core, inputs, "read")()
    in_core, alone = seen[0], seen[-1]
    assert [(part.shape, part.dtype) for part in alone] == [(part.shape, part.dtype) for part in in_core]
    for what in ("read_training", "read_loop_training"):
        gradients = core_timing.workload(core, inputs, what)()
        assert len(gradients) == 5 and all(gradient.norm() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", ["mlstm", "ortho_mlstm", "mesa"])
def test_a_read_by_steps_reads_what_a_read_at_once_does(name: str) -> None:
    (case, *_) = list_cases([name], ["debug"], "cpu", [])
    core = case.make(CPU)
    inputs = core_timing.make_inputs(core, case.input_size, 2, 6, torch.float32)
    found = []
    for what in ("read", "read_loop"):
        torch.manual_seed(0)
        found.append(core_timing.workload(core, inputs, what)())
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4 * float(found[0].std()))


class WrongValue(BlockGRU):
    """Its sequence is off by a little at the last step."""

    def sequence(
        self, x: Tensor, state: State, first: Tensor, keep: Sequence[int] | None = None
    ) -> tuple[Tensor, State]:
        h, state = super().sequence(x, state, first, keep)
        return torch.cat([h[:, :-1], h[:, -1:] * 1.05], 1), state


class WrongGradient(BlockGRU):
    """Its sequence has the right values, but no gradient reaches the memory."""

    def sequence(self, x: Tensor, state: State, first: Tensor, keep: Any = None) -> tuple[Tensor, State]:
        return super().sequence(x, {key: value.detach() for key, value in state.items()}, first, keep)


class NotANumber(BlockGRU):
    def sequence(self, x: Tensor, state: State, first: Tensor, keep: Any = None) -> tuple[Tensor, State]:
        h, state = super().sequence(x, state, first, keep)
        return h * float("nan"), state


@pytest.mark.parametrize("wrong", [WrongValue, WrongGradient, NotANumber])
def test_a_wrong_core_is_not_timed(
    wrong: type[BlockGRU],
    run_script: RunScript,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(core.CORES, "gru", wrong)
    assert run_script("--cores", "gru", "--size", "debug", "--device", "cpu", "--length", "4", "--repeats", "2") == 1
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("wrong: off by" in line for line in lines)
    (case,) = list_cases(["gru"], ["debug"], "cpu", [])
    rows = list(measure(case, [2], [4], ["step", "training"], device=CPU, repeats=2, graph=False))
    assert all("ms" not in row for row in rows)


def test_forms_are_cases_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(core_timing.FORMS, "gru", {"narrow": ("core.hidden=8",), "wide": ("core.hidden=24",)})
    cases = list_cases(["gru", "attention"], ["debug", "1m"], "cpu", [])
    assert [(case.name, case.form, case.config.size) for case in cases] == [
        (name, form, size)
        for size in ("debug", "1m")
        for name, form in (("gru", "narrow"), ("gru", "wide"), ("attention", ""))
    ]
    assert [case.config.core.hidden for case in cases[:2]] == [8, 24]
    chosen = list_cases(["gru", "mesa"], ["debug"], "cpu", [], ["wide"])
    assert [(case.name, case.form) for case in chosen] == [
        ("gru", "wide"), ("mesa", "30 iterations"), ("mesa", "20 iterations"),
    ]  # fmt: skip


def test_products_in_bf16_have_their_own_tolerance() -> None:
    for case in list_cases(None, ["debug"], "cpu", ["precision=bf16"]):
        for row in measure(case, [2], [16], ["forward"], device=CPU, repeats=1, graph=False):
            assert row["precision"] == "bfloat16"
            assert 1e-4 < row["error"] < 0.2
            assert "ms" in row


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--cores", "gru,abacus"], "abacus"),
        (["--size", "13m"], "13m"),
        (["--batch", "0"], "--batch"),
        (["--length", "8,x"], "--length"),
        (["--passes", "step,backwards"], "backwards"),
        (["--repeats", "0"], "--repeats"),
        (["--graph"], "--graph"),
        (["--out", "nowhere/cores.json"], "nowhere"),
        (["--set", "core.detr=3", "--cores", "gru"], "core.deter"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], named: str, run_script: RunScript, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script("--device", "cpu", *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_graph_is_timed(run_script: RunScript, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("--size", "debug", "--device", "cuda", "--graph", "--repeats", "3") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 3 * len(list_cases(None, ["debug"], "cuda", []))
