"""Records a function as CUDA graphs in which a solve may end early, and replays them.

With the extension's CUDA kernels that is one graph, and the device itself skips what is not needed. Without them it is
a graph for each segment: the host skips those that it knows not to be needed.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, cached_property
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import choose
from . import segments

logger = logging.getLogger(choose.PACKAGE)


class Pool:
    """The memory of a stream's recordings, and the streams on which they are recorded.

    The allocator gives memory that is free again to the stream alone that had it before, so all recordings share these.
    They are made on the current device; torch's own stream for captures stays on the first device that it was used on.
    """

    def __init__(self) -> None:
        self.handle: Any = torch.cuda.graph_pool_handle()
        # torch has 32 streams and gives the first one out again after the last: made together, these differ. inner: for
        # conditional parts of a graph, and for those within them.
        self.stream, *self.inner = (torch.cuda.Stream() for _ in range(3))

    def leave_memory(self) -> None:
        """After a capture that failed: torch may go on taking the memory for one that is being captured into."""
        self.handle = torch.cuda.graph_pool_handle()

    @cached_property
    def inner_memory(self) -> torch.cuda.MemPool:
        """The memory that these parts allocate."""
        return torch.cuda.MemPool()


class Piece(NamedTuple):
    """A graph. skippable: it need not be replayed if no sample runs. status: of the solve whose segment ends here, if
    another segment follows."""

    replay: Callable[[], None]
    skippable: bool
    status: Tensor | None


def replay(pieces: Sequence[Piece]) -> None:
    """Launches the pieces on the current stream, without those that are known not to be needed."""
    course = segments.Watch()
    for piece in pieces:
        if not piece.skippable:
            course = segments.Watch()
        elif course.none_runs():
            continue
        piece.replay()
        if piece.status is not None:
            course.segment_ends(piece.status)


def record(function: Callable[[], Sequence[Tensor]], pool: Pool) -> tuple[Sequence[Piece], Sequence[Tensor]]:
    """Records function's work on the current device. Returns its pieces, and the results that a replay writes."""
    if (conditional := conditional_nodes()) is not None:
        try:
            return _record(function, pool, OneGraph(pool, conditional))
        except RuntimeError as error:
            _refused.append(str(error))
            try:
                with rehearsal():  # chunks have another size now
                    function()
                recorded = _record(function, pool, Pieces())
            except BaseException:
                _refused.clear()  # it was not for the nodes
                raise
            logger.warning("CUDA graphs without conditional nodes, so a replay may run longer than needed: %s", error)
            return recorded
    return _record(function, pool, Pieces())


def rehearsal() -> AbstractContextManager[None]:
    """For a run of a function on the inputs with which it will be recorded."""
    return segments.recording(segments.Rehearsal(with_branches=conditional_nodes() is not None))


_refused: list[str] = []  # why a recording with conditional nodes failed; none is tried again


def conditional_nodes() -> ModuleType | None:
    """The module that makes parts of a graph conditional, if this build and driver can."""
    return None if _refused else _conditional_nodes()


@cache
def _conditional_nodes() -> ModuleType | None:
    if not choose.backends()["cuda"].available:
        return None
    found = importlib.import_module(f"{choose.__package__}.cuda.conditional")
    return found if found.available() else None


def _record(
    function: Callable[[], Sequence[Tensor]], pool: Pool, recorder: Pieces | OneGraph
) -> tuple[Sequence[Piece], Sequence[Tensor]]:
    # A capture that fails would leave its stream the current one; `caller` restores the old one. thread_local lets
    # other threads, such as data loaders, go on allocating.
    caller = torch.cuda.stream(torch.cuda.current_stream())
    graph: Any = recorder  # it has what torch.cuda.graph calls of a CUDAGraph
    capture = torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local")
    try:
        with caller, capture, segments.recording(recorder):
            results = function()
    except BaseException:
        pool.leave_memory()
        raise
    return recorder.pieces, results


class Pieces(segments.Course):
    """A graph for each segment. To torch it is the CUDAGraph that is captured: where a segment ends, so does a graph,
    and another one begins."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self._skippable = False

    def capture_begin(self, *pool: Any, **options: Any) -> None:
        self._options = pool, options
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(*pool, **options)

    def capture_end(self) -> None:
        self._finish(None)

    def segment_ends(self, status: Tensor) -> None:
        self._cut(status)

    def solve_ends(self) -> None:
        self._cut(None)

    def _cut(self, status: Tensor | None) -> None:
        self._finish(status)
        self._skippable = status is not None
        pool, options = self._options
        self.capture_begin(*pool, **options)

    def _finish(self, status: Tensor | None) -> None:
        self._graph.capture_end()
        self.pieces.append(Piece(self._graph.replay, self._skippable, status))


class OneGraph(segments.Course):
    """One graph, in which all segments but a solve's first are conditional. To torch it is a CUDAGraph."""

    branches = True

    def __init__(self, pool: Pool, conditional: ModuleType) -> None:
        self.pieces: list[Piece] = []
        self._pool, self._conditional = pool, conditional
        self._memory = ExitStack()
        # For every branch that is being recorded, and for what surrounds them: its segment, if that is conditional.
        self._open = [ExitStack()]
        self._depth = 0  # conditional parts of the graph, within each other, that are being recorded

    def capture_begin(self, *pool: Any, **options: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(*pool, **options)
        # The graph's own pool serves its stream alone. What is allocated on others comes from this one.
        self._memory.enter_context(torch.cuda.use_mem_pool(self._pool.inner_memory))

    def capture_end(self) -> None:
        with ExitStack() as last:
            last.callback(self._graph.capture_end)
            last.push(self._memory)
            for segment in self._open:
                last.push(segment)
        self.pieces.append(Piece(self._graph.replay, False, None))

    def segment_ends(self, status: Tensor) -> None:
        self._open[-1].close()
        self._open[-1].enter_context(self._part(status, 1, len(status)))

    @contextmanager
    def branch(self, status: Tensor, least: int, most: int) -> Iterator[None]:
        self._open[-1].close()
        with self._part(status, least, most), ExitStack() as segment:
            self._open.append(segment)
            yield
            self._open.pop()

    def solve_ends(self) -> None:
        self._open[-1].close()

    @contextmanager
    def _part(self, status: Tensor, least: int, most: int) -> Iterator[None]:
        """What is recorded within is a conditional part of what the current stream records."""
        inner = self._pool.inner[self._depth]
        self._conditional.begin(status, least, most, inner)
        self._depth += 1
        try:
            with torch.cuda.stream(inner):
                yield
        finally:
            self._depth -= 1
            self._conditional.end(inner)
