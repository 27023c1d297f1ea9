"""Mistakes that users make, over all scripts: what they type, what lies on the disk, and what the answer must say."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Bad(NamedTuple):
    """A script, its arguments, and the words that its one line must have.

    In arguments and files `{here}` is an empty folder, `{run}` a finished run of the environment Chase, `{same}` its
    settings, and `{file}` a file with a word in it.
    """

    script: str
    words: str
    says: tuple[str, ...]
    files: Mapping[str, Any] = MappingProxyType({})  # by path, what is written first; None removes what matches
    hidden: tuple[str, ...] = ()  # packages that are not installed


CHASE = "--env gym_chase:Chase-v0 --size debug --device cpu"
RUN = f"{CHASE} --logdir {{run}} --steps 40 --set {{same}}"
NEW = f"{CHASE} --logdir {{here}}/new --steps 40"
DIR = "--logdir {run}"

TRAIN = [
    # flags
    Bad("train_agent", f"{NEW} --sede 3", ("--sede", "--seed")),
    Bad("train_agent", f"{NEW} --steps", ("--steps", "expected one argument")),
    Bad("train_agent", f"{NEW} surprise", ("surprise",)),
    Bad("train_agent", f"{NEW} --env= ", ("env.name", "dmc_walker")),
    Bad("train_agent", "--size debug", ("env.name is missing", "--env dmc_walker")),
    Bad("train_agent", f"{NEW} --steps many", ("steps", '"many"', "integer")),
    Bad("train_agent", f"{NEW} --steps -5", ("steps", "-5")),
    Bad("train_agent", f"{NEW} --steps .inf", ("steps", "integer")),
    Bad("train_agent", f"{NEW} --steps 1e400", ("steps",)),
    Bad("train_agent", f"{NEW} --seed 1.5", ("seed", "1.5", "integer")),
    Bad("train_agent", f"{NEW} --seed 4294967296", ("seed", "4294967296")),
    Bad("train_agent", f"{NEW} --seed [", ("--seed", "YAML")),
    Bad("train_agent", f"{NEW} --seeds 0,one", ("--seeds 0,one", "0,1,2")),
    Bad("train_agent", f"{NEW} --seeds 0,1,0", ("--seeds", "0 is given twice")),
    Bad("train_agent", f"{NEW} --core gru,mlstm,gru", ("--core", "gru is given twice")),
    Bad("train_agent", f"{NEW} --core gru,mlsm --seeds 0,1", ("core.name", "mlsm", "mlstm")),
    Bad("train_agent", f"{NEW} --parallel 2", ("--parallel", "--seeds 0,1,2")),
    Bad("train_agent", f"{NEW} --seeds 0,1 --parallel 0", ("--parallel 0", "1 or more")),
    Bad("train_agent", f"{NEW} --seeds 0,1 --seed 2", ("--seed", "--seeds", "leave out")),
    Bad("train_agent", f"{NEW} --device tpu", ("device", "tpu", "'cuda'")),
    Bad("train_agent", f"{NEW} --device cuda", ("device", "cuda", "--device cpu")),
    Bad("train_agent", f"{NEW} --core grru", ("core.name", "grru", "nearest is gru")),
    Bad("train_agent", f"{NEW} --core ../gru", ("core.name", "../gru")),
    Bad("train_agent", f"{NEW} --size 13m", ("size", "13m", "nearest is 1", "debug")),
    Bad("train_agent", f"{NEW} --size ../env/dmc", ("size", "../env/dmc")),
    # environments
    Bad("train_agent", f"{NEW} --env dmc_walker_wolk", ("dmc_walker_wolk", "dmc_walker_walk")),
    Bad("train_agent", f"{NEW} --env dmc_walker_wolk --set env.parallel=false", ("did you mean dmc_walker_walk",)),
    Bad("train_agent", "--env dmc_walker_wolk --device cpu --logdir {here}/new", ("did you mean dmc_walker_walk",)),
    Bad("train_agent", f"{NEW} --env dcm_walker", ("dcm_walker", "dmc_walker")),
    Bad("train_agent", f"{NEW} --env gym_CartPoll-v1", ("gym_CartPoll-v1", "gym_CartPole-v1")),
    Bad("train_agent", f"{NEW} --env gym_CartPole-v9", ("gym_CartPole-v9", "gym_CartPole-v1")),
    Bad("train_agent", f"{NEW} --env gym_no_such_module:Foo-v0", ("no_such_module", "pip install")),
    Bad("train_agent", f"{NEW} --env gym_chase:Chse-v0", ("gym_chase:Chse-v0",)),
    Bad("train_agent", f"{NEW} --env probe_noisy_recal_base", ("probe_noisy_recal_base", "probe_noisy_recall_base")),
    Bad("train_agent", f"{NEW} --env probe_delay_base --set env.options.gapp=4", ("gapp", "gap")),
    Bad("train_agent", f"{NEW} --env probe_delay_base --set env.options.gap=0", ("gap", "0")),
    Bad("train_agent", f"{NEW} --env probe_delay_base --set env.options.gap=far", ("gap", "far")),
    Bad("train_agent", f"{NEW} --env dmc_walker --set env.options.gap=4", ("no options", "gap")),
    Bad("train_agent", f"{NEW} --set env.options.gap=4", ("refuses the options", "gap")),
    Bad("train_agent", f"{NEW} --set env.options=3", ("env.options", "3")),
    Bad("train_agent", f"{NEW} --env popgym_RepeatPreviousEasy", ("pip install popgym",), hidden=("popgym",)),
    Bad(
        "train_agent",
        f"{NEW} --env minigrid_MemoryS13",
        ("pip install minigrid",),
        hidden=("minigrid", "minigrid.core"),
    ),
    Bad("train_agent", f"{NEW} --env memorymaze_9x9", ("pip install memory-maze",), hidden=("memory_maze",)),
    Bad("train_agent", f"{NEW} --env memorymaze_10x10", ("memorymaze_10x10", "9x9")),
    Bad(
        "train_agent",
        f"{NEW} --env dmc_walker --set env.parallel=false",
        ("pip install dm-control",),
        hidden=("dm_control",),
    ),
    Bad("train_agent", f"{NEW} --env gym_chase:Speaking-v0", ("action space", "Text", "wrap")),
    # keys and values
    Bad("train_agent", f"{NEW} --set rssm.unimx=0.1", ("rssm.unimx", "rssm.unimix")),
    Bad("train_agent", f"{NEW} --set optimiser.lr=1e-3", ("optimiser.lr", "optimizer.lr")),
    Bad("train_agent", f"{NEW} --set core.detr=64", ("core.detr", "core.deter")),
    Bad("train_agent", f"{NEW} --set env.timeot=3", ("env.timeot", "env.timeout")),
    Bad("train_agent", f"{NEW} --set env.timeout=0", ("env.timeout", "0", "greater than 0")),
    Bad("train_agent", f"{NEW} --set env.restarts=-1", ("env.restarts", "-1")),
    Bad("train_agent", f"{NEW} --set rssm=3", ("rssm is a section",)),
    Bad("train_agent", f"{NEW} --set rssm.unimix", ("--set rssm.unimix", "key=value")),
    Bad("train_agent", f"{NEW} --set rssm.stoch=1.5", ("rssm.stoch", "1.5", "integer")),
    Bad("train_agent", f"{NEW} --set rssm.stoch={{{{", ("rssm.stoch", "YAML")),
    Bad("train_agent", f"{NEW} --set rssm.posterior=observed", ("rssm.posterior", "observed", "'observation'")),
    Bad("train_agent", f"{NEW} --set optimizer.lr=.nan", ("optimizer.lr", "finite")),
    Bad("train_agent", f"{NEW} --set env.amount=0", ("env.amount", "0")),
    Bad("train_agent", f"{NEW} --set env.parallel=maybe", ("env.parallel", "maybe", "boolean")),
    Bad("train_agent", f"{NEW} --set env.time_limit=0", ("env.time_limit", "0")),
    # combinations
    Bad("train_agent", f"{NEW} --set replay.device=cuda", ("replay.device", "cuda")),
    Bad("train_agent", f"{NEW} --set compile=graph", ("compile", "graph", "CUDA")),
    Bad("train_agent", f"{NEW} --set behavior.gradient=dynamics", ("behavior.gradient", "dynamics", "reinforce")),
    Bad(
        "train_agent",
        f"{NEW} --core gru --set rssm.read_after_observation=true",
        ("rssm.read_after_observation", "another core"),
    ),
    Bad("train_agent", f"{NEW} --core gru --set core.deter=33", ("core", "33")),
    Bad("train_agent", f"{NEW} --set replay.capacity=71", ("replay.capacity", "71", "72")),
    Bad("train_agent", f"{NEW} --set replay.capacity=1000 replay.prefill=1001", ("replay.prefill", "1001", "1000")),
    Bad("train_agent", f"{NEW} --set behavior.return_low=95", ("behavior.return_low", "behavior.return_high")),
    Bad("train_agent", f"{NEW} --set heads.bins=4", ("heads.bins", "odd")),
    # own files
    Bad("train_agent", f"{NEW} --config {{here}}/none.yaml", ("none.yaml", "No such file")),
    Bad("train_agent", f"{NEW} --config {{here}}", ("cannot be read", "directory")),
    Bad("train_agent", f"{NEW} --config {{here}}/a.yaml", ("a.yaml, line 3", "YAML"), {"a.yaml": "seed: 1\nlog: {\n"}),
    Bad(
        "train_agent",
        f"{NEW} --config {{here}}/a.yaml",
        ("a.yaml, line 2", "duplicate"),
        {"a.yaml": "seed: 1\nseed: 2\n"},
    ),
    Bad("train_agent", f"{NEW} --config {{here}}/a.yaml", ("a.yaml", "key: value"), {"a.yaml": "- seed\n"}),
    Bad("train_agent", f"{NEW} --config {{here}}/a.yaml", ("a.yaml", "YAML"), {"a.yaml": b"\xff\xfe\x00"}),
    Bad(
        "train_agent",
        f"{NEW} --config {{here}}/a.yaml",
        ("unknown key trian.ratio", "train.ratio"),
        {"a.yaml": "trian: {ratio: 3}"},
    ),
    Bad("train_agent", f"{NEW} --config {{here}}/a.yaml", ("seed", "integer"), {"a.yaml": "seed: &a [*a]"}),
    Bad("train_agent", f"{NEW} --config {{here}}/a.yaml", ("a.yaml",), {"a.yaml": "a: &a {b: *a}"}),
    Bad("train_agent", f"{NEW} --config {{here}}/a.yaml", ("a.yaml", "1"), {"a.yaml": "1: 2"}),
    Bad(
        "train_agent",
        f"{NEW} --config {{here}}/a.yaml",
        ("a.yaml", "YAML"),
        {"a.yaml": "!!python/object/apply:os.system [ls]"},
    ),
    Bad("train_agent", f"{NEW} --config {{run}}/config.yaml --set core.name=mlstm", ("unknown key",)),
    # folders
    Bad("train_agent", f"{CHASE} --logdir {{file}}", ("{file}", "folder", "--logdir")),
    Bad("train_agent", f"{CHASE} --logdir {{file}}/run", ("{file}/run", "--logdir")),
    Bad("train_agent", f"{CHASE} --logdir /proc/run", ("/proc/run", "cannot be written", "--logdir")),
    Bad(
        "train_agent",
        f"{CHASE} --logdir {{here}}/full",
        ("full", "not empty", "--logdir"),
        {"full/thesis.tex": "precious"},
    ),
    Bad("train_agent", f"{RUN} seed=1", ("holds a run with seed=0", "asks for 1", "--logdir")),
    Bad("train_agent", f"{RUN} --env gym_CartPole-v1", ("holds a run with env.name",)),
    Bad("train_agent", RUN, ("config.yaml", "YAML"), {"{run}/config.yaml": "seed: {"}),
    Bad("train_agent", RUN, ("config.yaml", "core.name"), {"{run}/config.yaml": ""}),
    Bad("train_agent", RUN, ("env.name is missing",), {"{run}/config.yaml": "core: {name: gru}"}),
    Bad("train_agent", RUN, ("step_", "damaged"), {"{run}/checkpoints/step_*.pt": b"PK\x03\x04 no archive"}),
    Bad("train_agent", RUN, ("latest_", "cannot be read"), {"{run}/checkpoints/replay/latest_*.pt": None}),
    Bad(
        "train_agent",
        f"{NEW} --set log.tensorboard=true",
        ("pip install tensorboard",),
        hidden=("torch.utils.tensorboard",),
    ),
]

EVALUATE = [
    Bad("evaluate_agent", "", ("--logdir is missing",)),
    Bad("evaluate_agent", "--logdri {run}", ("--logdri", "--logdir")),
    Bad("evaluate_agent", "--logdir {here}/none", ("none", "holds no run")),
    Bad("evaluate_agent", "--logdir {here}", ("holds no run",)),
    Bad("evaluate_agent", "--logdir {file}", ("{file}", "holds no run")),
    Bad("evaluate_agent", f"{DIR} --episodes 0", ("--episodes 0", "1 or more")),
    Bad("evaluate_agent", f"{DIR} --episodes few", ("--episodes", "few")),
    Bad("evaluate_agent", f"{DIR} --seed -1", ("--seed -1",)),
    Bad("evaluate_agent", f"{DIR} --seed 99999999999999999999", ("--seed",)),
    Bad("evaluate_agent", f"{DIR} --device tpu", ("--device tpu", "cuda")),
    Bad("evaluate_agent", f"{DIR} --device cuda", ("cuda", "--device cpu")),
    Bad("evaluate_agent", DIR, ("no checkpoint yet",), {"{run}/checkpoints/step_*.pt": None}),
    Bad("evaluate_agent", f"{DIR} --best", ("best",), {"{run}/checkpoints/best_*.pt": None}),
    Bad("evaluate_agent", DIR, ("step_", "damaged"), {"{run}/checkpoints/step_*.pt": b"\x80\x04 nothing"}),
    Bad("evaluate_agent", DIR, ("config.yaml", "core.name", "grru"), {"{run}/config.yaml": "core: {name: grru}"}),
    Bad(
        "evaluate_agent", f"{DIR} --video {{here}}/a.mp4", ("--video", "pip install"), hidden=("imageio", "imageio.v3")
    ),
    Bad("evaluate_agent", f"{DIR} --video {{here}}/none/a.gif", ("--video", "none/a.gif")),
    Bad("evaluate_agent", f"{DIR} --video {{here}}/a.txt", ("--video", "a.txt", ".gif")),
]

VIEW = [
    Bad("view_agent", "", ("--logdir is missing",)),
    Bad("view_agent", "--logdir {here}", ("holds no run",)),
    Bad("view_agent", f"{DIR} --show open_lop", ("--show open_lop", "open_loop")),
    Bad("view_agent", f"{DIR} --context 0", ("--context 0", "1 or more")),
    Bad("view_agent", f"{DIR} --length 5", ("--length 5", "--context")),
    Bad("view_agent", f"{DIR} --steps 10", ("--steps 10", "--length")),
    Bad("view_agent", f"{DIR} --context 60", ("--context 60", "33 steps")),
    Bad("view_agent", f"{DIR} --format avi", ("--format avi", ".gif")),
    Bad("view_agent", f"{DIR} --format mp4", ("--format mp4", "pip install"), hidden=("imageio", "imageio.v3")),
    Bad("view_agent", DIR, ("matplotlib", "pip install"), hidden=("matplotlib", "matplotlib.figure")),
    Bad("view_agent", f"{DIR} --out /proc/view", ("/proc/view", "cannot be written")),
    Bad("view_agent", f"{DIR} --seed -1", ("--seed -1",)),
]

PROBE = "--quick --device cpu --out {here}/out"
PROBES = [
    Bad("probe_memory", f"{PROBE} --core grru", ("--core", "grru", "gru")),
    Bad("probe_memory", f"{PROBE} --core mlstm:widht=12", ("core.widht", "core.width")),
    Bad("probe_memory", f"{PROBE} --core mlstm:width=12,mlstm:width=12", ("asked for twice",)),
    Bad("probe_memory", f"{PROBE} --core mlstm:width=wide", ("core.width", "wide", "integer")),
    Bad("probe_memory", f"{PROBE} --preset base", ("--quick", "--preset")),
    Bad("probe_memory", "--preset bsae --out {here}/out", ("--preset", "bsae")),
    Bad("probe_memory", f"{PROBE} --lr fast", ("training.lr", "fast")),
    Bad("probe_memory", f"{PROBE} --vocab 0", ("task.vocab", "0")),
    Bad("probe_memory", f"{PROBE} --vocab 4 --noise-vocab 9", ("vocab",)),
    Bad("probe_memory", f"{PROBE} --steps 0.5", ("training.steps", "0.5")),
    Bad("probe_memory", f"{PROBE} --task recal", ("task.name", "recal", "noisy_recall")),
    Bad("probe_memory", f"{PROBE} --schedule linear", ("training.schedule", "linear", "cosine")),
    Bad("probe_memory", f"{PROBE} --time-alone -1", ("--time-alone -1",)),
    Bad("probe_memory", f"{PROBE} --set trainig.lr=1", ("trainig.lr", "training.lr")),
    Bad("probe_memory", f"{PROBE} --device tpu", ("device", "tpu")),
    Bad("probe_memory", f"{PROBE} --device cuda", ("cuda",)),
    Bad("probe_memory", "--quick --device cpu --out {file}", ("{file}",)),
    Bad("probe_memory", f"{PROBE} --seds 3", ("--seds", "--seeds")),
    Bad("evaluate_memory", "--suite quik --out {here}/out", ("--suite", "quik", "quick")),
    Bad("evaluate_memory", "--cores grru --out {here}/out", ("core.name", "grru", "gru")),
    Bad("evaluate_memory", "--cores gru:detr=3 --out {here}/out", ("core.detr", "core.deter")),
    Bad("evaluate_memory", "--cores gru,gru --out {here}/out", ("asked for twice",)),
    Bad("evaluate_memory", "--probes dlay --out {here}/out", ("--probes", "dlay")),
    Bad("evaluate_memory", "--seeds 0 --out {here}/out", ("seeds", "0")),
    Bad("evaluate_memory", "--parallel 0 --out {here}/out", ("parallel", "0")),
    Bad("evaluate_memory", "--steps few --out {here}/out", ("steps", "few")),
    Bad("evaluate_memory", "--set rssm.unimx=1 --out {here}/out", ("rssm.unimx", "rssm.unimix")),
    Bad("evaluate_memory", "--device cuda --out {here}/out", ("cuda", "cpu")),
    Bad("evaluate_memory", "--device cpu --out {file}", ("{file}",)),
    Bad("evaluate_memory", f"{DIR} --suite quick", ("--suite", "--logdir")),
    Bad("evaluate_memory", f"{DIR} --set seed=1", ("--set", "--logdir")),
    Bad("evaluate_memory", DIR, ("gym_chase:Chase-v0", "no probe")),
    Bad("evaluate_memory", "--logdir {here}", ("holds no run",)),
]

AGENT = f"{CHASE} --updates 1"
CORES = "--cores gru --size debug --device cpu --repeats 1 --passes step"
BENCHMARKS = [
    Bad("benchmark_agent", "--updates 1 --size debug", ("env.name is missing",)),
    Bad("benchmark_agent", f"{AGENT} --updates 0", ("--updates 0",)),
    Bad("benchmark_agent", f"{AGENT} --threads 0", ("--threads 0",)),
    Bad("benchmark_agent", f"{AGENT} --inductor combo_kernel=true", ("--inductor", "combo_kernel")),
    Bad("benchmark_agent", f"{AGENT} --inductor combo_kernels", ("--inductor", "key=value")),
    Bad("benchmark_agent", f"{AGENT} --matrix --minutes -1", ("--minutes -1",)),
    Bad("benchmark_agent", f"{AGENT} --matrix --out {{here}}/none/a.json", ("--out", "none/a.json")),
    Bad("benchmark_agent", f"{AGENT} --matrix --env dmc_walkr", ("dmc_walkr", "dmc_walker")),
    Bad("benchmark_agent", f"{AGENT} --out {{here}}/a.json", ("--out", "--matrix")),
    Bad("benchmark_agent", f"{AGENT} --matrix --scaling", ("--matrix", "--scaling")),
    Bad("benchmark_agent", f"{AGENT} --device cuda", ("cuda", "--device cpu")),
    Bad("benchmark_cores", f"{CORES} --cores grru", ("core.name", "grru", "gru")),
    Bad("benchmark_cores", f"{CORES} --size 13m", ("size", "13m")),
    Bad("benchmark_cores", f"{CORES} --batch 0", ("--batch", "positive")),
    Bad("benchmark_cores", f"{CORES} --length long", ("--length", "long")),
    Bad("benchmark_cores", f"{CORES} --passes backward", ("--passes backward", "training")),
    Bad("benchmark_cores", f"{CORES} --forms exakt", ("--forms exakt", "exact")),
    Bad("benchmark_cores", f"{CORES} --repeats 0", ("--repeats 0",)),
    Bad("benchmark_cores", f"{CORES} --graph", ("--graph", "CUDA")),
    Bad("benchmark_cores", f"{CORES} --out {{here}}/none/a.json", ("--out", "none/a.json")),
    Bad("benchmark_cores", f"{CORES} --out /dev/full/a", ("--out",)),
    Bad("benchmark_cores", f"{CORES} --set core.detr=3", ("core.detr", "core.deter")),
    Bad("check_env", "", ("env.name is missing",)),
    Bad("check_env", "--env gym_CartPoll-v1", ("gym_CartPole-v1",)),
    Bad("check_env", "--env gym_CartPole-v1 --set env.action_repeat=0", ("env.action_repeat", "0")),
    Bad("check_env", "--env gym_CartPole-v1 --steps 3", ("--steps",)),
    Bad("check_env", "--env dmc_walker --set env.options.a=1", ("no options", "a")),
    Bad("check_env", "--env gym_chase:Unmakeable-v0", ("gym_chase:Unmakeable-v0", "ZeroDivisionError")),
]

PLOT = "{run}"
PLOTS = [
    Bad("plot_runs", "", ("logdir", "required")),
    Bad("plot_runs", "{here}/none", ("none", "folder of a run")),
    Bad("plot_runs", f"{PLOT} --bins 0", ("--bins 0",)),
    Bad("plot_runs", f"{PLOT} --bin 10", ("--bin", "--bins")),
    Bad("plot_runs", PLOT, ("metrics.jsonl",), {"{run}/metrics.jsonl": "not json\n"}),
    Bad("plot_runs", PLOT, ("has episode/return yet",), {"{run}/metrics.jsonl": "[1, 2]\n"}),
    Bad("plot_runs", PLOT, ("metrics.jsonl",), {"{run}/metrics.jsonl": b"\xff\xfe"}),
    Bad("plot_runs", PLOT, ("has episode/return yet",), {"{run}/metrics.jsonl": '{"step": 3}\n'}),
    Bad("plot_runs", f"{PLOT} --csv {{here}}/none/a.csv", ("--csv", "none/a.csv")),
    Bad("plot_runs", f"{PLOT} --csv {{here}}", ("--csv", "{here}")),
    Bad("plot_runs", f"{PLOT} --figure {{here}}/none/a.png", ("--figure", "none/a.png")),
    Bad("plot_runs", f"{PLOT} --figure {{here}}/a.xyz", ("--figure", "a.xyz", ".png")),
    Bad("plot_runs", f"{PLOT} --figure {{here}}/a.png", ("needs matplotlib", "pip install"), hidden=("matplotlib",)),
    Bad("plot_runs", f"{PLOT} --published {{here}}/none.csv", ("--published", "none.csv")),
    Bad("plot_runs", f"{PLOT} --published {{here}}/a.csv", ("--published", "columns"), {"a.csv": "a,b\n1,2\n"}),
    Bad("plot_runs", "{run} {run}/../run", ("run is given twice",)),
    Bad("plot_runs", f"{PLOT} --metric episode/retrun", ("has episode/retrun yet",)),
    Bad("compare_runs", "{run}", ("two runs or more",)),
    Bad("compare_runs", "{run} {here}/none", ("none", "folder of a run")),
    Bad("compare_runs", "{run} {run}", ("run is given twice",)),
    Bad("compare_runs", "{run} {here} --bins 0", ("--bins 0",)),
    Bad("compare_runs", "{run} {here} --metrics loss/kl", ("--metrics", "--metric")),
    Bad("fault_test", "--kills 0", ("--kills 0",)),
    Bad("fault_test", "--seconds 0", ("--seconds 0",)),
    Bad("fault_test", "--steps many", ("steps", "many")),
    Bad("fault_test", "--seed -1", ("seed", "-1")),
    Bad("fault_test", "--env gym_CartPoll-v1", ("gym_CartPole-v1",)),
    Bad("fault_test", "--core grru", ("core.name", "grru", "gru")),
    Bad("fault_test", "--set rssm.unimx=1", ("rssm.unimx", "rssm.unimix")),
    Bad("fault_test", "--kils 3", ("--kils", "--kills")),
]

TABLE = [*TRAIN, *EVALUATE, *VIEW, *PROBES, *BENCHMARKS, *PLOTS]
