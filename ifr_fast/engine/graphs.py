"""Records solves as CUDA graphs. A solve launches a hundred kernels of microseconds each; a replay takes one launch.

Batches are padded with zero samples up to a bucket, so that varying RoI counts need few recordings. A shape without a
recording is run eagerly when a thread first meets it, and recorded when that thread meets it again. Recordings on a
stream share one memory pool, so the results of a replay are copied out before the stream's next one. Threads take
turns.
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

# How many recordings are kept, over all shapes, devices and streams. The least recently used goes first.
LIMIT = 64

Function = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


@dataclass
class Recording:
    """The inputs that a replay reads, and the threads that have run the function on them. Once recorded, also the graph
    and the results that it writes."""

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
    """Identifies a thread, even among threads that have ended."""

    def __init__(self) -> None:
        self.token = object()


_thread = _Thread()
_recordings: OrderedDict[Hashable, Recording] = OrderedDict()
_pools: dict[Hashable, tuple[Any, torch.cuda.Stream]] = {}
_lock = Lock()  # held from filling a recording's inputs until its results are copied out


def bucket(n: int) -> int:
    """n rounded up to one of eight sizes an octave, so by at most an eighth."""
    step = 1 << max(0, (n - 1).bit_length() - 4)
    return -(-n // step) * step


def usable(x: Tensor) -> bool:
    """Whether calls on x can be replayed: not on a CPU, not without samples, not while the caller records a graph."""
    return x.is_cuda and len(x) > 0 and not torch.cuda.is_current_stream_capturing()


def run(
    function: Function, options: Hashable, batch: Sequence[Tensor], shared: Sequence[Tensor], dims: Sequence[int | None]
) -> list[Tensor]:
    """function(batch, shared), replayed if it was recorded.

    batch: tensors of n samples each, in dimension 0. shared: the other tensors. options: whatever else determines the
    function's work. dims: for every result the dimension that counts samples, or None. The function must not
    synchronise with the device, and zero samples must not change the other samples' results.
    """
    n = len(batch[0])
    stream = current_stream(batch[0].device)
    signature = (*(_signature(t[:1]) for t in batch), *(_signature(t) for t in shared))
    key = (options, bucket(n), stream, signature, _settings())
    # Buffers made in inference mode could not be written to outside of it.
    with _lock, torch.inference_mode(False), torch.no_grad():
        recording = _recordings.get(key)
        if recording is None:
            recording = Recording([_padded(t, bucket(n)) for t in batch], [torch.empty_like(t) for t in shared])
        recording.fill(batch, shared)
        # Each thread has its own handles and plans of cuDNN and cuBLAS. They must not be made while recording.
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
    """Records function's work on the current device as a CUDA graph for replays on `stream`. Returns a function that
    replays it, and the results that a replay writes."""
    if stream not in _pools:
        # Torch's own stream for captures stays on the first device that it was used on, so make one on this device. All
        # recordings of a pool share it, because the allocator returns freed memory to the same stream only.
        _pools[stream] = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    pool, side = _pools[stream]
    graph = torch.cuda.CUDAGraph()
    # A capture that fails would leave its stream the current one; `caller` restores the old one. thread_local lets
    # other threads, such as data loaders, go on allocating.
    caller = torch.cuda.stream(torch.cuda.current_stream())
    with caller, torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        results = function()
    return graph.replay, results


def current_stream(device: torch.device) -> Hashable:
    return device, torch.cuda.current_stream(device).cuda_stream


def clear() -> None:
    """Discards all recordings and frees their memory."""
    with _lock:
        _recordings.clear()
        _pools.clear()


def _signature(t: Tensor) -> Hashable:
    return tuple(t.shape), t.stride(), t.dtype


def _settings() -> Hashable:
    """The settings by which torch chooses kernels for convolutions and matrix products."""
    cudnn: Any = torch.backends.cudnn
    deterministic = torch.are_deterministic_algorithms_enabled()
    return cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision, deterministic


def _padded(t: Tensor, n: int) -> Tensor:
    """An empty tensor for n samples like t's, in the memory format that calls keep."""
    return torch.empty((n, *t.shape[1:]), dtype=t.dtype, device=t.device, memory_format=memory_format(t))
