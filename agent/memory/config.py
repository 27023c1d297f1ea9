"""A suite's configuration: which probes, cores and seeds there are, and the whole configuration of each run.

Defaults stand in `configs/suite/default.yaml` alone; `configs/suite/<name>.yaml` overlays it.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from agent.config import CONFIGS, Values, build, check_choice, parse_settings, read_yaml, resolve
from agent.errors import UserError
from agent.schema import STRICT, Config, Share

SUITES = CONFIGS / "suite"


def _with_trained(gaps: list[int]) -> list[int]:
    if 1 not in gaps:
        raise ValueError("it should have 1, the trained gap itself, among others")
    return gaps


@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """Section `evaluation`."""

    episodes: PositiveInt
    seed: NonNegativeInt
    gaps: Annotated[list[PositiveInt], AfterValidator(_with_trained)]
    reached: Share
    window: PositiveInt


@dataclass(frozen=True, config=STRICT)
class Plan:
    """The keys of a suite that are no settings of its runs."""

    cores: Annotated[list[str], Field(min_length=1)]
    seeds: PositiveInt
    first_seed: NonNegativeInt
    parallel: PositiveInt


@dataclasses.dataclass(frozen=True)
class Run:
    """One agent to train and evaluate."""

    name: str  # a folder's name too
    probe: str
    core: str  # as the user wrote it
    config: Config


@dataclasses.dataclass(frozen=True)
class Suite:
    """All runs, those of one probe and core side by side, and how they are evaluated."""

    runs: list[Run]
    parallel: int
    evaluation: Evaluation


def suite_names() -> list[str]:
    """All suites of `configs/suite/`."""
    return sorted(path.stem for path in SUITES.glob("*.yaml") if path.stem != "default")


def default_evaluation() -> Evaluation:
    """How an agent is evaluated outside of any suite."""
    return _section(Evaluation, "evaluation", read_yaml(SUITES / "default.yaml"))


def load_suite(
    name: str,
    cores: Sequence[str] | None = None,
    probes: Sequence[str] | None = None,
    seeds: int | None = None,
    steps: Any = None,
    parallel: int | None = None,
    device: str | None = None,
    settings: Sequence[str] = (),
) -> Suite:
    """The suite of a file, with what the command line says laid over it; None leaves a choice to the file.

    Args:
        name: a file of `configs/suite/`.
        cores: names, each perhaps with keys of its own, as in `ortho_mlstm:map_steps=3:unit_norm=true`.
        probes: those of the suite's probes that are wanted.
        seeds: runs of each core on each probe.
        steps: length of each training in environment frames.
        parallel: runs side by side.
        device: "auto", "cpu" or "cuda".
        settings: "key=value" for every run.

    Raises:
        UserError: something is missing, unknown or not allowed.
    """
    check_choice("--suite", name, suite_names())
    values = read_yaml(SUITES / "default.yaml") | read_yaml(SUITES / f"{name}.yaml")
    given = {"cores": cores, "seeds": seeds, "parallel": parallel}
    top = {key: value for key, value in values.items() if "." not in key and value != {}}
    plan = build(Plan, top | {key: value for key, value in given.items() if value is not None}, "")
    of_probe, of_core = _groups(values, "probes"), _groups(values, "of_core")
    for probe in probes or ():
        check_choice("--probes", probe, list(of_probe))
    runs = []
    for probe in probes or of_probe:
        for spec in plan.cores:
            core, *own = spec.split(":")
            layers = _below(values, "settings") | of_probe[probe] | of_core.get(core, {})
            layers |= {f"core.{key}": value for key, value in parse_settings(own).items()}
            for seed in range(plan.first_seed, plan.first_seed + plan.seeds):
                texts = [f"{key}={json.dumps(value)}" for key, value in layers.items()]
                config = resolve(core=core, seed=seed, steps=steps, device=device, settings=[*texts, *settings])
                runs.append(Run(f"{probe}-{spec.replace(':', '-')}-seed{seed}", probe, spec, config))
    repeated = [run.name for run in runs if sum(other.name == run.name for other in runs) > 1]
    if repeated:
        raise UserError(f"{repeated[0]} is asked for twice; give every core and probe once")
    return Suite(runs, plan.parallel, _section(Evaluation, "evaluation", values))


def _section(kind: type[Any], name: str, values: Values) -> Any:
    return build(kind, _below(values, name), name)


def _below(values: Values, prefix: str) -> Values:
    """The values under a prefix, by what follows it."""
    return {key.removeprefix(f"{prefix}."): value for key, value in values.items() if key.startswith(f"{prefix}.")}


def _groups(values: Values, prefix: str) -> dict[str, Values]:
    """The values under a prefix, by the name that follows it and then by key."""
    found: dict[str, Values] = {}
    for key, value in _below(values, prefix).items():
        name, _, rest = key.partition(".")
        found.setdefault(name, {})[rest] = value
    return found
