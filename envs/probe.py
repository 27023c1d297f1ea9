"""The probes of memory by their names, `<task>_<level>`; gymnasium knows them too, as probes/NoisyRecallBase-v0."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import gymnasium

from envs.errors import EnvError, nearest
from envs.probes.continuous_recall import ContinuousRecall
from envs.probes.count import Count
from envs.probes.delay import Delay
from envs.probes.masked_control import MaskedControl
from envs.probes.overwrite import Overwrite
from envs.probes.probe_env import ProbeEnv, ProbeVectorEnv
from envs.probes.recall import NoisyRecall
from envs.probes.repeat_lag import RepeatLag
from envs.probes.store_recall import StoreRecall
from envs.probes.task import Options, Task

TASKS: dict[str, type[Task]] = {
    "noisy_recall": NoisyRecall,
    "store_recall": StoreRecall,
    "continuous_recall": ContinuousRecall,
    "delay": Delay,
    "repeat_lag": RepeatLag,
    "overwrite": Overwrite,
    "count": Count,
}
LOOKS: dict[str, Any] = {"encoding": "tokens", "signed": False}
"""Options of every task that change how it is shown and paid, not what it asks."""

PRESETS: dict[str, tuple[type[Options], dict[str, Any]]] = {
    **{f"{name}_{level}": (task, task.LEVELS[level]) for name, task in TASKS.items() for level in task.LEVELS},
    **{
        f"masked_{body}_{level}": (MaskedControl, {"body": body} | options)
        for body in MaskedControl.TASKS
        for level, options in MaskedControl.LEVELS.items()
    },
}
"""By name the probe and the options that make its level."""


def make(
    task: str, *, own_time_limit: bool = True, render: bool = False, options: Mapping[str, Any] | None = None
) -> gymnasium.Env:
    """Build the probe `task`; `options` are fields of its class, which replace those of the level, or LOOKS.

    Raises:
        EnvError: the probe or an option is unknown, an option is not allowed, or the probe has no picture to render.
    """
    settings, looks = parse(task, options or {})
    if isinstance(settings, MaskedControl):
        return settings.make(own_time_limit, render)
    if render:
        raise EnvError(f"environment 'probe_{task}' does not render images; do without rendering")
    return ProbeEnv(settings, **looks)


def parse(task: str, options: Mapping[str, Any]) -> tuple[Task | MaskedControl, dict[str, Any]]:
    """The settings of the probe `task`, and how it is shown and paid."""
    if task not in PRESETS:
        hint = nearest(task, PRESETS, "probe_") or f"; names are {', '.join(f'probe_{name}' for name in PRESETS)}"
        raise EnvError(f"unknown environment 'probe_{task}'{hint}")
    kind, level = PRESETS[task]
    looks = LOOKS if issubclass(kind, Task) else {}
    known = [field.name for field in dataclasses.fields(kind)] + list(looks)
    for option in options:
        if option not in known:
            hint = nearest(option, known, "") or f"; its options are {', '.join(known)}"
            raise EnvError(f"environment 'probe_{task}' has no option {option!r}{hint}")
    chosen = {key: value for key, value in options.items() if key not in looks}
    try:
        settings: Any = kind(**(level | chosen))
    except EnvError as error:
        raise EnvError(f"environment 'probe_{task}': {error}") from None
    return settings, looks | {key: value for key, value in options.items() if key in looks}


def preload(task: str) -> list[str]:
    """Modules worth importing once before the processes of many environments are forked."""
    return ["envs.probe", "dm_control.suite"] if task.startswith("masked") else ["envs.probe"]


def by_id(task: str, **options: Any) -> gymnasium.Env:
    """What gymnasium calls to make a probe, with options as arguments."""
    return make(task, options=options)


def vector_by_id(task: str, num_envs: int, **options: Any) -> ProbeVectorEnv:
    """What gymnasium.make_vec calls to make probes in lockstep, several times as fast as one by one.

    Raises:
        EnvError: the probe or an option is unknown, an option is not allowed, or the probe has no such form.
    """
    settings, looks = parse(task, options)
    if isinstance(settings, MaskedControl) or looks["encoding"] == "image":
        raise EnvError(f"environment 'probe_{task}' is not made in lockstep; use vectorization_mode sync or async")
    return ProbeVectorEnv(settings, num_envs, **looks)


for _name in PRESETS:
    gymnasium.register(
        f"probes/{_name.title().replace('_', '')}-v0",
        f"{__name__}:by_id",
        vector_entry_point=f"{__name__}:vector_by_id",
        kwargs={"task": _name},
    )
