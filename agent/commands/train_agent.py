"""Train a Dreamer agent, or go on with a run that was stopped."""

from agent.command_line import command, config_from_arguments, make_parser, names
from agent.errors import UserError


@command
def main() -> None:
    """Read the flags and train."""
    parser = make_parser(
        "Train a Dreamer agent. A --logdir that holds a run resumes it.",
        [
            "python scripts/train_agent.py --env dmc_walker",
            "python scripts/train_agent.py --env dmc_cheetah_run --size 12m --steps 5e5 --logdir runs/cheetah",
            "python scripts/train_agent.py --env gym_CartPole-v1 --set train.ratio=256 rssm.posterior=observation",
            "python scripts/train_agent.py --env dmc_walker --seeds 0,1,2 --logdir runs/walker",
        ],
    )
    parser.add_argument("--seeds", metavar="N,...", help="several runs side by side, in <logdir>/seed<n>")
    arguments = parser.parse_args()
    words = [] if arguments.seeds is None else names(arguments.seeds)
    if not all(word.isdecimal() and int(word) < 2**32 for word in words):
        raise UserError(f"--seeds {arguments.seeds}: give whole numbers from 0 to {2**32 - 1}, as in 0,1,2")
    if words and arguments.seed is not None:
        raise UserError("--seed is for one run and --seeds for several; leave out one of them")
    news: list[str] = []  # told when nothing can be wrong any more
    config = config_from_arguments(arguments, news.append)
    if words:
        from agent.logdir import new_logdir
        from agent.seeds import train_seeds

        train_seeds(config, [int(word) for word in words], arguments.logdir or new_logdir(config))
        return
    from agent.training import train

    train(config, arguments.logdir, news)


if __name__ == "__main__":
    main()
