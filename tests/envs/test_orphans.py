"""No process outlives the one that it works for, whatever ended that and whatever it was doing."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import numpy as np
from envs.streams import Streams
if __name__ == "__main__":
    streams = Streams(sys.argv[1], 2, parallel=True, seed=0)
    streams.reset()
    for step in range(2):
        streams.send(np.zeros(2, np.int64))
        print(step, flush=True)
        streams.receive()
    print("idle", flush=True)
    sys.stdin.read()
"""


def processes_with(token: str) -> list[int]:
    """The processes, workers and their server included, whose environment holds the token."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has just ended, or belongs to someone else
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(("name", "at"), [("Sound", "idle"), ("RuinedHang", "1"), ("RuinedFreeze", "1")])
def test_workers_end_with_the_main_process(name: str, at: str, kind: int) -> None:
    token = f"orphan-{uuid.uuid4()}"
    environment = os.environ | {"TOKEN": token, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'envs'}"}
    command = [sys.executable, "-c", PROGRAM, f"gym_faulty:{name}-v0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as main:
        assert main.stdout is not None
        assert any(line.strip() == at for line in main.stdout)
        assert len(processes_with(token)) >= 4  # main, server, two workers
        main.send_signal(kind)
    deadline = time.monotonic() + 30  # only of a failure
    while left := processes_with(token):
        if time.monotonic() > deadline:
            for process in left:
                os.kill(process, signal.SIGKILL)
            pytest.fail(f"{len(left)} processes are left")
        time.sleep(0.02)
