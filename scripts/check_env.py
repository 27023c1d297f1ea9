"""Check an environment, in words, before an agent trains on it."""

from agent.command_line import config_from_arguments, make_parser, run_main


def main() -> None:
    """Make the environment, check it, print what was found."""
    parser = make_parser(
        "Check that an environment keeps the rules that an agent relies on. Exit status 1 if it does not.",
        [
            "python scripts/check_env.py --env dmc_walker",
            "python scripts/check_env.py --env gym_CartPole-v1",
        ],
        flags=("env", "config", "set"),
    )
    config = config_from_arguments(parser.parse_args(), notify=lambda line: None)  # a size does not matter here
    import envs
    from envs.check import check_env

    settings = config.env
    env = envs.make(
        settings.name,
        action_repeat=settings.action_repeat,
        time_limit=settings.time_limit,
        options=settings.options,
    )
    print(f"{config.env.name}: observations {env.observation_space}, actions {env.action_space}")
    problems = check_env(env)
    env.close()
    for problem in problems:
        print(f"- {problem}")
    if problems:
        raise SystemExit(1)
    print("no problems found")


if __name__ == "__main__":
    run_main(main)
