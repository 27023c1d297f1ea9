"""What all scripts share: their flags, and how a user's mistake ends them."""

import argparse
import difflib
import functools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from agent import config as configuration
from agent.errors import UserError
from agent.schema import Config
from envs.errors import EnvError

FLAGS: dict[str, dict[str, Any]] = {
    "env": {
        "metavar": "NAME",
        "help": "preset in configs/env/, or a name: dmc_<domain>_<task>, gym_<Id>, probe_<task>_<level>",
    },
    "core": {"metavar": "NAME", "help": "recurrent core, a file in configs/core/"},
    "size": {
        "metavar": "NAME",
        "help": "1m wide 12m 25m 50m 100m 200m 400m debug, or auto: wide on cuda and 1m on cpu",
    },
    "steps": {"metavar": "N", "help": "length of training in environment frames, as 500000 or 5e5"},
    "seed": {"metavar": "N", "help": "seed of weights, environments, replay and actions"},
    "logdir": {
        "metavar": "DIR",
        "type": Path,
        "help": "folder of the run; one that holds a run resumes it",
    },
    "device": {"metavar": "NAME", "help": "auto, cpu or cuda"},
    "config": {"metavar": "FILE", "type": Path, "help": "your own YAML file, laid over configs/"},
    "set": {
        "metavar": "key=value",
        "nargs": "*",
        "action": "extend",
        "default": [],
        "help": "any key of configs/default.yaml, as in rssm.posterior=observation train.ratio=256",
    },
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, which has the nearest flag for one that is unknown."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As that of argparse; a mistake ends the program with exit status 2."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            nearest = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
            hint = f"; the nearest flag is {nearest[0]}" if nearest else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        """End the program with exit status 2."""
        self.exit(2, f"{self.prog}: {message}; --help shows what there is\n")


def make_parser(description: str, examples: Sequence[str], flags: Sequence[str] = tuple(FLAGS)) -> Parser:
    """A parser with the shared flags, to which a script adds its own.

    Args:
        description: what the script does.
        examples: complete command lines, shown under the flags; those of a script with the name of the installed
            command, if that is what runs.
        flags: names of the shared flags that mean something to the script.
    """
    program = Path(sys.argv[0])
    if program.suffix != ".py":
        examples = [re.sub(r"^python scripts/\w+\.py", program.name, example) for example in examples]
    parser = Parser(
        description=textwrap.fill(description, 80),
        epilog="\n  ".join(["examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag in flags:
        parser.add_argument(f"--{flag}", **FLAGS[flag])
    return parser


def names(text: str) -> list[str]:
    """Words between commas: what a flag that takes several is read with."""
    return [word.strip() for word in text.split(",")]


def parse_seed(text: str) -> int:
    """The value of a --seed; UserError if it is none."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise UserError(f"--seed {text}: give a whole number from 0 to {2**32 - 1}")
    return int(text)


def tell(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr)


def config_from_arguments(arguments: argparse.Namespace, notify: Callable[[str], None] = tell) -> Config:
    """The configuration that the shared flags ask for; `notify` is told of a size chosen by `auto`.

    Raises:
        UserError: something is missing, unknown or not allowed.
    """
    given: dict[str, Any] = {flag: getattr(arguments, flag, None) for flag in FLAGS}
    numbers = {
        flag: None if given[flag] is None else configuration.parse_value(given[flag], f"--{flag}")
        for flag in ("steps", "seed")
    }
    return configuration.resolve(
        given["env"],
        given["core"],
        given["size"],
        device=given["device"],
        settings=given["set"] or (),
        file=given["config"],
        notify=notify,
        **numbers,
    )


def command(main: Callable[[], None]) -> Callable[[], NoReturn]:
    """Decorator: a `main` for the command line, which ends the process as `run_main` says."""

    @functools.wraps(main)
    def run() -> NoReturn:
        run_main(main)

    return run


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and exit: with status 0, or 2 and a message on stderr for a user's mistake.

    Where torchrun starts several of it on a machine, all make the same mistake, and the first one tells.
    """
    try:
        main()
    except (UserError, EnvError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
