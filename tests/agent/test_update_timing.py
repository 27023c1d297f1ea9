"""The timing of updates: that it measures real ones, and how spans of kernels add up."""

import time
from collections.abc import Callable

import pytest

from agent.schema import Config
from agent.update_timing import CHUNK, busy_share, time_updates


def test_spans_that_overlap_count_once() -> None:
    assert busy_share([]) is None
    assert busy_share([(3.0, 5.0)]) == 1
    assert busy_share([(0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (6.0, 8.0)]) == pytest.approx(5 / 8)
    assert busy_share([(6.0, 8.0), (0.0, 2.0)]) == pytest.approx(0.5)


def test_an_update_on_the_cpu_is_timed(debug_config: Callable[..., Config]) -> None:
    started = time.time()
    tables: list[str] = []
    row = time_updates(debug_config("train.batch_length=4"), started, 1, tables.append, plain=True)
    passed = time.time() - started
    assert row["updates"] == 2 * CHUNK
    assert 0 < row["ms_p10"] <= row["ms"] <= row["ms_p90"]
    assert row["updates"] * row["ms"] / 1000 < passed
    assert 0 < row["first_update_s"] < row["steady_s"] < passed
    assert (row["core"], row["size"], row["batch"], row["length"]) == ("gru", "debug", 4, 4)
    assert (row["compile"], row["precision"], row["posterior"]) == ("eager", "fp32", "recurrent")
    assert row["peak_gib"] > 0.05
    assert row["plain_ms"] > 0 and row["times_plain"] == row["plain_ms"] / row["ms"]
    assert 0 < row["loss_dynamics"] < 10
    assert "aten::" in tables[0]
