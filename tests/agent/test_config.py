import dataclasses
import re
from pathlib import Path
from shutil import copytree

import pytest
from ruamel.yaml import YAML

from agent import config as configuration
from agent import schema
from agent.config import CONFIGS, differences, dump, load, may_change_on_resume, resolve
from agent.cores.core import registered_cores
from agent.errors import UserError

SIZES = {
    "1m": (512, 64, 4),
    "12m": (2048, 256, 16),
    "25m": (3072, 384, 24),
    "50m": (4096, 512, 32),
    "100m": (6144, 768, 48),
    "200m": (8192, 1024, 64),
    "400m": (12288, 1536, 96),
}


def walker(*settings, **flags):
    return resolve(**({"env": "dmc_walker", "size": "debug"} | flags), settings=settings)


def write(folder: Path, text: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(text)
    return path


def one_line_error(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_published_presets(name):
    config = walker(size=name)
    deter, width, classes = SIZES[name]
    assert (config.size, config.core.deter, config.core.blocks) == (name, deter, 8)
    assert (config.core.hidden, config.rssm.hidden, config.heads.units) == (width, width, width)
    assert (config.rssm.stoch, config.rssm.classes) == (32, classes)


@pytest.mark.parametrize("core", configuration.config_names("core"))
@pytest.mark.parametrize("size", configuration.config_names("size"))
def test_every_core_has_every_size_and_survives_a_file(core, size, tmp_path):
    config = walker(core=core, size=size)
    path = write(tmp_path, dump(config))
    assert load(path) == config
    assert isinstance(config.core, registered_cores()[core].Config)
    assert config.core.name == core


@pytest.mark.parametrize("core", configuration.config_names("core"))
def test_the_posterior_suits_the_core_unless_the_user_says_otherwise(core):
    parallel = registered_cores()[core].parallel_in_time
    assert walker(core=core).rssm.posterior == ("observation" if parallel else "recurrent")
    for posterior in ("observation", "recurrent"):
        assert walker(f"rssm.posterior={posterior}", core=core).rssm.posterior == posterior


def test_a_core_file_may_choose_its_posterior(tmp_path, monkeypatch):
    copytree(CONFIGS, tmp_path / "configs")
    file = tmp_path / "configs" / "core" / "gru.yaml"
    text = file.read_text()
    assert "posterior: recurrent" in text
    file.write_text(text.replace("posterior: recurrent", "posterior: observation"))
    monkeypatch.setattr(configuration, "CONFIGS", tmp_path / "configs")
    assert walker().rssm.posterior == "observation"
    assert walker("rssm.posterior=recurrent").rssm.posterior == "recurrent"
    assert walker(file=write(tmp_path, "rssm: {posterior: recurrent}")).rssm.posterior == "recurrent"


def test_every_registered_core_has_a_file():
    assert set(configuration.config_names("core")) == {
        name for name, core in registered_cores().items() if core.__module__.startswith("agent.")
    }


def test_debug_size():
    config = walker()
    assert (config.core.deter, config.core.hidden, config.core.blocks) == (32, 16, 4)
    assert (config.rssm.stoch, config.rssm.classes, config.heads.units) == (4, 4, 16)
    assert (config.train.batch_size, config.train.batch_length) == (4, 8)
    assert (config.behavior.imagination_horizon, config.replay.prefill) == (5, 64)


def test_presets():
    config = walker(size="1m")
    assert (config.env.name, config.env.action_repeat, config.train.ratio) == ("dmc_walker_walk", 2, 512)
    assert resolve("dmc_cartpole_swingup", size="debug").env.action_repeat == 2
    gym = resolve("gym_CartPole-v1", size="debug")
    assert (gym.env.name, gym.env.action_repeat, gym.env.parallel) == ("gym_CartPole-v1", 1, False)
    assert resolve("gym_package.module:Own-v0", size="debug").env.name == "gym_package.module:Own-v0"


def test_a_preset_may_take_the_settings_of_another_suite(tmp_path, monkeypatch):
    masked, walking, tokens = (
        resolve(name, size="tiny") for name in ("probe_masked_walker_easy", "dmc_walker", "probe_count_easy")
    )
    assert masked.env.name == "probe_masked_walker_easy"
    for part in ("loss", "optimizer", "behavior", "train", "rssm"):
        assert getattr(masked, part) == getattr(walking, part) != getattr(tokens, part)
    assert resolve("popgym_RepeatPreviousEasy", size="tiny").behavior == tokens.behavior
    copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(configuration, "CONFIGS", tmp_path / "configs")
    file = tmp_path / "configs" / "env" / "probe_masked_walker_easy.yaml"
    file.write_text(file.read_text().replace("settings_of: dmc", "settings_of: dcm"))
    message = one_line_error(lambda: resolve("probe_masked_walker_easy", size="debug"))
    assert "settings_of" in message and "dcm" in message and "dmc" in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # frames, environments, repeat, ratio
        ("dmc_walker_vision", (1_000_000, 4, 2, 512)),
        ("dmc_cheetah_run_vision", (500_000, 4, 2, 512)),
        ("atari100k_pong", (400_000, 1, 4, 128)),
        ("atari_pong", (200_000_000, 16, 4, 32)),
        ("crafter_reward", (1_000_000, 1, 1, 512)),
        ("memorymaze_9x9", (100_000_000, 8, 1, 64)),
    ],
)
def test_presets_hold_the_published_protocols(name, expected):
    config = resolve(name, size="1m", device="cpu")
    assert (config.steps, config.env.amount, config.env.action_repeat, config.train.ratio) == expected


