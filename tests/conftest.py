"""Before anything imports dm_control, which decides then whether it can draw in this process."""

import ctypes.util
import os
import subprocess
import sys


def can_draw() -> bool:
    """Whether there is an EGL library, and a device that it works with."""
    if ctypes.util.find_library("EGL") is None:
        return False
    command = [sys.executable, "-c", "import dm_control._render"]
    return (
        subprocess.run(command, env=os.environ | {"MUJOCO_GL": "egl"}, capture_output=True, check=False).returncode == 0
    )


if "MUJOCO_GL" not in os.environ:
    os.environ["MUJOCO_GL"] = "egl" if can_draw() else "disabled"
