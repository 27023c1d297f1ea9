"""A training run: collect, learn, log, save; stopped at any time and gone on with by the same command."""

import contextlib
import dataclasses
import io
import itertools
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent import checkpoint, compile_ahead, devices
from agent import logdir as logdirs
from agent.agent import Agent, Carry
from agent.arrays import as_arrays, as_tensors, tensors
from agent.dealing import deal, parts
from agent.distributed import Ranks, meeting
from agent.errors import UserError
from agent.footprint import foretold_on_gpu
from agent.incidents import Incidents, tell_broken
from agent.introduction import Foretelling, introduce, planned_updates
from agent.logging import LiveLine, MetricsLogger, NoLogger, memory, tensorboard_writer
from agent.random_state import make_deterministic, random_state, seed_everything, set_random_state
from agent.ratio import Ratio
from agent.replay import Replay, choose_device, storage_bytes
from agent.replay_files import ReplayFiles
from agent.schema import Config
from agent.stopping import SignalsHeld
from agent.view.training import OpenLoopPictures
from envs.errors import EnvironmentFailure
from envs.streams import Row, Streams


def train(config: Config, logdir: str | Path | None = None, news: Sequence[str] = ()) -> Path:
    """Train until `config.steps` environment frames, or go on with the run that `logdir` holds.

    Progress is told on stderr. SIGINT (a notebook's stop button) and SIGTERM save and then raise SystemExit. With
    `config.env.parallel` environments are processes that import the main module anew, so that a script calls this
    under `if __name__ == "__main__":`. Processes that torchrun started train one agent together, each with its share of
    environments, batch and replay; what goes wrong then ends all of them with SystemExit, after one line.

    Args:
        config: as `agent.resolve` gives it.
        logdir: folder of the run; None is a new one in `runs/`, named after what is trained.
        news: lines to tell at its start.

    Returns:
        The folder: `metrics.jsonl` for `agent.read_metric`, checkpoints for `agent.load`.

    Raises:
        UserError: `logdir` holds a run of another configuration, or something of `config` cannot be done here; the
            disk or the GPU's memory is full; or too many updates in a row had a number that is not finite.
    """
    started = time.monotonic()
    device = devices.choose(config.device)
    logdir = logdirs.new_logdir(config) if logdir is None else Path(logdir)
    logdirs.check(config, logdir)
    if config.log.tensorboard:
        tensorboard_writer()  # if it is missing, nothing is written
    with meeting(config, device) as ranks:
        compiles_ahead = compile_ahead.is_wanted(config, device, ranks)
        logdir = ranks.gather(logdir)[0]
        run = Run(config, logdir, device, started, ranks, compiles_ahead)
        run.news = news
        notify = tell if ranks.leads else lambda line: None
        # No name here for what was found: its tensors are mapped from files, which must not outlive their use.
        try:
            run.go(logdirs.find_checkpoint(config, logdir, notify))
        except torch.OutOfMemoryError:
            train = config.train
            at = f"train.batch_size, now {train.batch_size}, or train.batch_length, now {train.batch_length}"
            raise UserError(
                f"device: the GPU's memory does not hold this run; lower {at}, choose a smaller --size, or keep replay"
                " elsewhere with --set replay.device=cpu"
            ) from None
    return logdir


def tell(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr)


