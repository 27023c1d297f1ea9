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
    return {
        "carry": {
            "state": deal_tensors([carry["state"] for carry in carries], amounts, wanted),
            **deal_tensors([{key: carry[key] for key in ("z", "action")} for carry in carries], amounts, wanted),
        },
        "streams": _deal_streams([state["streams"] for state in states], amounts, wanted),
    }


def _deal_streams(states: list[dict[str, Any]], amounts: list[int], wanted: range) -> dict[str, Any]:
    """What `Streams.state_dict` gave; episodes of a rank that had lost them are lost, and no others."""
    known = [state["row"] for state in states if state["row"] is not None]
    rows, dealt = [], {}
    for state, amount in zip(states, amounts, strict=True):
        lost = (
            {key: torch.zeros(amount, *value.shape[1:], dtype=value.dtype) for key, value in known[0].items()}
            if known
            else {}
        )
        rows.append(lost if state["row"] is None else state["row"])
    actions = [
        [None] * amount if state["row"] is None else state["actions"]
        for state, amount in zip(states, amounts, strict=True)
    ]
    for key in ("episodes", "returns", "lengths"):
        dealt[key] = [value for state in states for value in state[key]][wanted.start : wanted.stop]
    return dealt | {
        "row": deal_tensors(rows, amounts, wanted) if known else None,
        "actions": [value for each in actions for value in each][wanted.start : wanted.stop],
        "restarts": max(state["restarts"] for state in states),
    }


def deal_replay(states: Sequence[Mapping[str, Any]], wanted: range, seed: int) -> dict[str, Any]:
    """What `Replay.state_dict` gave, of the streams `wanted`; draws begin anew from `seed`."""
    amounts = [state["streams"] for state in states]
    queue, discarded, before = [], [], 0
    for state, amount in zip(states, amounts, strict=True):
        queue += [(before + stream - wanted.start, start) for stream, start in state["queue"]]
        discarded += [(before + stream - wanted.start, *span) for stream, *span in state["discarded"]]
        before += amount
    here = range(len(wanted))
    return {
        **{key: states[0][key] for key in ("stride", "oldest", "next", "begin")},
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
