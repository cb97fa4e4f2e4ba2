"""What the kernels need to know of a GPU, and the data types that they take."""

from __future__ import annotations

from functools import cache

import torch

from ... import _native

DTYPES = {
    torch.float32: _native.DType.f32,
    torch.bfloat16: _native.DType.bf16,
    torch.float16: _native.DType.f16,
}
HISTORIES = {**DTYPES, torch.float8_e5m2: _native.DType.e5m2}


def stream(device: torch.device) -> int:
    """The address of the current stream."""
    return torch.cuda.current_stream(device).cuda_stream


@cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def shared_memory(device: torch.device) -> int:
    """The bytes that a block of threads can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
