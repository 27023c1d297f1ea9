"""The configuration: YAML files and command-line values, overlaid and validated."""

import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from difflib import SequenceMatcher
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.dataclasses import dataclass
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from agent.errors import UserError
from agent.schema import STRICT, Config

CONFIGS = Path(__file__).parent.parent / "configs"
EXTENSIONS = ("dreamer_that_remembers.envs", "dreamer_that_remembers.cores")
"""The groups of entry points of packages that add environments or cores; their folders `configs` are read too."""

SECTIONS: dict[str, type[Any]] = {
    field.name: field.type
    for field in dataclasses.fields(Config)
    if isinstance(field.type, type) and dataclasses.is_dataclass(field.type)
}
OPEN = "env.options"
"""The key under which any further key may stand: what is right there, the environment knows."""
CHANGEABLE = (
    "steps", "device", "compile", "deterministic", "log", "checkpoint", "train.max_skipped", "env.timeout",
    "env.restarts",
)  # fmt: skip
"""The keys and sections that may differ when a run is resumed."""

Values = dict[str, Any]
"""Settings by dotted key, as in `{"rssm.unimix": 0.01}`."""


def resolve(
    env: str | None = None,
    core: str | None = None,
    size: str | None = None,
    *,
    device: str | None = None,
    steps: Any = None,
    seed: Any = None,
    settings: Sequence[str] = (),
    file: Path | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Config:
    """The configuration that the files of `configs/`, the user's own file and the command line give together.

    Args:
        env: a preset of `configs/env/` or a full name; None leaves this choice, as any other, to the files.
        core: a file of `configs/core/`.
        size: a file of `configs/size/`, or "auto".
        device: "auto", "cpu" or "cuda".
        steps: length of training in environment frames.
        seed: the seed.
        settings: "key=value" with a dotted key and a value in YAML.
        file: the user's own YAML file.
        notify: told in one line which size "auto" stands for.

    Raises:
        UserError: something is missing, unknown or not allowed.
    """
    default = read_yaml(CONFIGS / "default.yaml")
    flags = {"env.name": env, "core.name": core, "size": size, "device": device, "steps": steps, "seed": seed}
    own = [
        ("" if file is None else str(file), {} if file is None else read_yaml(file)),
        ("--set", parse_settings(settings)),
        ("", {key: value for key, value in flags.items() if value is not None}),
    ]
    env_name = _last("env.name", default, *(values for _, values in own))
    env_layers = _env_layers(env_name)
    below = [default] + [values for _, values in env_layers + own]

    core_name = _last("core.name", *below)
    check_choice("core.name", core_name, config_names("core"))
    size_name = _last("size", *below)
    check_choice("size", size_name, [*config_names("size"), "auto"])
    news: list[str] = []
    if size_name == "auto":
        device_name = _device(_last("device", *below))
        size_name = "wide" if device_name == "cuda" else "1m"
        news = [f"size: {size_name}, as auto chooses on {device_name}"]
    size_layer = (f"size {size_name}", read_yaml(config_file("size", size_name)))
    core_layer = (f"core {core_name}", _read_core(core_name, size_name))

    chosen = {"env.name": env_name, "core.name": core_name, "size": size_name}
    for _, values in env_layers:
        chosen |= {key: value for key, value in values.items() if key == "env.name"}
    known = _known_keys(core_name)
    result: Values = {}
    for source, values in [
        ("default.yaml", default),
        *env_layers,
        size_layer,
        core_layer,
        *own,
        ("", chosen),
    ]:
        check_keys(values, known, source)
        result |= values
    config = _validate(result)
    for line in news:  # only now: a mistake is told in one line and nothing else
        notify(line)
    return config


def load(path: Path) -> Config:
    """The configuration that `dump` wrote to a file.

    Raises:
        UserError: the file is missing or is no complete, valid configuration.
    """
    values = read_yaml(path)
    name = values.get("core.name")
    check_choice(f"{path}: core.name", name, _core_names())
    check_keys(values, _known_keys(str(name)), str(path))
    try:
        return _validate(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def dump(config: Config) -> str:
    """The whole configuration as YAML text; `load` gives an equal one back."""
    yaml = YAML()
    text = io.StringIO()
    yaml.dump(_nested(config), text)
    return text.getvalue()


def differences(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """The dotted keys whose values differ, with both values; a key that one side lacks is None there."""
    left, right = flat(a), flat(b)
    pairs = [(key, left.get(key), right.get(key)) for key in left | right]
    return [pair for pair in pairs if pair[1] != pair[2]]


def flat(config: Config) -> Values:
    """All settings by dotted key."""
    return dict(_flatten(_nested(config)))


def may_change_on_resume(key: str) -> bool:
    """Whether a run may go on with another value of this dotted key."""
    return key in CHANGEABLE or key.split(".")[0] in CHANGEABLE


def parse_value(text: str, name: str) -> Any:
    """A value written in YAML, as on the command line; `name` is what an error calls it."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: {_shown(text)} is not valid YAML ({_problem(error)})") from None


def parse_settings(settings: Sequence[str], flag: str = "--set") -> Values:
    """The values of "key=value" texts, by dotted key; `flag` is what an error calls them."""
    values: Values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{flag} {_line(setting)}: write it as key=value, for example rssm.unimix=0.01")
        values |= _flatten({key.strip(): parse_value(text, f"{flag} {_line(key)}")})
    return values


def read_yaml(path: Path) -> Values:
    """The settings of a YAML file, by dotted key."""
    try:
        content = _parsed(path.read_text(encoding="utf-8"))
        if not isinstance(content, Mapping | None):
            raise UserError(f"{path}: this is not a configuration; it should consist of lines `key: value`")
        return deepcopy(dict(_flatten(content or {})))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}{_place(error)}: this is not valid YAML ({_problem(error)})") from None


@cache  # a suite resolves hundreds of configurations, from the same few files
def _parsed(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def _place(error: Exception) -> str:
    mark = error.problem_mark or error.context_mark if isinstance(error, MarkedYAMLError) else None
    return "" if mark is None else f", line {mark.line + 1}"


def _problem(error: Exception) -> str:
    return _line(error.problem if isinstance(error, MarkedYAMLError) and error.problem else str(error))


def _read_core(name: str, size: str) -> Values:
    """The settings of a core's file, with those for the chosen size laid over them."""
    values = read_yaml(config_file("core", name))
    sizes: dict[str, Values] = {}
    for key in [key for key in values if key.startswith("sizes.")]:
        _, of_size, *core_key = key.split(".")
        of_core = sizes.setdefault(of_size, {})
        value = values.pop(key)
        if core_key:  # a size may also say nothing, as in `1m: {}`
            of_core[".".join(["core", *core_key])] = value
    if size not in sizes:
        raise UserError(f"size: {size} is not one of core {name}'s; choose from {', '.join(sizes)}")
    return values | sizes[size]


def config_names(kind: str) -> list[str]:
    """The names of all files of a kind, as `core`: those of `configs/<kind>/`, and those of installed packages."""
    return sorted({path.stem for folder in _folders() for path in (folder / kind).glob("*.yaml")})


def config_file(kind: str, name: str) -> Path:
    """The file of that kind and name; ours, should a package have one of the same name."""
    files = [folder / kind / f"{name}.yaml" for folder in _folders()]
    return next((file for file in files if file.exists()), files[0])


def _folders() -> list[Path]:
    """`configs/`, and the folder of that name in every installed package that adds environments or cores."""
    specs = [find_spec(entry.module.partition(".")[0]) for entry in _extensions(tuple(sys.path))]
    places = [place for spec in specs if spec for place in spec.submodule_search_locations or ()]
    return list(dict.fromkeys([CONFIGS, *(Path(place) / "configs" for place in places)]))


@cache  # as above: to look through what is installed takes longer than all the rest
def _extensions(path: tuple[str, ...]) -> list[EntryPoint]:
    """The entry points of installed packages that add environments or cores; `path` is where modules are found."""
    return [entry for group in EXTENSIONS for entry in entry_points(group=group)]


def _env_layers(name: Any) -> list[tuple[str, Values]]:
    """The settings of the suite's file and, where `name` is a preset, the preset's, which may say `settings_of`.

    That is another suite whose file comes below it, where what is to be learned is more like what is learned there.
    """
    known = config_names("env")
    presets = [preset for preset in known if "_" in preset]
    # A suite that needs no settings has no file.
    added = {entry.name for entry in _extensions(tuple(sys.path)) if entry.group == EXTENSIONS[0]}
    suites = sorted({suite for suite in known if "_" not in suite} | added)
    if name is None:
        raise UserError(f"env.name is missing; give one with --env, for example --env {presets[0]}")
    suite, _, rest = name.partition("_") if isinstance(name, str) else ("", "", "")
    if suite not in suites or not rest:
        forms = ", ".join(f"{suite}_..." for suite in suites)
        raise UserError(
            f"env.name: {_shown(name)} is unknown; the nearest preset is {_nearest(str(name), presets)}, "
            f"other names look like {forms}"
        )
    preset = config_file("env", name)
    own = read_yaml(preset) if name in known else {}
    suite = own.pop("settings_of", suite)
    check_choice(f"{preset}: settings_of", suite, suites)
    below = config_file("env", suite)
    return [(str(below), read_yaml(below) if suite in known else {}), (str(preset), own)]


def _last(key: str, *layers: Values) -> Any:
    """The value that the last layer to have one gives."""
    return next((layer[key] for layer in reversed(layers) if layer.get(key) is not None), None)


def _device(name: Any) -> str:
    """The device to run on: "cpu" or "cuda"."""
    import torch  # takes seconds, which --help should not

    cuda = torch.cuda.is_available()
    return ("cuda" if cuda else "cpu") if name == "auto" else str(name)


def check_choice(key: str, value: Any, choices: Sequence[str]) -> None:
    """Raise UserError, which tells the choices, unless the value is one of them."""
    if value not in choices:
        nearest, known = _nearest(str(value), choices), ", ".join(choices)
        raise UserError(f"{key}: {_shown(value)} is unknown; the nearest is {nearest}, the choices are {known}")


def check_keys(values: Values, known: Sequence[str], source: str) -> None:
    """Raise UserError, which tells the nearest known one, for a dotted key that is none."""
    sections = {key.split(".")[0] for key in known if "." in key}
    for key in values:
        if key in sections:
            raise UserError(f"{source}: {key} is a section; set its keys, as in {_nearest(key + '.', known)}")
        if key not in known and not key.startswith(f"{OPEN}."):
            raise UserError(f"{source}: unknown key {_line(key)}; the nearest is {_nearest(key, known)}")


def _nearest(word: str, choices: Sequence[str]) -> str:
    """The choice most like `word`, as a whole or in what follows its last dot."""

    def likeness(choice: str) -> float:
        pairs = ((word, choice), (word.split(".")[-1], choice.split(".")[-1]))
        return max(SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(choices, key=likeness)


def _core_names() -> list[str]:
    from agent.cores.core import registered_cores  # imports torch, which --help should not

    return sorted({*config_names("core"), *registered_cores()})


def core_config(name: str) -> type[Any]:
    """The class of a core's own keys.

    Raises:
        UserError: there is no such core, or it cannot be imported.
    """
    from agent.cores.core import core_class

    try:
        return core_class(name).Config
    except KeyError:
        raise UserError(f"core {name} has a file and no class; register one, or name it in an entry point") from None
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"core {name} cannot be imported: {_line(str(error))}") from None


@cache
def _core_section(name: str) -> type[Any]:
    """The core's own `Config` with the key `name`."""
    base: Any = core_config(name)

    @dataclass(frozen=True, config=STRICT, kw_only=True)
    class Core(base):
        name: str

        def __reduce__(self) -> tuple[Any, ...]:  # by its name, as another process cannot import a class made here
            return _core_of, (dataclasses.asdict(self),)

    return Core


def _core_of(values: Values) -> Any:
    return _core_section(values["name"])(**values)


def _known_keys(core: str) -> list[str]:
    sections = SECTIONS | {"core": _core_section(core)}
    top = [field.name for field in dataclasses.fields(Config) if field.name not in sections]
    return top + [f"{name}.{field.name}" for name in sections for field in dataclasses.fields(sections[name])]


def _validate(values: Values) -> Config:
    """The configuration of these settings, whose keys are all known."""
    parts: dict[str, Any] = {}
    inner = {key.removeprefix(f"{OPEN}."): value for key, value in values.items() if key.startswith(f"{OPEN}.")}
    if inner:
        outer = {key: value for key, value in values.items() if not key.startswith(f"{OPEN}.")}
        values = outer | {OPEN: inner}
    for name, section in (SECTIONS | {"core": _core_section(values["core.name"])}).items():
        own = {key.split(".")[1]: value for key, value in values.items() if key.startswith(f"{name}.")}
        parts[name] = build(section, own, name)
    return build(Config, parts | {key: value for key, value in values.items() if "." not in key}, "")


def build(section: type[Any], values: Values, name: str) -> Any:
    """The section of these values; an error in words calls it `name`."""
    try:
        return section(**values)
    except ValidationError as error:
        first = error.errors()[0]
    key = ".".join(str(part) for part in (name, *first["loc"][:1]) if part)
    if first["type"] == "missing":
        raise UserError(f"{key} is missing; give it a value in the file or with --set {key}=...")
    if first["type"] in ("value_error", "assertion_error"):
        shown = f"{_shown(first['input'])} is not allowed, " if first["loc"] else ""
        raise UserError(f"{key}: {shown}{_line(str(first['ctx']['error']))}")
    raise UserError(f"{key}: {_shown(first['input'])} is not allowed, {_line(first['msg']).replace('Input', 'it', 1)}")


def _nested(config: Config) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    values["core"] = {"name": config.core.name} | values["core"]
    return values


def _flatten(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _line(text: str) -> str:
    """A text on one line of a terminal, with escapes for what does not print."""
    line = " ".join(text.split())
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def _shown(value: Any) -> str:
    """A value as the user may have written it, on one line."""
    try:
        return _line(json.dumps(value, default=str, ensure_ascii=False))
    except (ValueError, TypeError, RecursionError):  # one that holds itself, or keys that JSON has not
        return _line(repr(value))
