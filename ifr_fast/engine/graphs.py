"""Records solves as CUDA graphs. A solve launches a hundred kernels of microseconds each; a replay takes one launch.

Batches are padded up to a bucket, so that varying RoI counts need few recordings. A shape without a recording is run
eagerly when a thread first meets it, and recorded when that thread meets it again. Recordings on a stream share one
memory pool, so the results of a replay are copied out before the stream's next one. Threads take turns.

A replay ends where no sample runs any more, as a solve that is launched does (pieces.py, segments.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from threading import Lock, local
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .._torch import copy_all
from ..kernels.contract import memory_format
from .pieces import Piece, Pool, record, rehearsal, replay

SIZES = 16  # sizes of buckets in an octave


def bucket(n: int) -> int:
    """n rounded up to one of SIZES sizes an octave, so by at most a sixteenth."""
    step = max(1, (1 << (n - 1).bit_length()) // (2 * SIZES))
    return -(-n // step) * step


# How many recordings are kept, over all shapes, devices and streams: forward and backward of all batches up to 512. The
# least recently used goes first.
LIMIT = 2 * len({bucket(n) for n in range(1, 513)})

Function = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


@dataclass
class Recording:
    """The inputs that a replay reads, and the threads that have run the function on them. Once recorded, also the
    graphs, the pool that holds their memory, and the results that they write."""

    batch: list[Tensor]
    shared: list[Tensor]
    threads: set[object] = field(default_factory=set)
    pieces: Sequence[Piece] = ()
    pool: Pool | None = None
    results: Sequence[Tensor] = ()

    def fill(self, batch: Sequence[Tensor], shared: Sequence[Tensor], *, repeat: bool) -> None:
        n = len(batch[0])
        for padded, given in zip(self.batch, batch, strict=True):
            padded[:n].copy_(given)
            if repeat:
                padded[n:].copy_(given[-1:])
            else:
                padded[n:].zero_()
        copy_all(self.shared, shared)


class _Thread(local):
    """Identifies a thread, even among threads that have ended."""

    def __init__(self) -> None:
        self.token = object()


_thread = _Thread()
_recordings: OrderedDict[Hashable, Recording] = OrderedDict()
# A pool goes with the last of its recordings: torch gives no memory to a pool whose graphs are all gone.
_pools: WeakValueDictionary[Hashable, Pool] = WeakValueDictionary()
_lock = Lock()  # held from filling a recording's inputs until its results are copied out


def usable(x: Tensor) -> bool:
    """Whether calls on x can be replayed: not on a CPU, not without samples, not while the caller records a graph."""
    return x.is_cuda and len(x) > 0 and not torch.cuda.is_current_stream_capturing()


def run(
    function: Function,
    options: Hashable,
    batch: Sequence[Tensor],
    shared: Sequence[Tensor],
    dims: Sequence[int | None],
    *,
    repeat: bool = False,
) -> list[Tensor]:
    """function(batch, shared), replayed if it was recorded.

    batch: tensors of n samples each, in dimension 0. shared: the other tensors. options: whatever else determines the
    function's work. dims: for every result the dimension that counts samples, or None. repeat: pad with the last sample
    instead of zeros. The function must not synchronise with the device, and padding must not change the results of
    other samples, nor those without a dimension of samples.
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
        recording.fill(batch, shared, repeat=repeat)
        # Each thread has its own handles and plans of cuDNN and cuBLAS. They must not be made while recording.
        if not recording.pieces and _thread.token in recording.threads:
            pool = recording.pool = _pools.get(stream) or _pools.setdefault(stream, Pool())
            recording.pieces, recording.results = record(lambda: function(recording.batch, recording.shared), pool)
        if recording.pieces:
            replay(recording.pieces)
            results = recording.results
        else:
            with rehearsal():
                results = function(recording.batch, recording.shared)
            recording.threads.add(_thread.token)
        _recordings[key] = recording
        _recordings.move_to_end(key)
        if len(_recordings) > LIMIT:
            _recordings.popitem(last=False)
        return [r.clone() if d is None else r.narrow(d, 0, n).clone() for r, d in zip(results, dims, strict=True)]


def current_stream(device: torch.device) -> Hashable:
    return device, torch.cuda.current_stream(device).cuda_stream


def clear() -> None:
    """Discards all recordings and frees their memory."""
    with _lock:
        _recordings.clear()


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
