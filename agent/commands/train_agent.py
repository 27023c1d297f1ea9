"""Train a Dreamer agent, or go on with a run that was stopped."""

from agent.command_line import command, config_from_arguments, make_parser


@command
def main() -> None:
    """Read the flags and train."""
    parser = make_parser(
        "Train a Dreamer agent. A --logdir that holds a run resumes it.",
        [
            "python scripts/train_agent.py --env dmc_walker",
            "python scripts/train_agent.py --env dmc_cheetah_run --size 12m --steps 5e5 --logdir runs/cheetah",
            "python scripts/train_agent.py --env gym_CartPole-v1 --set train.ratio=256 rssm.posterior=observation",
        ],
    )
    arguments = parser.parse_args()
    news: list[str] = []  # told when nothing can be wrong any more
    config = config_from_arguments(arguments, news.append)
    from agent.training import train

    train(config, arguments.logdir, news)