class Run:
    """The parts of a run and the loop over them."""

    def __init__(
        self, config: Config, logdir: Path, device: torch.device, started: float, ranks: Ranks, compiles_ahead: bool
    ):  # fmt: skip
        self.config, self.logdir, self.device, self.started = config, logdir, device, started
        self.ranks, self.amount = ranks, ranks.share(config.env.amount, "env.amount")  # environments of this rank
        self.first = ranks.rank * self.amount  # their first one's place among all
        make_deterministic(config, device)
        seed_everything(ranks.seed(config.seed))
        self.rows = 0  # rows collected from each environment
        self.episodes = 0
        self.stop_signal: int | None = None
        self.news: Sequence[str] = ()  # lines to tell at the start
        self.streams: Streams | None = None
        self.compiles_ahead = compiles_ahead
        self.ahead: compile_ahead.CompilingAhead | None = None  # while it does
        self.returns: list[float] = []  # of the episodes since the last checkpoint
        self.best = -math.inf  # highest mean of those at a checkpoint
        self.saved_frames = -1  # at the newest checkpoint
        self.replay_files = ReplayFiles(logdir / "checkpoints" / "replay", ranks.rank)
        self.incidents = Incidents(logdir / "not_finite", config.train.max_skipped)
        self.ratio = Ratio(config.train.ratio, config.train.batch_size * config.train.batch_length)

    # ---- counting ---------------------------------------------------------------------------------------------

    @property
    def frames(self) -> int:
        """Environment frames so far: rows times environments times action repeat."""
        return self.rows * self.config.env.amount * self.config.env.action_repeat

    # ---- the run ----------------------------------------------------------------------------------------------

    def go(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        """Set everything up, run to the end or to a signal, and save. `found`: the checkpoint to go on from."""
        self._check_found(found)
        found = (found[0], self._share_of(found[1])) if found else None
        env = self.config.env
        seed = int(np.random.SeedSequence([self.config.seed, 0]).generate_state(1)[0] // 2)
        self.streams = Streams(
            env.name, self.amount, parallel=env.parallel, seed=seed + self.first,
            action_repeat=env.action_repeat, time_limit=env.time_limit, options=env.options,
            timeout=env.timeout, restarts=env.restarts,
        )  # fmt: skip
        with contextlib.ExitStack() as signals:
            try:
                row = self._set_up(found)
                del found
                # To the end of the last save: of several ranks one may be told later than it agreed to stop.
                signals.enter_context(SignalsHeld(self))
                with self.ranks.ending_together():
                    stop = self._loop(row)
            finally:
                self.streams.close()
                if self.ahead is not None:
                    self.ahead.stop()
            self._finish(stop)

    def _set_up(self, found: tuple[Path, dict[str, Any]] | None) -> Row:
        """Make agent and replay, or restore them, open the log and tell what will run; the row to begin with."""
        assert self.streams is not None
        spaces = self.streams.observation_space, self.streams.action_space
        config = self.config
        if self.compiles_ahead:
            config = dataclasses.replace(config, compile="ahead")  # which `auto` may stand for
            self.ahead = compile_ahead.CompilingAhead(*spaces, config, self.device)
        self.foretold = foretold_on_gpu(*spaces, config, self.device, self.ranks.size)
        self.agent = Agent(*spaces, config, self.device, self.ranks)
        self.replay = self._make_replay()
        self.agent.attach(self.replay)
        self.carry = self.agent.initial(self.amount)
        if found:
            self._restore(found[1])
        self._open(found)
        self.ranks.wait()  # for the folder
        self._introduce(found)
        row = self._first_row(found)
        self._discard_broken()
        return row

    def _check_found(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        """UserError unless all ranks go on from the same checkpoint."""
        names = self.ranks.gather(found[0].name if found else None)
        if len(set(names)) > 1:
            raise UserError(
                f"{self.logdir}: the ranks find different checkpoints there ({', '.join(map(str, names))}); give a"
                " --logdir on a disk that all machines share"
            )

    def _open(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        """Make the folder this run's, and open its log and the live line; only the first rank has them."""
        if not self.ranks.leads:
            self.logger: MetricsLogger = NoLogger()
            self.line = LiveLine(self.config.steps, self.frames, self.device.type, stream=io.StringIO())
            return
        logdirs.claim(self.config, self.logdir)
        if found:
            checkpoint.set_aside(found[0])
        self.logger = MetricsLogger(self.logdir, self.config.log.tensorboard, self.frames)
        self.logger.truncate(found[1]["metrics_position"] if found else 0)
        self.line = LiveLine(self.config.steps, self.frames, self.device.type)

    def _make_replay(self) -> Replay:
        config, (rows, latents) = self.config, self.agent.row_specs()
        amount, window = config.env.amount, config.train.batch_length + 1
        stride = self.agent.replay_stride
        # No more than this run can fill, in whole strides.
        wanted = -(-config.steps // (config.env.action_repeat * amount)) * amount
        needed = max(wanted, 2 * window * amount, config.replay.prefill + amount)
        capacity = min(config.replay.capacity, -(-needed // (amount * stride)) * amount * stride)
        shape = {"streams": self.amount, "capacity": capacity // self.ranks.size, "stride": stride}
        nbytes = storage_bytes(rows, latents, **shape)
        return Replay(
            rows, latents, **shape, window=window, seed=self.ranks.seed(config.seed),
            device=choose_device(config.replay.device, nbytes, self.device), online_queue=config.replay.online_queue,
        )  # fmt: skip

    def _first_row(self, found: tuple[Path, dict[str, Any]] | None) -> Row:
        """The row that the loop begins with: of new episodes, or of those that ran when the checkpoint was written."""
        assert self.streams is not None
        if not found:
            return self.streams.reset()
        path, saved = found
        row, own_cut = self.streams.restore(as_arrays(saved["streams"]))
        cut = [first + index for first, indices in self.ranks.gather((self.first, own_cut)) for index in indices]
        if cut:
            self.logger.write(self.frames, {"episode/cut": len(cut)})
            which = ", ".join(map(str, cut))
            self.line.note(
                f"cut         episodes of environments {which}: the same seed and actions did not lead to the same"
                " observation, the episode was too long, or the environment had failed; new ones begin"
            )
        # Only now: environments may have drawn.
        if saved["random"] is None:
            seed_everything(self.ranks.seed(self.config.seed, self.rows))
        else:
            set_random_state(saved["random"])
        if saved["is_best"] and self.ranks.leads:
            checkpoint.keep_as_best(path)  # the run may have died before it did
        return row

    def _loop(self, row: Row) -> int:
        """Run to the end (0), or until any rank has a signal: its number."""
        assert self.streams is not None
        config, agent, replay = self.config, self.agent, self.replay
        saved, self._logged = time.monotonic(), (time.monotonic(), self.frames, agent.updates)
        log_rows = max(1, config.log.every // (config.env.amount * config.env.action_repeat))
        self._foretell = Foretelling(agent.updates)
        show_open_loop = OpenLoopPictures(config, self.logger, self.line.note)
        batch, prefill = config.train.batch_size // self.ranks.size, -(-config.replay.prefill // self.ranks.size)
        stop = 0
        while self.frames < config.steps and not stop:
            values = tensors(row)
            action, self.carry = agent.act(values, values["is_first"], self.carry)
            replay.add(agent.row(values, action, self.carry))
            actions = action.cpu().numpy()
            if not np.isfinite(actions).all():
                self.incidents.check_acting(self.carry, self.frames)
            self.streams.send(actions)
            (waiting,) = self.ranks.highest(not replay.ready(prefill))
            if not waiting:
                for _ in range(self.ratio.updates(config.env.amount)):
                    agent.update(replay.sample(batch))
                    self._tell_first_update()
            row = self._receive()
            self.rows += 1

            to_tell, due, stop = self.ranks.highest(
                bool(self.streams.broken or self.streams.finished),
                self.ranks.leads and time.monotonic() - saved > 60 * config.checkpoint.minutes,
                self.stop_signal or 0,
            )
            if to_tell:
                self._discard_broken()
                self._report_episodes()
            self.line.update(self.frames, agent.updates)
            if self.ahead is not None and self.ahead.is_done():
                self._go_on_compiled()
            if self.ahead is None and (told := self._foretell(agent.updates, planned_updates(config))):
                self.line.note(told)
            if self.ranks.leads:
                show_open_loop(agent, replay, self.frames)
            if self.rows % log_rows == 0:
                self._log()
            if due:
                self.save()
                saved = time.monotonic()
        return stop

    def _go_on_compiled(self) -> None:
        assert self.ahead is not None
        failed, self.ahead = self.ahead.has_failed(), None
        self.agent.use("full")
        self._foretell = Foretelling(self.agent.updates)
        how = "failed in the other process; the next update compiles" if failed else "done; the next update loads it"
        self.line.note(f"compiling   {how}, {time.monotonic() - self.started:.0f} s after the start")

    def _log(self) -> None:
        """Write the means since the last time, and look after what they show."""
        agent, now = self.agent, time.monotonic()
        before, frames, updates = self._logged
        rates = {
            "updates": agent.updates,
            "time/updates_per_second": (agent.updates - updates) / (now - before),
            "time/frames_per_second": (self.frames - frames) / (now - before),
            "time/memory_gib": memory(self.device.type) / 2**30,
        }
        metrics = agent.take_metrics()
        self.logger.write(self.frames, metrics | rates)
        self.incidents.check_acting(self.carry, self.frames)
        if told := self.incidents.look(agent, self.frames):
            self.line.note(told)
        if metrics:
            agent.schedule(metrics)
        self._logged = now, self.frames, agent.updates

    def _receive(self) -> Row:
        """The next row; where an environment breaks too often, on whatever rank, all save and end."""
        assert self.streams is not None
        row: Row = {}
        failure: EnvironmentFailure | None = None
        try:
            row = self.streams.receive()
        except EnvironmentFailure as error:
            failure = error
        (failed,) = self.ranks.highest(failure is not None)
        if failed:
            self._discard_broken()
            self.save()  # what was learned so far is worth keeping
            if failure is None:
                self.ranks.end_after_another()
            raise failure
        return row

    def _report_episodes(self) -> None:
        assert self.streams is not None
        for episode in itertools.chain(*self.ranks.gather(self.streams.finished)):
            self.episodes += 1
            self.returns.append(episode.episode_return)
            numbers = {
                "episode/return": episode.episode_return,
                "episode/length": episode.length,
                "episode/count": self.episodes,
                **{f"episode/{name}": value for name, value in episode.metrics.items()},
            }
            self.logger.write(self.frames, numbers)
            self.line.update(self.frames, self.agent.updates, episode.episode_return)

    def _discard_broken(self) -> None:
        """Tell of environments that broke in the newest row, and take what they gave of their episodes from replay."""
        assert self.streams is not None
        texts = []
        for broken in self.streams.broken:
            self.replay.discard(broken.index, broken.rows)
            texts.append(self.ranks.name + tell_broken(broken, self.frames, self.logdir))
        told, restarts = zip(*self.ranks.gather((texts, self.streams.restarts)), strict=True)
        for text in itertools.chain(*told):
            self.line.note(f"broken      {text}")
        if any(told):
            self.logger.write(self.frames, {"env/restarts": sum(restarts)})

    def _finish(self, stop: int) -> None:
        if self.saved_frames != self.frames:
            self.save()
        self.line.close()
        self.logger.close()
        if not stop:
            self.line.note(f"done: {self.frames:,} frames, {self.episodes} episodes; run in {self.logdir}")
            return
        name = signal.Signals(stop).name
        self.line.note(f"stopped by {name} at {self.frames:,} frames and saved; the same command goes on from here")
        sys.exit(128 + stop)

    # ---- saving -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of everything: a run that goes on from it does what this one does."""
        directory = self.logdir / "checkpoints"
        mean = sum(self.returns) / len(self.returns) if self.returns else -math.inf
        is_best = mean > self.best
        if self.returns:
            self.best, self.returns = max(self.best, mean), []
        try:
            first, *others = self.ranks.gather(self._own_state())  # once all have written their replay
            if self.ranks.leads:
                state = self._common_state() | first | {"best": self.best, "is_best": is_best, "other_ranks": others}
                path = checkpoint.save(directory, self.frames, state, self.config.checkpoint.keep)
                if is_best:
                    checkpoint.keep_as_best(path)
            self.ranks.wait()  # nobody goes on, or ends, before the checkpoint is whole
            self.saved_frames = self.frames
        finally:  # a full disk gets back what was written in vain
            if self.ranks.leads:
                self.replay_files.sweep(checkpoint.candidates(directory))

    def _common_state(self) -> dict[str, Any]:
        """What is the same on all ranks."""
        return {
            "run": logdirs.identity(self.config),
            "platform": devices.platform(self.device),
            "agent": self.agent.state_dict(),
            "ratio": self.ratio.state_dict(),
            "rows": self.rows,
            "episodes": self.episodes,
            "metrics_position": self.logger.position(),
        }

    def _own_state(self) -> dict[str, Any]:
        """What each rank has its own of, on the CPU; see `agent.dealing`."""
        assert self.streams is not None
        return {
            "carry": as_tensors(self.carry._asdict()),
            "streams": as_tensors(self.streams.state_dict()),
            "replay": self.replay_files.write(self.replay, self.frames),
            "random": random_state(),
            "means": as_tensors(self.agent.means.state_dict()),
        }

    def _share_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint's state as this rank needs it; `random` is None if another number of ranks wrote it."""
        saved = parts(state)
        if len(saved) == self.ranks.size:
            return {**state, **saved[self.ranks.rank]}
        return state | deal(saved, range(self.first, self.first + self.amount)) | {"random": None}

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self.rows, self.episodes, self.best = saved["rows"], saved["episodes"], saved["best"]
        self.saved_frames = self.frames
        self.agent.load_state_dict(saved["agent"], self.logdir)
        if saved["random"] is None:
            seed = self.ranks.seed(self.config.seed, self.rows)
            needed = [part["replay"] for part in parts(saved)]
            self.replay_files.load_dealt(needed, self.replay, self.first, seed)
        else:
            self.replay_files.load(saved["replay"], self.replay)
            self.agent.means.load_state_dict(saved.get("means", saved["agent"]["means"]))
        self.ratio.load_state_dict(saved["ratio"])
        carry = saved["carry"]
        state = {key: value.to(self.device, copy=True) for key, value in carry["state"].items()}
        self.carry = Carry(state, carry["z"].to(self.device, copy=True), carry["action"].to(self.device, copy=True))

    # ---- telling ----------------------------------------------------------------------------------------------

    def _introduce(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        assert self.streams is not None
        given = self.config, self.logdir, self.agent, self.replay
        lines = [*self.news, *introduce(*given, self.foretold, self.streams.note)]
        if found:
            path, saved = found
            lines.append(f"resumed     {path.name}: {self.frames:,} frames, {self.agent.updates:,} updates")
            if saved["random"] is None:
                lines.append(
                    f"            written by {len(parts(saved))} ranks, not {self.ranks.size}: environments, their"
                    " episodes and replay are dealt out anew, all of them; noise and sampling begin anew"
                )
            here = devices.platform(self.device)
            changed = [
                f"{key} {value}, not {here[key]}" for key, value in saved["platform"].items() if value != here[key]
            ]
            if changed:
                lines.append(f"            written with {'; '.join(changed)}: numbers may differ in their last digits")
        if self.ahead is not None:
            lines.append("compiling   in another process; until it is done, updates run uncompiled")
        for text in lines:
            self.line.note(text)
        self._first_update_told = False

    def _tell_first_update(self) -> None:
        if not self._first_update_told:
            self._first_update_told = True
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.line.note(f"first update {time.monotonic() - self.started:.1f} s after the start")
            self.line.forget_rates()
