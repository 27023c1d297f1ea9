"""Train a Dreamer agent, or several side by side, or go on with what was stopped."""

import argparse

from agent.command_line import command, config_from_arguments, make_parser, names
from agent.errors import UserError

VARIED = ("env", "core", "size")
"""The flags that take several values, besides --seeds."""


@command
def main() -> None:
    """Read the flags and train."""
    parser = make_parser(
        "Train a Dreamer agent. A --logdir that holds a run resumes it. Several values between commas after --env, "
        "--core, --size or --seeds train a run of each combination, side by side, in folders of --logdir.",
        [
            "python scripts/train_agent.py --env dmc_walker",
            "python scripts/train_agent.py --env dmc_cheetah_run --size 12m --steps 5e5 --logdir runs/cheetah",
            "python scripts/train_agent.py --env gym_CartPole-v1 --set train.ratio=256 rssm.posterior=observation",
            "python scripts/train_agent.py --env dmc_walker --core gru,mlstm --seeds 0,1 --logdir runs/walker",
        ],
    )
    parser.add_argument("--seeds", metavar="N,...", help="several runs, of these seeds")
    parser.add_argument("--parallel", metavar="N", type=int, help="of several runs so many at a time; on the CPU at "
                        "most its cores; if not given, all")  # fmt: skip
    arguments = parser.parse_args()
    given = {flag: _values(getattr(arguments, flag)) for flag in (*VARIED, "seeds")}
    _check(arguments, given["seeds"])
    if all(len(values) == 1 for values in given.values()) and arguments.seeds is None:
        _train_one(arguments)
    else:
        _train_several(arguments, given)


def _values(text: str | None) -> list[str | None]:
    return [None] if text is None else list(names(text))


def _check(arguments: argparse.Namespace, seeds: list[str | None]) -> None:
    """UserError for seeds that are none, and for flags that do not go together."""
    if not all(seed is None or (seed.isdecimal() and int(seed) < 2**32) for seed in seeds):
        raise UserError(f"--seeds {arguments.seeds}: give whole numbers from 0 to {2**32 - 1}, as in 0,1,2")
    if arguments.seeds is not None and arguments.seed is not None:
        raise UserError("--seed is for one run and --seeds for several; leave out one of them")
    if arguments.parallel is not None and arguments.parallel < 1:
        raise UserError(f"--parallel {arguments.parallel}: give 1 or more")


def _train_one(arguments: argparse.Namespace) -> None:
    if arguments.parallel is not None:
        raise UserError("--parallel is for several runs, as of --seeds 0,1,2; leave it out")
    news: list[str] = []  # told when nothing can be wrong any more
    config = config_from_arguments(arguments, news.append)
    from agent.training import train

    train(config, arguments.logdir, news)


def _train_several(arguments: argparse.Namespace, given: dict[str, list[str | None]]) -> None:
    from agent.logdir import new_logdir
    from agent.several import combinations, train_several

    configs = {}
    for name, choice in combinations(given).items():
        of_run = argparse.Namespace(**{**vars(arguments), **choice})
        of_run.seed = arguments.seed if arguments.seeds is None else choice["seeds"]
        configs[name] = config_from_arguments(of_run, lambda line: None)
    train_several(configs, arguments.logdir or new_logdir(*configs.values()), arguments.parallel)


if __name__ == "__main__":
    main()
