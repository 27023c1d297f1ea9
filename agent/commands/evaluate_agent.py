"""Evaluate a trained agent: whole episodes with the most likely actions, results as JSON on stdout."""

import json
from pathlib import Path

from agent.command_line import command, make_parser, parse_seed
from agent.errors import UserError


@command
def main() -> None:
    """Read the flags, play, print."""
    parser = make_parser(
        "Evaluate the newest checkpoint of a run. Prints mean, std and each return as JSON.",
        [
            "python scripts/evaluate_agent.py --logdir runs/walker --episodes 10",
            "python scripts/evaluate_agent.py --logdir runs/walker --video walker.gif",
            "python scripts/evaluate_agent.py --logdir runs/walker --foresight",
            "python scripts/evaluate_agent.py --logdir runs/walker --what-if",
        ],
        flags=("logdir", "device", "seed"),
    )
    parser.set_defaults(device="auto", seed="0")
    parser.add_argument("--episodes", metavar="N", type=int, default=10, help="episodes, played side by side")
    parser.add_argument("--best", action="store_true", help="the checkpoint of the highest return, not the newest")
    parser.add_argument("--video", metavar="FILE", type=Path, help="write one more episode as .gif or .mp4")
    parser.add_argument(
        "--foresight", action="store_true",
        help="tell, of as many episodes played one by one, what rewards the agent expects from their states 0, 1, ... "
        "steps ahead, beside what came",
    )  # fmt: skip
    parser.add_argument(
        "--what-if", action="store_true",
        help="tell, from states of as many episodes, how well the model knows what other actions would have brought: "
        "they are played, and predicted",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.logdir is None:
        raise UserError("--logdir is missing: give the folder of a training run")
    if arguments.episodes < 1:
        raise UserError(f"--episodes {arguments.episodes}: give 1 or more")
    seed = parse_seed(arguments.seed)
    import agent
    from agent.video import check_video

    if arguments.video:
        check_video(arguments.video)
    player = agent.load(arguments.logdir, arguments.device, render=arguments.video is not None, best=arguments.best)
    results = agent.evaluate(player, arguments.episodes, seed)
    if arguments.video:
        results["video"] = {
            "file": str(arguments.video),
            "return": agent.record(player, arguments.video, seed),
        }
    if arguments.foresight:
        results["foresight"] = agent.foresee(player, arguments.episodes, seed)
    if arguments.what_if:
        results["what_if"] = agent.what_if(player, arguments.episodes, seed)
    print(json.dumps({"logdir": str(arguments.logdir), "episodes": arguments.episodes, **results}))
