import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agent.errors import UserError
from agent.logging import LiveLine, MetricsLogger, memory


def read(logdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (logdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_lines_are_valid_json_with_the_step_first(tmp_path):
    logger = MetricsLogger(tmp_path / "new" / "run", tensorboard=False)
    logger.write(8, {"a": torch.tensor(0.5), "b": np.float32(2), "c": math.nan, "d": math.inf, "e": -math.inf})
    logger.close()
    (line,) = read(tmp_path / "new" / "run")
    assert line == {"step": 8, "a": 0.5, "b": 2.0, "c": "nan", "d": "inf", "e": "-inf"}
    assert next(iter(line)) == "step"


def test_a_line_can_be_read_at_once(tmp_path):
    logger = MetricsLogger(tmp_path, tensorboard=False)
    logger.write(1, {"a": 1})
    assert read(tmp_path) == [{"step": 1, "a": 1.0}]
    logger.close()


def test_a_resumed_run_doubles_no_line(tmp_path):
    first = MetricsLogger(tmp_path, tensorboard=False)
    first.write(1, {"a": 1})
    position = first.position()
    assert position == (tmp_path / "metrics.jsonl").stat().st_size
    first.write(2, {"a": 2})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "a"')  # the run was killed while it wrote

    second = MetricsLogger(tmp_path, tensorboard=False, start_step=1)
    second.truncate(position)
    second.write(2, {"a": 20})
    assert second.position() == (tmp_path / "metrics.jsonl").stat().st_size
    second.close()
    assert read(tmp_path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 20.0}]


def test_truncating_beyond_the_end_adds_nothing(tmp_path):
    logger = MetricsLogger(tmp_path, tensorboard=False)
    logger.write(1, {"a": 1})
    logger.truncate(10_000)
    logger.write(2, {"a": 2})
    logger.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    first = MetricsLogger(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        first.write(step, {"a": step})
    first.close()
    second = MetricsLogger(tmp_path, tensorboard=True, start_step=1)
    for step in (2, 3):
        second.write(step, {"a": 10 * step})
    second.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted((event.step, event.value) for event in events.Scalars("a")) == [(1, 1), (2, 20), (3, 30)]


def test_missing_tensorboard_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        MetricsLogger(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_come_at_most_every_30_seconds_and_at_the_end():
    clock, stream = Clock(), io.StringIO()
    live = LiveLine(10_000, 0, "cpu", stream, clock)
    for second in range(65):
        clock.now = float(second)
        live.update(10 * second, second)
    assert [line.split("/")[0] for line in stream.getvalue().splitlines()] == ["0", "300", "600"]
    live.close()
    assert stream.getvalue().splitlines()[-1].startswith("640/10,000 frames")
    assert len(stream.getvalue().splitlines()) == 4


def test_the_time_of_the_first_update_is_in_no_rate():
    clock = Clock()
    live = LiveLine(100_000, 0, "cpu", io.StringIO(), clock)
    live.update(0, 0)
    clock.now = 90.0  # compiling
    live.update(8, 1)
    live.forget_rates()
    assert live.text() == ""
    live.update(8, 1)
    assert "ETA ?" in live.text()
    clock.now = 91.0
    live.update(108, 26)
    assert "100 frames/s" in live.text()


def test_rates_forget_what_is_long_ago():
    clock = Clock()
    live = LiveLine(100_000, 0, "cpu", io.StringIO(), clock)
    for second in range(101):  # 100 frames and 2 updates a second
        clock.now = float(second)
        live.update(100 * second, 2 * second)
    assert "100 frames/s" in live.text()
    assert "2 updates/s" in live.text()
    assert "ETA 15:00" in live.text()  # 90,000 frames to go
    for second in range(1, 61):  # then 20 frames and half an update
        clock.now = 100.0 + second
        live.update(10_000 + 20 * second, 200 + second // 2)
    assert "20 frames/s" in live.text()
    assert "0.5 updates/s" in live.text()


def test_the_last_return_stays_in_the_line():
    clock = Clock()
    live = LiveLine(100, 0, "cpu", io.StringIO(), clock)
    live.update(1, 0)
    assert "return -" in live.text()
    live.update(2, 0, episode_return=12.34)
    live.update(3, 0)
    assert "return 12.3" in live.text()


def test_a_terminal_gets_one_live_line():
    stream = Terminal()
    live = LiveLine(100, 20, "cpu", stream, Clock())
    live.update(50, 3, episode_return=7.0)
    live.note("saved")
    live.close()
    shown = stream.getvalue()
    assert "\r" in shown
    assert "50%" in shown
    assert "return 7.0" in shown
    assert "saved\n" in shown


def test_nothing_to_show_is_no_failure():
    live = LiveLine(100, 0, "cpu", io.StringIO(), Clock())
    assert live.text() == ""
    live.close()


def test_memory_of_the_process_grows_with_what_it_holds():
    before = memory("cpu")
    block = np.ones(64 * 2**20, dtype=np.uint8)
    assert memory("cpu") - before > 32 * 2**20
    assert block.sum() == block.size
