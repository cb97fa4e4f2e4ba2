"""Weights transformed for Winograd's convolutions (winograd.py), kept between solves. Public as ifr_fast.weight_cache.

A block's weights serve many solves, but nothing tells reliably whether they are still the same: weight normalisation
makes new tensors in every call, and `parameter.data.copy_()`, by which EMA swaps and some optimizers write, leaves a
tensor's version alone. So each entry keeps a copy of the weight that it was made of, and serves equal ones only.

What was used longest ago is dropped beyond `limit` bytes. A block that is garbage collected empties the cache: what
others need is made anew when they need it.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import address

CPU = torch.device("cpu")
DEFAULT_LIMIT = 128 << 20
PAGE = 2 << 20  # bytes of a large page
MOST_FREE = 32 << 20  # bytes that wait to be used again

Key = tuple[Any, ...]


class Entry(NamedTuple):
    weight: Tensor
    transformed: Tensor

    @property
    def bytes(self) -> int:
        return self.weight.nbytes + self.transformed.nbytes


_entries: OrderedDict[Key, Entry] = OrderedDict()
_limit = DEFAULT_LIMIT
_free: list[mmap.mmap] = []
_local = threading.local()
_lock = threading.RLock()  # a block may be garbage collected, which clears the cache, while this thread holds it


def set_limit(limit: int) -> None:
    """Keeps at most `limit` bytes from now on; 0 keeps nothing, so that every solve transforms its weights.

    A block of C channels takes 360·C² bytes, 23.6 MB at C = 256, and as much again for the adjoint. In training the
    weights are new in every step, so past ones fill the limit. It is 128 MiB at first. Raises ValueError unless limit
    is an int ≥ 0.
    """
    global _limit
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ValueError(f"limit={limit!r}: expected a number of bytes, 0 or more")
    with _lock:
        _limit = limit
        _trim()


def clear() -> None:
    """Drops everything that is kept, and what the convolutions of the calling thread worked in."""
    forget_weights()
    vars(_local).clear()
    with _lock:
        _free.clear()


def forget_weights() -> None:
    with _lock:
        _entries.clear()


def size() -> int:
    """The bytes that are kept."""
    with _lock:
        return _bytes()


def transformed(weight: Tensor, transposed: bool, transform: Callable[[Tensor, bool, Tensor], None]) -> Tensor:
    """What transform(weight, transposed, out) writes, four numbers for one of the weight, or what it wrote for an equal
    weight. Not to be written to.

    weight: (out, in, 3, 3) in float32 on a CPU, contiguous.
    """
    # Of some numbers, as bits, since NaN differs from itself. The whole weight is compared below.
    some = weight.detach().view(torch.int32).flatten()[:: max(1, weight.numel() // 61)]
    key = transposed, weight.shape, *some.tolist()
    with _lock:
        entry = _entries.pop(key, None)
        if entry is not None:
            _entries[key] = entry  # as the last used
    if entry is not None and _equal(entry.weight, weight):
        return entry.transformed
    with _lock:
        _trim(5 * weight.nbytes)  # before, so that its memory can be used again
    made = Entry(large_pages(weight.numel()), large_pages(4 * weight.numel()))
    made.weight.copy_(weight.detach().flatten())
    transform(weight, transposed, made.transformed)
    with _lock:
        _entries.pop(key, None)
        _entries[key] = made
        _trim()
    return made.transformed


def workspace(floats: int) -> Tensor:
    """The memory that the convolutions of this thread's solves work in. It is kept, as to get it takes as long as a
    convolution."""
    if len(getattr(_local, "workspace", ())) < floats:
        _local.workspace = large_pages(floats)
    return _local.workspace


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two weights of one shape are the same, bit for bit. torch.equal takes one thread."""
    from .. import _native  # which only a solve by the compiled kernels needs

    count, name = a.numel(), "weight"
    places = (address(t, name, torch.float32, count, CPU) for t in (a, b))
    return _native.equal({
        **dict(zip("ab", places, strict=True)), "count": count, "threads": torch.get_num_threads()
    })  # fmt: skip


def _bytes() -> int:
    return sum(entry.bytes for entry in list(_entries.values()))


def _trim(needed: int = 0) -> None:
    """Drops what was used longest ago, until `needed` bytes more would fit."""
    while _entries and _bytes() + needed > _limit:
        _entries.popitem(last=False)


def large_pages(count: int) -> Tensor:
    """Room for `count` float32 numbers, in large pages where the system has them: what is read from end to end loses a
    tenth of the time to looking up the addresses of small ones.

    Once the tensor that was returned is gone, its memory is given again: views of it do not hold it. In training every
    step has new weights, and to get fresh memory can take longer than to transform them.
    """
    size = 4 * count
    if size < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=torch.float32, device=CPU)
    with _lock:
        memory = next((m for m in _free if len(m) == size + PAGE), None)
        if memory is not None:
            _free.remove(memory)
    if memory is None:
        memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # from systems built without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
    room = torch.frombuffer(memory, dtype=torch.float32, count=count, offset=start)
    weakref.finalize(room, _give_back, memory).atexit = False
    return room


def _give_back(memory: mmap.mmap) -> None:
    with _lock:
        _free.append(memory)
        while sum(map(len, _free)) > MOST_FREE:
            del _free[0]


def _after_fork() -> None:
    """Another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
