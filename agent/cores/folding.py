"""Many models side by side in one call of a kernel: the models' axis is folded into the batch."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., tuple[Any, Any]]


def fold(operator: Callable[..., Any], shared: Collection[int] = ()) -> Rule:
    """The vmap rule, for `torch.library.register_vmap`, of an operator whose tensors all begin with the batch B.

    Plain torch code needs no such rule. A kernel does, since it takes a fixed number of axes. Models (S, B, ...) become
    one batch (S * B, ...), which also fills a GPU better than S calls.

    Args:
        operator: takes tensors (B, ...) and plain values; returns a tensor (B, ...) or several.
        shared: places of arguments without a batch, such as coefficients. Where models differ in one of them, each has
            a call of its own.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        models = info.batch_size
        if any(in_dims[place] is not None for place in shared):
            given = list(zip(arguments, in_dims, strict=True))
            calls = [operator(*(_of(model, *each) for each in given)) for model in range(models)]
            several = not isinstance(calls[0], Tensor)
            found = tuple(map(torch.stack, zip(*calls, strict=True))) if several else torch.stack(calls)
            return found, _zeros(found)
        folded = [
            argument if place in shared or not isinstance(argument, Tensor) else _folded(argument, dim, models)
            for place, (argument, dim) in enumerate(zip(arguments, in_dims, strict=True))
        ]
        result = operator(*folded)
        if isinstance(result, Tensor):
            found = _unfolded(result, models)
        else:
            found = tuple(_unfolded(each, models) for each in result)
        return found, _zeros(found)

    return rule


def _folded(x: Tensor, dim: int | None, models: int) -> Tensor:
    """(S at `dim`, B, ...), or (B, ...) for all S models, -> (S * B, ...)."""
    x = x.expand(models, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _unfolded(x: Tensor, models: int) -> Tensor:
    return x.unflatten(0, (models, x.shape[0] // models))


def _of(model: int, argument: Any, dim: int | None) -> Any:
    return argument if dim is None else argument.select(dim, model)


def _zeros(found: Any) -> Any:
    return 0 if isinstance(found, Tensor) else (0,) * len(found)