def test_later_layers_win(tmp_path, monkeypatch):
    layers = ["default.yaml", "env/dmc.yaml", "env/dmc_walker.yaml", "size/debug.yaml", "core/gru.yaml"]
    for count in range(1, len(layers) + 1):
        folder = tmp_path / str(count)
        for source in CONFIGS.rglob("*.yaml"):
            name = str(source.relative_to(CONFIGS))
            values = YAML(typ="safe", pure=True).load(source)
            if name in layers:
                values.pop("seed", None)
            if name in layers[:count]:
                values["seed"] = layers.index(name)
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            YAML().dump(values, target)
        monkeypatch.setattr(configuration, "CONFIGS", folder)
        assert walker().seed == count - 1
    own = write(tmp_path, "seed: 5\n")
    assert walker(file=own).seed == 5
    assert walker("seed=6", file=own).seed == 6
    assert walker("seed=6", "seed=7", file=own).seed == 7
    assert walker("seed=6", file=own, seed=8).seed == 8


def test_core_file_is_laid_over_the_size_and_the_users_over_both(tmp_path):
    own = write(tmp_path, "core: {deter: 64}\nheads: {units: 8}\n")
    config = walker(file=own)
    assert (config.core.deter, config.core.hidden, config.heads.units, config.rssm.hidden) == (64, 16, 8, 16)


def test_a_file_may_make_every_choice(tmp_path):
    own = write(tmp_path, "env: {name: dmc_walker}\ncore: {name: gru}\nsize: 25m\ndevice: cpu\n")
    config = resolve(file=own)
    assert (config.env.name, config.env.action_repeat) == ("dmc_walker_walk", 2)
    assert (config.size, config.core.deter, config.device) == ("25m", 3072, "cpu")
    assert resolve(file=own, size="1m").core.deter == 512
    assert resolve(file=own, settings=["size=12m", "env.name=gym_CartPole-v1"]).env.action_repeat == 1


