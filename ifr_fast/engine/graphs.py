"""Solves recorded as CUDA graphs: a solve launches a hundred kernels of microseconds each, and replaying them costs the
host one launch.

Batches are padded with zero samples up to a bucket, so that varying RoI counts replay few recordings. A shape is run
eagerly when first met, recorded when a thread meets it again. Recordings on a stream share one memory pool: what a
replay leaves there is copied out before the stream's next one. Threads take turns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from threading import Lock, local
from typing import Any

import torch
from torch import Tensor

from .._torch import copy_all
from ..kernels.contract import memory_format

LIMIT = 64  # recordings kept, of all shapes, devices and streams; the least recently used goes first

Function = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


@dataclass
class Recording:
    """Inputs that a replay reads, the threads that ran the function on them, and, once recorded, the graph and the
    results that it writes."""

    batch: list[Tensor]
    shared: list[Tensor]
    threads: set[object] = field(default_factory=set)
    replay: Callable[[], None] | None = None
    results: Sequence[Tensor] = ()

    def fill(self, batch: Sequence[Tensor], shared: Sequence[Tensor]) -> None:
        n = len(batch[0])
        for padded, given in zip(self.batch, batch, strict=True):
            padded[:n].copy_(given)
            padded[n:].zero_()
        copy_all(self.shared, shared)


class _Thread(local):
    """Tells a thread from all others, also from those that have ended."""

    def __init__(self) -> None:
        self.token = object()


_thread = _Thread()
_recordings: OrderedDict[Hashable, Recording] = OrderedDict()
_pools: dict[Hashable, tuple[Any, torch.cuda.Stream]] = {}
_lock = Lock()  # between filling a recording's inputs and copying its results nobody else may replay


def bucket(n: int) -> int:
    """n rounded up to one of eight sizes an octave: at most an eighth more."""
    step = 1 << max(0, (n - 1).bit_length() - 4)
    return -(-n // step) * step


def usable(x: Tensor) -> bool:
    """Can calls on x be replayed? Not on a CPU, of no samples, or inside a recording of the caller's own."""
    return x.is_cuda and len(x) > 0 and not torch.cuda.is_current_stream_capturing()


def run(
    function: Function, options: Hashable, batch: Sequence[Tensor], shared: Sequence[Tensor], dims: Sequence[int | None]
) -> list[Tensor]:
    """function(batch, shared), replayed where that was recorded.

    batch: tensors of n samples each in dimension 0; shared: the others. options: what else the function's work depends
    on. dims: for every result the dimension that counts samples, or None. The function must be free of
    synchronisation, and zero samples must not change the others' results.
    """
    n = len(batch[0])
    stream = current_stream(batch[0].device)
    signature = (*(_signature(t[:1]) for t in batch), *(_signature(t) for t in shared))
    key = (options, bucket(n), stream, signature, _settings())
    # Buffers made in inference mode could not be written outside of it.
    with _lock, torch.inference_mode(False), torch.no_grad():
        recording = _recordings.get(key)
        if recording is None:
            recording = Recording([_padded(t, bucket(n)) for t in batch], [torch.empty_like(t) for t in shared])
        recording.fill(batch, shared)
        # cuDNN's and cuBLAS's handles and plans are each thread's own, and must not be made while recording.
        if recording.replay is None and _thread.token in recording.threads:
            record = capture(lambda: function(recording.batch, recording.shared), stream)
            recording.replay, recording.results = record
        if recording.replay is not None:
            recording.replay()
            results = recording.results
        else:
            results = function(recording.batch, recording.shared)
            recording.threads.add(_thread.token)
        _recordings[key] = recording
        _recordings.move_to_end(key)
        if len(_recordings) > LIMIT:
            _recordings.popitem(last=False)
        return [r.clone() if d is None else r.narrow(d, 0, n).clone() for r, d in zip(results, dims, strict=True)]


def capture(function: Callable[[], Sequence[Tensor]], stream: Hashable) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """A CUDA graph of function's work on the current device, to be replayed on `stream`: what replays it, and the
    results it writes."""
    if stream not in _pools:
        # Of this device: torch's own stream for captures stays on the first device that it was used on. One for all
        # recordings of a pool, for the allocator gives memory that is free again to the stream alone that had it.
        _pools[stream] = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    pool, side = _pools[stream]
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its stream the current one. thread_local: other threads, as those that load data, may
    # go on allocating.
    caller = torch.cuda.stream(torch.cuda.current_stream())
    with caller, torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        results = function()
    return graph.replay, results


def current_stream(device: torch.device) -> Hashable:
    return device, torch.cuda.current_stream(device).cuda_stream


def clear() -> None:
    """Forgets every recording and frees its memory."""
    with _lock:
        _recordings.clear()
        _pools.clear()


def _signature(t: Tensor) -> Hashable:
    return tuple(t.shape), t.stride(), t.dtype


def _settings() -> Hashable:
    """What torch chooses the kernels of convolutions and products by."""
    cudnn: Any = torch.backends.cudnn
    deterministic = torch.are_deterministic_algorithms_enabled()
    return cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision, deterministic


def _padded(t: Tensor, n: int) -> Tensor:
    """Room for n samples like t's, in the memory format that calls keep."""
    return torch.empty((n, *t.shape[1:]), dtype=t.dtype, device=t.device, memory_format=memory_format(t))
