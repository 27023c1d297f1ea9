"""Look at a trained agent: what its model predicts and imagines, what its memory reads, and how it acts."""

from pathlib import Path
from typing import Any

from agent.command_line import command, make_parser, names, parse_seed
from agent.errors import UserError
from agent.view import PREDICTED, VIEWS

DEFAULT = "open_loop,imagined,memory"


@command
def main() -> None:
    """Read the flags, write the files, print their names."""
    parser = make_parser(
        "Pictures and videos of the newest checkpoint of a run, from one episode played with the most likely actions. "
        "open_loop: the model observes a few steps and predicts the others from the actions alone, beside what came. "
        "imagined: the same, but the policy acts on what the model imagines. memory: for every block and head of the "
        "core the effective rank of its matrix and the age of what it reads. policy: a video of the episode, where "
        "the environment can draw. Prints the names of the files.",
        [
            "python scripts/view_agent.py --logdir runs/walker",
            "python scripts/view_agent.py --logdir runs/recall --show memory --steps 200",
        ],
        flags=("logdir", "device", "seed"),
    )
    parser.set_defaults(device="auto", seed="0")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the files (view/ in that of the run)")
    parser.add_argument("--show", metavar="LIST", default=DEFAULT, help=f"some of {','.join(VIEWS)} ({DEFAULT})")
    parser.add_argument("--best", action="store_true", help="the checkpoint of the highest return, not the newest")
    parser.add_argument("--steps", metavar="N", type=int, default=500, help="steps of the episode, at most (500)")
    parser.add_argument("--length", metavar="N", type=int, default=64, help="steps of a predicted sequence (64)")
    parser.add_argument("--context", metavar="N", type=int, default=5, help="of these, the observed ones (5)")
    parser.add_argument("--format", metavar="KIND", default="gif", help="of videos: gif, or mp4, which needs imageio")
    arguments = parser.parse_args()
    views, seed = _checked(arguments), parse_seed(arguments.seed)
    import agent
    from agent.video import check_kind
    from agent.view.files import Look, write_views

    check_kind(arguments.format, f"--format {arguments.format}")
    player = agent.load(arguments.logdir, arguments.device, render="policy" in views, best=arguments.best)
    look = Look(seed, arguments.steps, arguments.length, arguments.context, arguments.format)
    for file in write_views(player, views, arguments.out or arguments.logdir / "view", look):
        print(file, flush=True)


def _checked(arguments: Any) -> list[str]:
    """The views that are asked for.

    Raises:
        UserError: a flag is missing or not allowed.
    """
    if arguments.logdir is None:
        raise UserError("--logdir is missing: give the folder of a training run")
    views = names(arguments.show)
    for view in views:
        if view not in VIEWS:
            raise UserError(f"--show {view}: give some of {', '.join(VIEWS)}, with commas between them")
    if arguments.steps < 1:
        raise UserError(f"--steps {arguments.steps}: give 1 or more")
    if not PREDICTED.intersection(views):
        return views
    if arguments.context < 1:
        raise UserError(f"--context {arguments.context}: give 1 or more")
    if arguments.length <= arguments.context:
        raise UserError(f"--length {arguments.length}: give more than the {arguments.context} steps of --context")
    if arguments.steps < arguments.length:
        raise UserError(f"--steps {arguments.steps}: give at least the {arguments.length} steps of --length")
    return views
