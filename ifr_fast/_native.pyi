# The compiled extension (csrc/bindings.cpp). kernels/{cpu,fused,winograd,weight_cache}.py and kernels/cuda call
# it, and check what they pass.
from typing import Any

def __getattr__(name: str) -> Any: ...
