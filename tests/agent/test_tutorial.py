"""docs/tutorial.md, run from its first block to its last."""

import os
import subprocess
import sys
from pathlib import Path

from pages import blocks

import agent

ROOT = Path(__file__).parents[2]


def test_the_tutorial_runs(tmp_path: Path) -> None:
    page = blocks("tutorial.md")
    assert {block.language for block in page} == {"python"}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    code = "".join(block.text for block in page)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tensor([" in done.stdout.splitlines()[-1]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "runs/gym_CartPole-v1-gru-debug-seed0-1/config.yaml").exists()


def test_what_the_package_offers_is_there_and_explained() -> None:
    for name in agent.__all__:
        assert getattr(agent, name).__doc__, name
