"""Triton's interpreter, which runs kernels where there is no GPU, mended for bf16.

It keeps bf16 as the integers of its bits, which its product of tiles multiplies as such, and it rounds by adding to the
mantissa without a carry to the exponent. Here both are done as a GPU does them.
"""

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which importing the agent may do

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Let interpreted kernels compute in bf16; once for a process."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        """Bits of one format to bits of another; numpy has no bf16, so torch rounds."""
        flat = torch.from_numpy(np.ascontiguousarray(data).reshape(-1))
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = flat.view(torch.float32).to(torch.bfloat16).view(torch.uint16).numpy()
        elif (source, target) == (tl.bfloat16, tl.float32):
            bits = flat.view(torch.uint16).view(torch.bfloat16).float().view(torch.uint32).numpy()
        else:
            return convert(data, source, target, rounding)
        return bits.reshape(data.shape)

    def wide(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = convert_float(operand.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """Products of bf16 numbers are exact in fp32."""
        return dot(self, wide(a), wide(b), *rest)

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = convert_float, create_dot
