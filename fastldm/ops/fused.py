"""Every op by its kernel: the launchers, as they are. Raises `Unsupported` with the reason where no kernel takes the
arguments.

What they compute stands in the contract's docstrings (`fastldm/ops/__init__.py`); theirs say what they take of it.
Nothing here falls back; `ops.using("fused", linear="reference")` asks for another implementation of an op.
"""

from __future__ import annotations

from fastldm.kernels.attention import attention as attention
from fastldm.kernels.begin_row import begin_row as begin_row
from fastldm.kernels.conv2d import conv2d as conv2d
from fastldm.kernels.end_row import end_row as end_row
from fastldm.kernels.geglu import geglu as geglu
from fastldm.kernels.group_norm import group_norm as group_norm
from fastldm.kernels.layer_norm import layer_norm as layer_norm
from fastldm.kernels.linear import linear as linear
from fastldm.kernels.timestep_embedding import timestep_embedding as timestep_embedding
from fastldm.kernels.to_uint8 import to_uint8 as to_uint8
