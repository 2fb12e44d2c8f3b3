"""Faster computations from outside, equal to the plain ones to rounding.

`enable` installs those for inference on a CPU on the modules of a network, `disable` removes them, `report` lists them;
a pipeline enables them on each network that it is given. A module stays what it is: class, name, weights, hooks and
`forward` do not change. `FastCall` (calls.py) decides at every call whether the fast computation is the plain one
(eligible.py), and otherwise runs the plain `forward`. `compile` and `uncompile` use torch.compile, `capture` and
`release` CUDA graphs; `lay_out` chooses the memory format. `nn.DataParallel` copies modules together with the calls of
the originals: call `disable` before it.
"""

from __future__ import annotations

from depthdiff.fast.compile import compile, uncompile
from depthdiff.fast.cuda_graphs import capture, release
from depthdiff.fast.layouts import lay_out
from depthdiff.fast.switch import disable, enable, report

__all__ = ["enable", "disable", "report", "compile", "uncompile", "capture", "release", "lay_out"]
