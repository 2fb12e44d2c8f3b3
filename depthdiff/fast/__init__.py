"""Speed and memory from outside: the same result, sooner.

`enable` puts fast computations on the modules of a network, `disable` takes them off, `report` lists where they are and
where they do not apply. `compile` and `capture` do the same with torch.compile and CUDA graphs. A module stays what it
is: class, name, weights, hooks and `forward` do not change. Each call decides whether the fast computation is the plain
one to rounding; where it may not be, the plain one runs. `nn.DataParallel` copies modules together with the calls of
the originals: call `disable` before it.
"""

from __future__ import annotations

from depthdiff.fast.compile import compile, uncompile
from depthdiff.fast.cuda_graphs import capture, release
from depthdiff.fast.layouts import lay_out
from depthdiff.fast.switch import disable, enable, report

__all__ = ["enable", "disable", "report", "compile", "uncompile", "capture", "release", "lay_out"]
