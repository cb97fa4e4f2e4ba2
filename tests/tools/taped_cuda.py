"""A device that is not there: what torch.cuda and the kernels do for solves on a GPU, on CPU tensors.

`device` makes solves run as on a GPU: the loop is not told how many samples run, a copy of a status arrives when the
test says so, and a CUDA graph is a tape of the operators that were called while it was captured. A replay calls them
again on the same memory. A conditional part of a graph is replayed only if a sample runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ifr_fast.engine import graphs, pieces, segments
from ifr_fast.kernels import eager
from ifr_fast.kernels.contract import RUNNING


class Tape(list):
    """Operators that were called, with their results; and parts (status, tape)."""

    def replay(self) -> None:
        for entry in self:
            entry()


def call_again(function: Any, args: tuple, kwargs: dict, result: Any) -> None:
    new = function(*args, **kwargs)
    for kept, again in zip(tree_leaves(result), tree_leaves(new), strict=True):
        if isinstance(kept, Tensor) and kept.untyped_storage().data_ptr() != again.untyped_storage().data_ptr():
            # Memory that was only reserved may have been another's meanwhile.
            kept.copy_(torch.full_like(again, -7) if function in EMPTY else again)


EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default}


class Recording(TorchDispatchMode):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.device.tapes[-1].append(lambda: call_again(function, args, kwargs or {}, result))
        return result


class Device:
    """batches: of how many samples F's tail has been computed, in captures, replays and out of them. sent: copies of
    statuses. arrives: whether a copy has arrived, by how many have been asked for since, itself included."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.batches: list[int] = []
        self.sent: list[Sent] = []
        self.arrives: Callable[[int], bool] = lambda later: False
        self.captures = 0
        self.lost: list[Any] = []  # memory
        self.current = "the caller's"

    @property
    def evaluations(self) -> int:
        return len(self.batches)

    def counted(self, y: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.batches.append(len(y))
        if self.tapes:
            self.tapes[-1].append(lambda: self.batches.append(len(y)))
        return eager_tail(y, *args, **kwargs)


eager_tail, eager_assess = eager.tail, eager.assess


class Sent:
    def __init__(self, device: Device, status: Tensor) -> None:
        self.device, self.status = device, status.clone()
        device.sent.append(self)

    def arrived(self) -> bool:
        return self.device.arrives(len(self.device.sent) - self.device.sent.index(self))


class Graph:
    """A torch.cuda.CUDAGraph."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def capture_begin(self, *_: Any, **__: Any) -> None:
        self.device.captures += 1
        self.tape = Tape()
        self.device.tapes.append(self.tape)
        self.mode = Recording(self.device)
        self.mode.__enter__()

    def capture_end(self) -> None:
        self.mode.__exit__(None, None, None)
        assert self.device.tapes.pop() is self.tape

    def replay(self) -> None:
        self.tape.replay()


class Conditional:
    """kernels.cuda.conditional"""

    def __init__(self, device: Device) -> None:
        self.device = device

    def begin(self, status: Tensor, least: int, most: int, inner: Any) -> None:
        part = Tape()
        self.device.tapes[-1].append(lambda: least <= (status == RUNNING).sum() <= most and part.replay())
        self.device.tapes.append(part)

    def end(self, inner: Any) -> None:
        self.device.tapes.pop()


@pytest.fixture(name="device")
def device_fixture(monkeypatch) -> Iterator[Device]:
    device = Device()

    @contextlib.contextmanager
    def graph(graph, *, pool, stream, capture_error_mode):
        """As torch's: a capture that fails leaves its stream the current one, and its memory cannot be used again."""
        assert pool not in device.lost
        device.current = stream
        graph.capture_begin(pool, capture_error_mode=capture_error_mode)
        try:
            yield
        except BaseException:
            device.lost.append(pool)
            graph.capture_end()
            raise
        graph.capture_end()
        device.current = "the caller's"

    @contextlib.contextmanager
    def using(stream):
        before, device.current = device.current, stream
        try:
            yield
        finally:
            device.current = before

    for name, value in {
        "CUDAGraph": lambda: Graph(device), "graph": graph, "graph_pool_handle": object, "Stream": object,
        "stream": using, "current_stream": lambda: device.current, "MemPool": object,
        "use_mem_pool": lambda pool: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: bool(device.tapes),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphs, "current_stream", lambda _: "the caller's")
    monkeypatch.setattr(graphs, "usable", lambda x: len(x) > 0)
    monkeypatch.setattr(pieces, "conditional_nodes", lambda: None)
    monkeypatch.setattr(pieces, "_refused", [])
    monkeypatch.setattr(segments, "on_gpu", lambda z: True)
    monkeypatch.setattr(segments, "Sent", lambda status: Sent(device, status))
    monkeypatch.setattr(eager, "tail", device.counted)
    monkeypatch.setattr(eager, "assess", lambda *args: (eager_assess(*args), None)[1])
    graphs.clear()
    yield device
    graphs.clear()
