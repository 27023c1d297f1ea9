"""One function of fixed shapes as one CUDA graph: a launch instead of thousands."""

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

# The calls in which libraries, compiled regions and their backward passes set themselves up.
EAGER_CALLS = 3


class Captured:
    """Calls `function`, and from the fourth call on replays what it did.

    The first calls run as they are, on the stream that is captured later: they do their work, and warm everything up
    that must not happen during capture. So nothing has to be undone afterwards. What the function changes, it must
    change in place; what it reads besides its arguments must stay where it is. Random numbers go on: the default
    generator keeps its position on the device.
    """

    def __init__(self, function: Callable[[Tensors], Tensors], device: torch.device):
        self.function = function
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0
        self.inputs: Tensors = {}
        self.outputs: Tensors = {}

    def __call__(self, inputs: Tensors) -> Tensors:
        """Inputs on any device, of the same shapes at every call -> outputs, which the next call overwrites."""
        self._receive(inputs)
        if self.calls < EAGER_CALLS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.outputs = self.function(self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.graph is None:
                self.outputs = {}
                self.graph = torch.cuda.CUDAGraph()
                # With several ranks another thread, NCCL's, watches over what ran before.
                mode = "thread_local" if torch.distributed.is_initialized() else "global"
                with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode=mode):
                    self.outputs = self.function(self.inputs)
            self.graph.replay()
        self.calls += 1
        return self.outputs

    def _receive(self, inputs: Tensors) -> None:
        if not self.inputs:
            device = self.stream.device
            self.inputs = {key: torch.empty_like(value, device=device) for key, value in inputs.items()}
        for key, value in inputs.items():
            source = value.pin_memory() if value.device.type == "cpu" else value
            self.inputs[key].copy_(source, non_blocking=True)
