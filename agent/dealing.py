"""What each rank holds by itself, in a checkpoint, and how it is dealt out to another number of ranks.

Environments are counted through over all ranks, and each rank holds as many: of N over W ranks, rank r those from
r * N / W on. So a run may go on with another number of ranks, and environment, episode and stream of replay i are what
they were.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def parts(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A checkpoint's state -> what each rank holds, by rank; the first one's lies in `state` itself."""
    return [state, *state.get("other_ranks", [])]


def deal(states: Sequence[Mapping[str, Any]], wanted: range) -> dict[str, Any]:
    """`carry` and `streams` of the environments `wanted`, from those that all ranks saved."""
    amounts = [len(state["streams"]["episodes"]) for state in states]
    carries = [state["carry"] for state in states]
    latest = deal_tensors([{key: carry[key] for key in ("z", "action")} for carry in carries], amounts, wanted)
    memory = deal_tensors([carry["state"] for carry in carries], amounts, wanted)
    return {
        "carry": {"state": memory, **latest},
        "streams": _deal_streams([state["streams"] for state in states], wanted),
    }


def _deal_streams(states: Sequence[Mapping[str, Any]], wanted: range) -> dict[str, Any]:
    """What `Streams.state_dict` gave; where one rank had lost its episodes, as after a failure, all are cut."""
    lists = ("episodes", "returns", "lengths", "actions")
    joined = {key: [value for state in states for value in state[key]] for key in lists}
    rows, amounts = [state["row"] for state in states], [len(state["episodes"]) for state in states]
    return {key: values[wanted.start : wanted.stop] for key, values in joined.items()} | {
        "row": None if any(row is None for row in rows) else deal_tensors(rows, amounts, wanted),
        "restarts": max(state.get("restarts", 0) for state in states),
    }


def deal_replay(states: Sequence[Mapping[str, Any]], wanted: range, seed: int) -> dict[str, Any]:
    """What `Replay.state_dict` gave, of the streams `wanted`; draws begin anew from `seed`."""
    amounts = [state["streams"] for state in states]
    queue, discarded, before = [], [], 0
    for state, amount in zip(states, amounts, strict=True):
        queue += [(before + stream - wanted.start, start) for stream, start in state["queue"]]
        discarded += [(before + stream - wanted.start, *span) for stream, *span in state.get("discarded", [])]
        before += amount
    here = range(len(wanted))
    return {
        **{key: states[0][key] for key in ("oldest", "next", "begin")},
        "stride": states[0].get("stride", 1),
        "tensors": deal_tensors([state["tensors"] for state in states], amounts, wanted),
        "streams": len(wanted),
        "queue": sorted((entry for entry in queue if entry[0] in here), key=lambda entry: (entry[1], entry[0])),
        "discarded": [entry for entry in discarded if entry[0] in here],
        "random": np.random.PCG64(seed).state,
    }


def deal_tensors(held: Sequence[Mapping[str, Tensor]], amounts: Sequence[int], wanted: range) -> dict[str, Tensor]:
    """Tensors (N_r, ...) by key, of each rank r -> those of `wanted` among all, (len(wanted), ...)."""
    ends = np.cumsum(amounts)
    pieces = [
        {key: tensor[max(wanted.start - begin, 0) : max(wanted.stop - begin, 0)] for key, tensor in tensors.items()}
        for tensors, begin in zip(held, ends - amounts, strict=True)
    ]
    return {key: torch.cat([piece[key] for piece in pieces]) for key in held[0]}
