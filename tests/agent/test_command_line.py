import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent.command_line import FLAGS, config_from_arguments, make_parser, run_main
from agent.errors import UserError
from envs.errors import EnvError

ROOT = Path(__file__).parents[2]


def parse(*words: str):
    return make_parser("Trains.", ["python train.py --env dmc_walker"]).parse_args(list(words))


def test_flags_reach_the_config(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("seed: 1\nlog: {every: 50}\n")
    config = config_from_arguments(
        parse(
            *("--env", "dmc_walker", "--core", "gru", "--size", "debug", "--steps", "5e5", "--seed", "7"),
            *("--device", "cpu", "--config", str(own), "--set", "rssm.stoch=3", "loss.reward=2"),
            *("--set", "train.ratio=64"),
        )
    )
    assert (config.env.name, config.core.name, config.size) == ("dmc_walker_walk", "gru", "debug")
    assert (config.steps, config.seed, config.device, config.log.every) == (500_000, 7, "cpu", 50)
    assert (config.rssm.stoch, config.loss.reward, config.train.ratio) == (3, 2.0, 64)


def test_flags_that_are_not_given_leave_the_file_alone():
    config = config_from_arguments(parse("--env", "dmc_walker", "--size", "debug", "--set"))
    assert (config.steps, config.seed, config.device) == (500_000, 0, "auto")


def test_a_script_may_have_some_of_the_flags():
    parser = make_parser("Checks.", ["python check.py"], ("env", "set"))
    config = config_from_arguments(parser.parse_args(["--env", "dmc_walker", "--set", "size=debug"]))
    assert config.size == "debug"
    with pytest.raises(SystemExit):
        parser.parse_args(["--steps", "3"])


def test_auto_size_is_told_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config_from_arguments(parse("--env", "dmc_walker"))
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"1m.*auto.*cpu", err)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--steps", "many"], "steps"),
        (["--steps", "-5"], "steps"),
        (["--seed", "1.5"], "seed"),
        (["--seed", "["], "--seed"),
        (["--device", "tpu"], "device"),
    ],
)
def test_bad_flags(words, named):
    with pytest.raises(UserError, match=named) as caught:
        config_from_arguments(parse("--env", "dmc_walker", "--size", "debug", *words))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("words", [["--sede", "3"], ["--steps"], ["surprise"]])
def test_what_the_parser_refuses_is_one_line(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_help_names_every_flag_and_shows_the_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(f"--{flag} " in out for flag in FLAGS)
    assert "  python train.py --env dmc_walker\n" in out


def test_help_does_not_wait_for_torch():
    code = "import sys, agent.command_line as c; c.make_parser('x', []); sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.parametrize("kind", [UserError, EnvError])
def test_a_mistake_of_the_user_ends_with_its_message_and_status_2(kind, capsys):
    def main():
        raise kind("seed: wrong")

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(": seed: wrong\n")
    assert len(err.splitlines()) == 1


def test_success_is_status_0_and_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: None)
    assert caught.value.code == 0
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: print(1 / 0))
