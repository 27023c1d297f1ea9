"""The probe's configuration: which keys there are, and how files and command line give one experiment for each core.

Defaults stand in `configs/probe/` alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from agent.config import (
    CONFIGS,
    Values,
    build,
    check_choice,
    check_keys,
    config_file,
    config_names,
    core_config,
    parse_settings,
    read_yaml,
)
from agent.errors import UserError
from agent.schema import STRICT, Count, NonNegative, Positive, Share, ShareBelowOne
from envs.probes.noisy_recall import MultiQueryRecall, NoisyRecall, RecallTask

PROBE = CONFIGS / "probe"


@dataclass(frozen=True, config=STRICT)
class Task:
    """Section `task`."""

    name: Literal["noisy_recall", "mqar"]
    vocab: PositiveInt
    length: PositiveInt
    noise: Share
    noise_vocab: PositiveInt
    rebind: Share
    pairs: PositiveInt
    power: Positive
    random_fill: bool


@dataclass(frozen=True, config=STRICT)
class Training:
    """Section `training`."""

    steps: Count
    batch: PositiveInt
    lr: Positive
    schedule: Literal["cosine", "constant"]
    warmup: NonNegativeInt
    weight_decay: NonNegative
    beta1: ShareBelowOne
    beta2: ShareBelowOne
    clip: Positive
    seeds: PositiveInt
    first_seed: NonNegativeInt


@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """Section `evaluation`."""

    every: PositiveInt
    sequences: PositiveInt
    seed: NonNegativeInt
    solved: Share
    escape: Annotated[float, Field(gt=1)]
    swap: list[str]


@dataclass(frozen=True, config=STRICT)
class Compute:
    """Section `compute`: how, not what."""

    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]
    compile: bool
    tokens_at_once: Count


@dataclass(frozen=True, config=STRICT)
class Probe:
    """One core on one task, with all its seeds. `configs/probe/default.yaml` says what each key means."""

    core_name: str
    core: Any  # an instance of the core's own Config
    size: str
    embedding: PositiveInt
    task: Task
    training: Training
    evaluation: Evaluation
    compute: Compute

    def make_task(self) -> RecallTask:
        """The generator of sequences.

        Raises:
            EnvError: a number is out of range.
        """
        task = self.task
        if task.name == "mqar":
            return MultiQueryRecall(task.vocab, task.length, task.pairs, task.power, task.random_fill)
        return NoisyRecall(task.vocab, task.length, task.noise, task.noise_vocab, task.rebind)


SECTIONS: dict[str, type[Any]] = {"task": Task, "training": Training, "evaluation": Evaluation, "compute": Compute}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A configuration and the name under which it is reported."""

    name: str  # a folder's name too
    preset: str
    core: str  # as the user wrote it
    probe: Probe


def experiments(
    cores: Sequence[str],
    presets: Sequence[str],
    rates: Sequence[str],
    settings: Sequence[str],
    flags: Mapping[str, Any],
) -> list[Experiment]:
    """Every core at every preset and learning rate.

    Args:
        cores: names, each perhaps with keys of its own, as in `ortho_mlstm:map_steps=3:unit_norm=true`.
        presets: files of `configs/probe/preset/`; one that names others stands for them, "" for none.
        rates: learning rates; empty leaves them to the files.
        settings: "key=value" with a dotted key.
        flags: values by dotted key; None leaves a key to the files.

    Raises:
        UserError: something is missing, unknown or not allowed.
        EnvError: a number of the task is out of range.
    """
    found = []
    for preset in _members(presets):
        for spec in cores:
            for rate in rates or [""]:
                own = [*settings, *([f"training.lr={rate}"] if rate else [])]
                probe = resolve(spec, preset, own, flags)
                probe.make_task()
                task = preset or f"{probe.task.name}_{probe.task.vocab}_{probe.task.length}"
                name = "-".join([task, spec.replace(":", "-"), *([f"lr={rate}"] if len(rates) > 1 else [])])
                found.append(Experiment(name, preset, spec, probe))
    repeated = {each.name for each in found if sum(other.name == each.name for other in found) > 1}
    if repeated:
        raise UserError(f"{min(repeated)} is asked for twice; give every core, preset and learning rate once")
    return found


