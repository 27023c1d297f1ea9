"""Before anything imports dm_control, which decides then whether it can draw in this process."""

import ctypes.util
import os

os.environ.setdefault("MUJOCO_GL", "egl" if ctypes.util.find_library("EGL") else "disabled")
