"""The sections of the configuration: which keys there are, and which values each may have.

Defaults stand in `configs/default.yaml` alone. A core's own keys are declared by the core.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from agent.errors import UserError

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _whole(value: Any) -> Any:
    """5e5 is a float to YAML, and an integer to everyone else."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("it should be odd, as zero has a bin of its own")
    return value


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"it should be a regular expression ({error})") from None
    return value


Count = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Percentile = Annotated[float, Field(ge=0, le=100)]


@dataclass(frozen=True, config=STRICT)
class Env:
    """Section `env`."""

    name: str
    amount: PositiveInt
    parallel: bool
    action_repeat: PositiveInt
    time_limit: PositiveInt | None
    options: dict[str, Any]
    timeout: Positive | None
    restarts: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=STRICT)
class Observation:
    """Section `observation`."""

    encode: Pattern
    decode: Pattern


@dataclass(frozen=True, config=STRICT)
class Rssm:
    """Section `rssm`."""

    posterior: Literal["recurrent", "observation"]
    read_after_observation: bool
    stoch: PositiveInt
    classes: Annotated[int, Field(ge=2)]
    hidden: PositiveInt
    prior_layers: PositiveInt
    posterior_layers: PositiveInt
    unimix: ShareBelowOne


@dataclass(frozen=True, config=STRICT)
class Heads:
    """Section `heads`."""

    units: PositiveInt
    depth: PositiveInt
    encoder_layers: PositiveInt
    decoder_layers: PositiveInt
    reward_layers: PositiveInt
    continuation_layers: PositiveInt
    actor_layers: PositiveInt
    critic_layers: PositiveInt
    bins: Annotated[int, Field(ge=3), AfterValidator(_odd)]


@dataclass(frozen=True, config=STRICT)
class Loss:
    """Section `loss`."""

    free_nats: NonNegative
    dynamics: NonNegative
    representation: NonNegative
    reconstruction: NonNegative
    reward: NonNegative
    anticipation: NonNegative
    continuation: NonNegative
    actor: NonNegative
    critic: NonNegative
    replay_value: NonNegative


@dataclass(frozen=True, config=STRICT)
class Behavior:
    """Section `behavior`."""

    gradient: Literal["reinforce", "dynamics"]
    imagination_horizon: PositiveInt
    imagination_starts: Annotated[int, Field(ge=2)] | None
    discount_horizon: Annotated[float, Field(gt=1)]
    return_lambda: Share
    entropy: NonNegative
    return_rate: Rate
    return_low: Percentile
    return_high: Percentile
    slow_rate: Rate
    slow_regularizer: NonNegative

    @model_validator(mode="after")
    def _check(self) -> "Behavior":
        if self.return_low >= self.return_high:
            raise UserError(
                f"behavior.return_low: {self.return_low} is not allowed; "
                f"it should be less than behavior.return_high, which is {self.return_high}"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    """Section `optimizer`."""

    lr: Positive
    behavior_lr: Positive | None
    agc: Positive
    beta1: ShareBelowOne
    beta2: ShareBelowOne
    eps: Positive
    warmup: Annotated[int, BeforeValidator(_whole), Field(ge=0)]


@dataclass(frozen=True, config=STRICT)
class Train:
    """Section `train`."""

    batch_size: PositiveInt
    batch_length: Annotated[int, Field(ge=2)]
    ratio: Positive
    max_skipped: PositiveInt


@dataclass(frozen=True, config=STRICT)
class Replay:
    """Section `replay`."""

    capacity: Count
    device: Literal["auto", "cpu", "cuda"]
    prefill: Count
    online_queue: bool


@dataclass(frozen=True, config=STRICT)
class Log:
    """Section `log`."""

    every: Count
    tensorboard: bool
    open_loop_every: Count | None


@dataclass(frozen=True, config=STRICT)
class Checkpoint:
    """Section `checkpoint`."""

    minutes: Positive
    keep: PositiveInt


@dataclass(frozen=True, config=STRICT)
class Config:
    """A complete configuration; `configs/default.yaml` says what each key means.

    `core` is an instance of the chosen core's own `Config`, with the attribute `name` added.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    steps: Count
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]
    compile: Literal["auto", "eager", "graph", "full", "ahead"]
    deterministic: bool
    size: str
    env: Env
    observation: Observation
    core: Any
    rssm: Rssm
    heads: Heads
    loss: Loss
    behavior: Behavior
    optimizer: Optimizer
    train: Train
    replay: Replay
    log: Log
    checkpoint: Checkpoint

    @model_validator(mode="after")
    def _check(self) -> "Config":
        rows = self.env.amount * 2 * (self.train.batch_length + 1)
        if self.replay.capacity < rows:
            raise UserError(
                f"replay.capacity: {self.replay.capacity} is not allowed; it should be at least {rows}, "
                f"two sequences of train.batch_length + 1 steps for each of {self.env.amount} environments"
            )
        if self.replay.prefill > self.replay.capacity:
            raise UserError(
                f"replay.prefill: {self.replay.prefill} is not allowed; "
                f"it should be at most replay.capacity, which is {self.replay.capacity}"
            )
        if (self.behavior.imagination_starts or 0) > self.train.batch_length:
            raise UserError(
                f"behavior.imagination_starts: {self.behavior.imagination_starts} is not allowed; "
                f"it should be null, or at most train.batch_length, which is {self.train.batch_length}"
            )
        return self
