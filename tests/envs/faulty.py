"""An environment that breaks in some episodes, each time in the way that its name says; registered on import."""

import ctypes
import os
import signal
import threading

import gymnasium
import numpy as np
from gymnasium import spaces
from test_tiny import Tiny

LUCK = 0.9


class Faulty(Tiny):
    """Breaks at step 2 of every episode whose draw is above `luck`: one in ten, or all where it is negative."""

    healthy = False  # set on the class: whether all of this process behave

    def __init__(self, kind, luck=LUCK):
        super().__init__()
        self.kind, self.luck = kind, luck

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        if self.kind == "reset" and self.draw > self.luck:
            raise RuntimeError("stuck")
        return result

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if self.count != 2 or self.draw <= self.luck or self.healthy:
            return observation, reward, terminated, truncated, info
        match self.kind:
            case "raise":
                raise ValueError("a gear\nbroke at 100 %d")
            case "exit":
                raise SystemExit(0)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                threading.Event().wait()
            case "freeze":  # as a library that loops without ever letting another thread run
                ctypes.PyDLL(None).pause()
            case "shape":
                observation = np.zeros(3)
            case "dtype":
                observation = observation.astype(complex)
            case "words":
                observation = {"place": "here"}
            case "range":
                observation[1] = 1000.5
            case "nan":
                observation[0] = np.nan
            case "huge":
                self.observation_space.high[:] = np.inf
                observation[1] = 1e39
            case "space":
                self.observation_space = spaces.Box(0, 1, (3,), np.float32)
            case "action":
                self.action_space = spaces.Discrete(5)
            case "reward":
                reward = None
            case "flag":
                terminated = None
            case "four":
                return observation, reward, terminated, truncated
        return observation, reward, terminated, truncated, info


KINDS = {
    "raise": r"raised ValueError in step: a gear broke at 100 %d \(.*faulty\.py:\d+\)",
    "exit": r"raised SystemExit in step: 0 ",
    "shape": r"gave observation 'observation' that has shape \(3,\), its space says \(2,\)",
    "dtype": r"gave observation 'observation' that has dtype complex128, its space says float64",
    "words": r"gave observation 'observation' that has dtype object",
    "range": r"gave observation 'observation' that is 1000\.5 at \[1\], outside of \[0\.0, 1000\.0\]",
    "nan": r"gave observation 'observation' that holds NaN or infinite values",
    "space": r"gave observation_space, which became Box\(0\.0, 1\.0, \(3,\), float32\) and was Box",
    "reward": r"raised TypeError in step: .*NoneType",
    "flag": r"gave terminated as None; return a bool",
    "four": r"raised ValueError in step: not enough values to unpack",
}
"""What a failure says of itself, for the kinds that a process survives."""
DEADLY = {
    "kill": r"died: its process ended with exit code -9 \(often means out of memory",
    "hang": r"gave no answer to step\(\) within 3 s \(env\.timeout\)",
    "freeze": r"gave no answer to step\(\) within 3 s \(env\.timeout\)",
}
OTHERS = ("reset", "action", "huge")
for _kind in (*KINDS, *DEADLY, *OTHERS):
    gymnasium.register(f"Faulty{_kind.title()}-v0", Faulty, kwargs={"kind": _kind})
    gymnasium.register(f"Ruined{_kind.title()}-v0", Faulty, kwargs={"kind": _kind, "luck": -1.0})
gymnasium.register("Sound-v0", Faulty, kwargs={"kind": "none"})