def resolve(spec: str, preset: str, settings: Sequence[str], flags: Mapping[str, Any]) -> Probe:
    """One configuration; the arguments are as those of `experiments`."""
    name, *own = spec.split(":")
    check_choice("--core", name, _cores())
    default = read_yaml(PROBE / "default.yaml")
    of_preset = {} if not preset else read_yaml(PROBE / "preset" / f"{preset}.yaml")
    user = [
        ("--set", parse_settings(settings)),
        ("", {key: value for key, value in flags.items() if value is not None}),
        (f"--core {spec}", {f"core.{key}": value for key, value in parse_settings(own).items()}),
    ]
    size = default["size"]
    for values in (of_preset, *(values for _, values in user)):
        size = values.get("size", size)
    layers = [("default.yaml", default), (preset, of_preset), *_core_layers(name, str(size)), *user]
    known = [*default, *(f"core.{field.name}" for field in dataclasses.fields(core_config(name)))]
    result: Values = {}
    for source, values in layers:
        check_keys(values, known, source)
        result |= values
    return _build(name, result)


def core_for_swap(probe: Probe, name: str) -> Any:
    """The configuration of another core in the place of the one that was trained.

    Keys that both have are those of the trained one. None where the other core is not there, or has no such size.
    """
    if name not in _cores():
        return None
    try:
        other = resolve(name, "", [f"size={probe.size}"], {}).core
    except UserError:
        return None
    own, others = ({field.name for field in dataclasses.fields(config)} for config in (probe.core, other))
    return dataclasses.replace(other, **{key: getattr(probe.core, key) for key in own & others})


def as_values(probe: Probe) -> dict[str, Any]:
    """The whole configuration as nested plain values, for files and comparison."""
    return dataclasses.asdict(probe)


def preset_names() -> list[str]:
    """All files of `configs/probe/preset/`."""
    return sorted(path.stem for path in (PROBE / "preset").glob("*.yaml"))


def _members(presets: Sequence[str]) -> list[str]:
    """The presets with those that stand for several replaced by their members."""
    found: list[str] = []
    for preset in presets:
        if preset:
            check_choice("--preset", preset, preset_names())
        members = read_yaml(PROBE / "preset" / f"{preset}.yaml").get("presets") if preset else None
        found += [preset] if members is None else members
    return list(dict.fromkeys(found))


def _cores() -> list[str]:
    """Cores that have sizes for the probe."""
    return config_names("probe/core")


def _core_layers(name: str, size: str) -> list[tuple[str, Values]]:
    """The core's keys for the agent, its keys for the probe, and those at a size."""
    whole = read_yaml(config_file("core", name))
    agent = {key: value for key, value in whole.items() if key.startswith("core.")}
    del agent["core.name"]
    path = config_file("probe/core", name)
    probe = read_yaml(path)
    sizes = {key.split(".")[1] for key in probe if key.startswith("sizes.")}
    check_choice("size", size, sorted(sizes))
    prefix = f"sizes.{size}."
    of_size = {"core." + key.removeprefix(prefix): value for key, value in probe.items() if key.startswith(prefix)}
    own = {key: value for key, value in probe.items() if not key.startswith("sizes.")}
    return [(f"core {name}", agent), (str(path), own), (str(path), of_size)]


def _build(name: str, values: Values) -> Probe:
    parts: dict[str, Any] = {key: value for key, value in values.items() if "." not in key}
    for section, kind in (SECTIONS | {"core": core_config(name)}).items():
        own = {key.split(".")[1]: value for key, value in values.items() if key.startswith(f"{section}.")}
        parts[section] = build(kind, own, section)
    return build(Probe, parts | {"core_name": name}, "")
