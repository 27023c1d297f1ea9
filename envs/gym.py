"""Any environment that gymnasium can make by its id."""

from collections.abc import Mapping
from typing import Any

import gymnasium

from envs.errors import EnvError, nearest, one_line
from envs.rendering import choose_backend


def make(task: str, *, own_time_limit: bool, render: bool, options: Mapping[str, Any]) -> gymnasium.Env:
    """Build the gymnasium id `task`, or `module:id`; without its own time limit an episode may last forever.

    The options are arguments of the environment.

    Raises:
        EnvError: unknown id, missing package or module, an environment that does not render images, or an option
            that it refuses.
    """
    if render:
        choose_backend(render)
    try:
        env = gymnasium.make(
            task,
            max_episode_steps=None if own_time_limit else -1,
            disable_env_checker=True,  # check_env explains more
            **({"render_mode": "rgb_array"} if render else {}),  # many environments know no such argument
            **options,
        )
    except TypeError as error:
        if options:
            given = f"the options {dict(options)}"
            raise EnvError(f"environment 'gym_{task}' refuses {given}: {one_line(error)}") from None
        if render and "render_mode" in str(error):
            raise EnvError(
                f"environment 'gym_{task}' does not render images (it knows no render_mode); do without rendering"
            ) from None
        raise
    except gymnasium.error.UnregisteredEnv:
        hint = nearest(task, gymnasium.registry, "gym_") or "; name its module too, as in gym_<module>:<Id>"
        raise EnvError(f"unknown environment 'gym_{task}'{hint}") from None
    except gymnasium.error.DependencyNotInstalled as error:
        raise EnvError(f"environment 'gym_{task}' misses a package: {one_line(error)}") from None
    except ModuleNotFoundError as error:
        package = error.name or (error.__cause__.name if isinstance(error.__cause__, ImportError) else None)
        package = package or task.partition(":")[0]
        raise EnvError(
            f"environment 'gym_{task}' misses the module {package!r}; pip install {package}, "
            "or start where Python finds it"
        ) from None
    except gymnasium.error.Error as error:
        raise EnvError(f"environment 'gym_{task}' cannot be made: {one_line(error)}") from None
    if render and env.render_mode != "rgb_array":
        raise EnvError(f"environment 'gym_{task}' does not render images; do without rendering")
    return env


def preload(task: str) -> list[str]:
    """Modules worth importing once before the processes of many environments are forked."""
    module, colon, _ = task.partition(":")
    return ["envs.gym", module] if colon else ["envs.gym"]