@pytest.mark.parametrize(
    ("cuda", "device", "size"),
    [
        (True, "auto", "wide"),
        (False, "auto", "1m"),
        (True, "cpu", "1m"),
        (True, "cuda", "wide"),
    ],
)
def test_auto_size_follows_the_device_and_says_so(cuda, device, size, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    told: list[str] = []
    config = resolve("dmc_walker", device=device, notify=told.append)
    assert (config.size, config.device) == (size, device)
    assert len(told) == 1
    assert size in told[0]


def test_a_mistake_comes_without_the_auto_size():
    told: list[str] = []
    with pytest.raises(UserError):
        resolve("dmc_walker", settings=["rssm.unimx=1"], notify=told.append)
    assert told == []


def test_a_chosen_size_is_not_told():
    told: list[str] = []
    resolve("dmc_walker", size="1m", notify=told.append)
    assert told == []


def test_values_are_yaml():
    config = walker("steps=5e5", "env.time_limit=100", "train.ratio=0.5", "loss.reward=2", "log.tensorboard=false")
    assert config.steps == 500_000
    assert isinstance(config.steps, int)
    assert config.env.time_limit == 100
    assert walker("env.time_limit=null").env.time_limit is None
    assert (config.train.ratio, config.loss.reward, config.log.tensorboard) == (0.5, 2.0, False)
    assert walker("rssm={stoch: 3, unimix: 0}").rssm.stoch == 3


BAD_SETTINGS = [
    # setting, what the message must contain
    ("rssm.unimx=0.1", "rssm.unimx", "rssm.unimix"),
    ("unimix=0.1", "unimix", "rssm.unimix"),
    ("optimiser.lr=1e-3", "optimiser.lr", "optimizer.lr"),
    ("core.detr=64", "core.detr", "core.deter"),
    ("seed.more=1", "seed.more", "seed"),
    ("foo={}", "foo", "nearest"),
    ("rssm=3", "rssm", "section"),
    ("core=gru", "core", "core.name"),
    ("env=dmc_walker", "env", "env."),
    ("rssm.unimix=1.5", "rssm.unimix", "1.5", "less than 1"),
    ("rssm.unimix='0.1'", "rssm.unimix", '"0.1"', "number"),
    ("rssm.stoch=true", "rssm.stoch", "true", "integer"),
    ("rssm.stoch=1.5", "rssm.stoch", "1.5", "integer"),
    ("rssm.stoch='4'", "rssm.stoch", '"4"', "integer"),
    ("rssm.posterior=both", "rssm.posterior", "both", "recurrent", "observation"),
    ("loss.reward=false", "loss.reward", "false", "number"),
    ("loss.reward=-1", "loss.reward", "-1", "greater than or equal to 0"),
    ("optimizer.lr=.nan", "optimizer.lr", "finite"),
    ("optimizer.lr=.inf", "optimizer.lr", "finite"),
    ("optimizer.lr=0", "optimizer.lr", "0", "greater than 0"),
    ("optimizer.lr=2026-01-01", "optimizer.lr", "2026-01-01", "number"),
    ("env.parallel=1", "env.parallel", "1", "boolean"),
    ("env.parallel=yes", "env.parallel", '"yes"', "boolean"),
    ("env.amount=0", "env.amount", "0", "greater than 0"),
    ("env.time_limit=soon", "env.time_limit", "soon", "integer"),
    ("env.amount=[1, 2]", "env.amount", "[1, 2]", "integer"),
    ("env.amount=", "env.amount", "null", "integer"),
    ("steps=many", "steps", "many", "integer"),
    ("steps=0.5", "steps", "0.5", "integer"),
    ("seed=-1", "seed", "-1", "greater than or equal to 0"),
    ("device=tpu", "device", "tpu", "'cpu'", "'cuda'"),
    ("compile=fast", "compile", "fast", "eager"),
    ("precision=fp16", "precision", "fp16", "bf16"),
    ("train.ratio=0", "train.ratio", "0", "greater than 0"),
    ("train.ratio=true", "train.ratio", "true"),
    ("train.ratio=.inf", "train.ratio", "finite"),
    ("heads.bins=4", "heads.bins", "4", "odd"),
    ("core.deter=33", "core", "33"),
    ("core.deter=wide", "core.deter", "wide", "integer"),
    ("replay.capacity=71", "replay.capacity", "71", "72"),
    ("replay.prefill=0", "replay.prefill", "0", "greater than 0"),
    ("replay.prefill=1000001", "replay.prefill", "1000001", "1000000"),
    ("behavior.return_low=95", "behavior.return_low", "95", "behavior.return_high"),
    ("behavior.imagination_starts=1", "behavior.imagination_starts", "1", "equal to 2"),
    ("behavior.imagination_starts=9", "behavior.imagination_starts", "9", "batch_length", "8"),
    ("behavior.return_high=101", "behavior.return_high", "101", "100"),
    ("checkpoint.keep=0", "checkpoint.keep", "0", "greater than 0"),
    ("size=13m", "size", "13m", "12m", "debug"),
    ("size=1", "size", "1", "choices"),
    ("core.name=grru", "core.name", "grru", "gru"),
    ("env.name=dcm_walker", "env.name", "dcm_walker", "dmc_walker"),
    ("env.name=dmc_", "env.name", "dmc_"),
    ("env.name=3", "env.name", "3"),
    ("rssm.unimix", "--set", "rssm.unimix", "key=value"),
    ("=3", "--set", "key=value"),
    ("rssm.unimix={", "rssm.unimix", "YAML"),
    ("a\nb=1", "a b"),
    ("rssm.posterior='a\n\n  b'", "rssm.posterior"),
]


@pytest.mark.parametrize(("setting", "expected"), [(setting, rest) for setting, *rest in BAD_SETTINGS])
def test_bad_settings_are_told_in_one_line(setting, expected):
    message = one_line_error(
        lambda: walker(
            setting,
            env=None if "env.name" in setting else "dmc_walker",
            size=None if "size" in setting else "debug",
        )
    )
    for part in expected:
        assert part in message


BAD_FILES = [
    ("seed: 1\nrssm:\n  unimx: 0.1\n", "rssm.unimx", "rssm.unimix"),
    ("seed: 1\nseed: 2\n", "line 2", "duplicate"),
    ("rssm:\n  unimix: 0.1\n  unimix: 0.2\n", "line 3", "duplicate"),
    ("seed: 1\nrssm: [1\n", "line"),
    ("seed: 1\n\tsteps: 3\n", "line 2"),
    ("a: &a\n  b: *a\n", "YAML"),
    ("seed: !python/object:os.system x\n", "line 1"),
    ("- seed\n", "key: value"),
    ("just words\n", "key: value"),
    ("rssm:\n", "rssm", "section"),
]


@pytest.mark.parametrize(("text", "expected"), [(text, rest) for text, *rest in BAD_FILES])
def test_bad_files_are_told_in_one_line_with_their_name(text, expected, tmp_path):
    path = write(tmp_path, text)
    message = one_line_error(lambda: walker(file=path))
    for part in ("own.yaml", *expected):
        assert part in message


def test_unreadable_files(tmp_path):
    assert "missing.yaml" in one_line_error(lambda: walker(file=tmp_path / "missing.yaml"))
    assert str(tmp_path) in one_line_error(lambda: walker(file=tmp_path))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    assert "binary.yaml" in one_line_error(lambda: walker(file=binary))


def test_an_empty_file_changes_nothing(tmp_path):
    assert walker(file=write(tmp_path, "# nothing\n")) == walker()


def test_a_missing_environment_is_asked_for():
    message = one_line_error(lambda: resolve(size="debug"))
    assert "env.name" in message
    assert "--env" in message


def test_small_replay_is_measured_for_all_environments():
    assert walker("replay.capacity=72", "env.amount=4", "replay.prefill=64").replay.capacity == 72
    assert "144" in one_line_error(lambda: walker("replay.capacity=72", "env.amount=8", "replay.prefill=64"))


def test_load_wants_every_key(tmp_path):
    text = dump(walker())
    path = write(tmp_path, re.sub(r"\n  deter: .*", "", text))
    assert "core.deter is missing" in one_line_error(lambda: load(path))
    path = write(tmp_path, re.sub(r"\n  name: gru", "", text))
    assert "core.name" in one_line_error(lambda: load(path))
    path = write(tmp_path, text + "more: 1\n")
    assert "more" in one_line_error(lambda: load(path))


def test_options_of_an_environment_are_open_and_survive_a_file(tmp_path):
    asked = ["env.options.gap=2", "env.options={slots: 8}", "env.options.gap=4"]
    config = resolve("probe_noisy_recall_easy", size="debug", settings=asked)
    assert config.env.options == {"gap": 4, "slots": 8}
    assert load(write(tmp_path, dump(config))) == config
    assert walker().env.options == {}
    plain = resolve("probe_noisy_recall_easy", size="debug")
    assert sorted(differences(plain, config))[-2:] == [("env.options.gap", None, 4), ("env.options.slots", None, 8)]
    assert "env.options: 3 is not allowed" in one_line_error(lambda: walker("env.options=3"))
    assert "unknown key env.option.gap" in one_line_error(lambda: walker("env.option.gap=3"))


def test_differences_name_keys_and_both_values():
    a, b = walker(), walker("rssm.unimix=0.5", "log.every=5", seed=3)
    assert differences(a, a) == []
    assert sorted(differences(a, b)) == [("log.every", 1000, 5), ("rssm.unimix", 0.01, 0.5), ("seed", 0, 3)]


def test_what_may_change_on_resume():
    keys = {key for key, _ in configuration._flatten(configuration._nested(walker()))}
    assert {key for key in keys if may_change_on_resume(key)} == {
        "steps",
        "device",
        "compile",
        "deterministic",
        "log.every",
        "log.tensorboard",
        "log.open_loop_every",
        "checkpoint.minutes",
        "checkpoint.keep",
        "train.max_skipped",
        "env.timeout",
        "env.restarts",
    }


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        walker().rssm.stoch = 3


def test_default_file_has_every_key_with_a_comment():
    lines = (CONFIGS / "default.yaml").read_text().splitlines()
    known = set(configuration._known_keys("gru")) - {"core.deter", "core.hidden", "core.blocks"}
    found, section = set(), ""
    for line in lines:
        match = re.fullmatch(r"(  )?(?:# )?(\w+)(:?)(?: *([^#]*?))? *(#.*)?", line)
        if match is None or line.startswith("#"):
            continue
        indent, key, _, value, comment = match.groups()
        if not indent and not value and not comment:
            section = f"{key}."
            continue
        assert comment, f"no comment: {line}"
        found.add(f"{section}{key}" if indent else key)
    assert found == known


def test_no_default_is_kept_twice():
    assert not [
        field.name
        for section in [schema.Config, *configuration.SECTIONS.values()]
        for field in dataclasses.fields(section)
        if field.default is not dataclasses.MISSING
    ]
