"""Segments of a solve on a GPU: the solve may end after each of them. Nothing here waits for the device.

The kernels skip samples that have stopped, but cuDNN convolves all samples. So a solve is cut into segments, and no
further one is launched once no sample runs. The host knows this from copies of the samples' status. It only asks
whether a copy has arrived, so a host that is far ahead of the device ends the solve later, or not at all. A recorded
solve is cut in the same places (pieces.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import local

import torch
from torch import Tensor

from ..kernels.contract import RUNNING

SEGMENTS = 4
SHORTEST = 2  # evaluations in a segment


class Course:
    """Is told where a solve's segments end, and says whether the solve may end too. This one lets it run to its end.

    branches: whether the device can choose between two ways to go on (`branch`). rehearses: whether a recording with
    branches is to follow.
    """

    branches = False
    rehearses = False

    def segment_ends(self, status: Tensor) -> None:
        """A segment has been launched, and another one follows. status (n,): the solve's, on its device."""

    def none_runs(self) -> bool:
        """Whether every sample is known to have stopped."""
        return False

    def branch(self, status: Tensor, least: int, most: int) -> AbstractContextManager[None]:
        """What is launched within runs only if at least `least` samples of this status run, and at most `most`."""
        raise NotImplementedError(f"{type(self).__name__} has no branches")

    def solve_ends(self) -> None:
        """The last segment, of a solve or within a branch, has been launched. What follows must always run."""


class Watch(Course):
    """The course of a solve that is launched now."""

    def __init__(self) -> None:
        self._sent: deque[Sent] = deque()
        self._known = False

    def segment_ends(self, status: Tensor) -> None:
        self._sent.append(Sent(status))

    def none_runs(self) -> bool:
        while not self._known and self._sent and self._sent[0].arrived():
            self._known = not (self._sent.popleft().status == RUNNING).any()
        return self._known

    def solve_ends(self) -> None:
        self._sent.clear()
        self._known = False


class Rehearsal(Course):
    """The course of solves that will be recorded. They do not end early: whatever the recording launches is compiled or
    planned now, because that must not happen while a graph is recorded. with_branches: that will be recorded too."""

    def __init__(self, with_branches: bool) -> None:
        self.rehearses = with_branches


class Sent:
    """A status (n,) on its way from the device to the host."""

    def __init__(self, status: Tensor) -> None:
        self.status = torch.empty(status.shape, dtype=status.dtype, pin_memory=True)
        self.status.copy_(status, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def arrived(self) -> bool:
        return self._event.query()


class _Recorder(local):
    """A thread's course of solves that are being recorded, if any."""

    course: Course | None = None


_recorder = _Recorder()


@contextmanager
def recording(course: Course) -> Iterator[None]:
    """Solves on this thread are told to this course."""
    before, _recorder.course = _recorder.course, course
    try:
        yield
    finally:
        _recorder.course = before


def course(z: Tensor, rtol: float) -> Course | None:
    """The course of a solve for z. None if it cannot end early: on a CPU, where the loop counts the samples that run;
    with rtol = 0; and in a graph that the user records, where nothing can be decided."""
    if _recorder.course is not None:
        return _recorder.course if rtol > 0 else None
    return Watch() if on_gpu(z) and rtol > 0 and not torch.cuda.is_current_stream_capturing() else None


def branches() -> bool:
    """Whether solves on this thread are recorded with branches, or rehearsed for that."""
    course = _recorder.course
    return course is not None and (course.branches or course.rehearses)


def on_gpu(z: Tensor) -> bool:
    return z.is_cuda


def ends(evaluations: int) -> list[int]:
    """The evaluations, counted from 0, after which a segment ends and another one follows."""
    if evaluations < SEGMENTS * SHORTEST:
        return []
    return [evaluations * i // SEGMENTS - 1 for i in range(1, SEGMENTS)]


def carried_on(trace: Tensor, iterations: Tensor) -> Tensor:
    """trace (evaluations, n) with each sample's last entry in place of what follows it, which may not be written."""
    evaluation = torch.arange(len(trace), device=trace.device).unsqueeze(1)
    return trace.gather(0, torch.minimum(evaluation, iterations))
