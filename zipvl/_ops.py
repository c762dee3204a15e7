"""``torch.ops.zipvl``, loaded. Ops that are built under another name have another ``_ops`` (tools/hub_kernel.py)."""

from __future__ import annotations

import torch

from zipvl import _library

_library.load()

ops = torch.ops.zipvl
