"""Before anything imports torch or dm_control, which decide then about threads, and whether they can draw here."""

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


os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and threads that share a core crawl
if "MUJOCO_GL" not in os.environ:
    os.environ["MUJOCO_GL"] = "egl" if can_draw() else "disabled"
