"""Where compiled code is kept."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agent.compiler import CACHE_VARIABLE, use_lasting_cache


def test_compiled_code_is_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")  # so that it is restored afterwards
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_lasting_cache()
    folder = Path(os.environ[CACHE_VARIABLE])
    assert folder.is_dir()
    assert tmp_path in folder.parents


def test_a_place_that_the_environment_names_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "/elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_lasting_cache()
    assert os.environ[CACHE_VARIABLE] == "/elsewhere"
    assert not any(tmp_path.iterdir())


def test_without_a_folder_to_write_to_pytorch_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.delenv(CACHE_VARIABLE)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    use_lasting_cache()
    assert CACHE_VARIABLE not in os.environ


def test_a_memory_format_is_pickled_alike_in_every_program() -> None:
    """Code in the cache is found by a hash of such bytes, which named the first module loaded that imports torch."""
    show = "import agent.compiler, pickle, torch; print(pickle.dumps(torch.contiguous_format).hex())"
    first = "import sys, types; first = sys.modules['first'] = types.ModuleType('first')"
    found = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for program in (show, f"{first}; import torch; first.torch = torch; {show}")
    }
    assert len(found) == 1
    for form in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d):
        assert pickle.loads(pickle.dumps(form)) is form
