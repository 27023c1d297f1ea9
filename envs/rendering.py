"""MuJoCo's pictures on a machine without a display: which library draws them, and what to install if it is missing."""

import importlib
import importlib.util
import logging
import multiprocessing
import os
import sys
from types import ModuleType

from envs.errors import EnvError, one_line

PACKAGES = {"egl": "libegl1 libgl1-mesa-dri", "osmesa": "libosmesa6"}
"""By the value of MUJOCO_GL, the packages of Debian and Ubuntu that bring its library."""
OFF = ("disabled", "disable", "off", "false", "0")


def load_suite(render: bool) -> ModuleType:
    """Import dm_control.suite, which on its import decides once for this process with what it draws, if at all.

    Raises:
        EnvError: dm_control is missing or broken; or `render`, and it cannot draw here.
    """
    backend = choose_backend(render)
    if render and not may_draw():
        raise EnvError(
            f"dm_control cannot render with MUJOCO_GL={backend} in this process; "
            "set MUJOCO_GL=egl before starting Python"
        )
    if render and backend.lower() == "glfw" and sys.platform == "linux" and not displays():
        raise cannot_draw("there is no display")
    try:
        from dm_control import suite
    except Exception as error:  # of several kinds where a GL library is missing, or is there and has no device
        about_drawing = not isinstance(error, ImportError) or any(word in str(error) for word in ("GL", "OSMesa"))
        if about_drawing and may_draw():
            raise cannot_draw(error) from None
        raise EnvError(
            f"dm_control cannot be imported ({one_line(error)}); pip install dm-control==1.0.50 mujoco==3.17.0"
        ) from None
    logging.getLogger("absl").addFilter(_concerns_users)
    return suite


def _concerns_users(record: logging.LogRecord) -> bool:
    """Not what the suite's own models use and MuJoCo will drop: each process would say so at each start."""
    return "is deprecated and will be removed" not in record.getMessage()


def choose_backend(render: bool) -> str:
    """What MuJoCo draws with in this process: the user's choice, else EGL if it is to draw and nothing if not.

    A GL library may bring an LLVM of its own, and loading that of Triton after it ends the process. So the main one,
    where an agent may need Triton later, loads it before.
    """
    backend = os.environ.setdefault("MUJOCO_GL", "egl" if render else "disabled")
    in_main_process = multiprocessing.parent_process() is None
    if may_draw() and in_main_process and importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton")
    return backend


def may_draw() -> bool:
    """Whether a library to draw with has been chosen for this process, by the user or by an environment before."""
    return os.environ.get("MUJOCO_GL", "disabled").lower() not in OFF


def displays() -> list[str]:
    """The displays that a window could appear on."""
    return [os.environ[name] for name in ("DISPLAY", "WAYLAND_DISPLAY") if os.environ.get(name)]


def cannot_draw(reason: object) -> EnvError:
    """What to say when the chosen library is not there or does not work."""
    backend = os.environ.get("MUJOCO_GL", "glfw")
    package = PACKAGES.get(backend.lower())
    if package:
        other = next(name for name in PACKAGES if name != backend.lower())
        advice = f"apt-get install {package}, or {PACKAGES[other]} and set MUJOCO_GL={other}"
    else:
        advice = f"set MUJOCO_GL=egl and apt-get install {PACKAGES['egl']}"
    return EnvError(
        f"dm_control cannot render with MUJOCO_GL={backend} ({one_line(reason)}): {advice}; "
        "state observations need none of this, with MUJOCO_GL=disabled"
    )
