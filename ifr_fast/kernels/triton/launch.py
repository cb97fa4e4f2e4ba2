"""Launches Triton's kernels at little cost. All of Triton's private names are used here.

`kernel[grid](…)`, Triton's own launch, binds and specialises every argument anew, which is most of its cost. A `Launch`
has that done once for each device and combination of dtypes, remembers the compiled kernel that Triton returns, and
hands the arguments to that one from then on. Triton's own launch serves where that will not do: in other versions of
Triton, under its interpreter, for wide tensors at addresses that 16 does not divide, and while a profiler listens.

From compute capability 9.0 on kernels are launched before those in front of them have ended (programmatic dependent
launch), so that starting them takes no time of its own. They wait by themselves (tiles.begin).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import triton
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

EARLY = 90  # ten times the compute capability
# The versions of which it is known how a compiled kernel takes its arguments.
DIRECT = triton.__version__.startswith("3.6.")


def jit(*, wide: Sequence[str]) -> Callable[[Callable[..., Any]], Any]:
    """triton.jit for a kernel whose parameters are tensors, then numbers, then constants.

    wide: the tensors that are accessed many bytes at a time. Triton compiles other variants where 16 does not divide
    their addresses. Nothing else makes a difference, neither the other tensors' addresses nor an integer's value: a
    solve of other samples must not need other variants, which would be compiled in the middle of a capture.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        parameters = inspect.signature(function).parameters
        constants = {name for name, parameter in parameters.items() if "constexpr" in str(parameter.annotation)}
        return triton.jit(do_not_specialize=[*parameters.keys() - constants - set(wide)])(function)

    return decorate


class Launch:
    """A kernel with its constants and options (num_warps, maxnreg), ready to be launched on the current device."""

    def __init__(self, function: Any, **constants: Any) -> None:
        self.function, self.constants = function, constants
        self.compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self.direct = DIRECT and isinstance(function, JITFunction)
        if self.direct:
            self.tail = [constants[p.name] for p in function.params if p.is_constexpr]
            self.wide = [p.num for p in function.params if not (p.is_constexpr or p.do_not_specialize)]

    def __call__(self, programs: int, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> None:
        if not self.direct:
            self.function[(programs,)](*tensors, *numbers, **self.constants)
            return
        gpu = driver.active
        device = gpu.get_current_device()
        key = (device, *[None if t is None else t.dtype for t in tensors])
        addresses = 0
        for i in self.wide:
            if (tensor := tensors[i]) is not None:
                addresses |= tensor.data_ptr()
        found = self.compiled.get(key)
        if found is None or addresses % 16 or hooked():
            early = {"launch_pdl": True} if gpu.get_current_target().arch >= EARLY else {}
            compiled = self.function[(programs,)](*tensors, *numbers, **self.constants, **early)
            if compiled is not None and not addresses % 16:
                self.compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, compiled
            return
        run, function, metadata, _ = found
        stream = gpu.get_current_stream(device)
        # Grid, stream, what to run and how, hooks and their argument; then every parameter, constants too.
        run(programs, 1, 1, stream, function, metadata, None, None, None, *tensors, *numbers, *self.tail)


def hooked() -> bool:
    """Whether something wants to be told of launches, as profilers do."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False
