"""Batched attention rollout: explain a transformer over a whole cohort.

>>> import torch, rollout
>>> maps = [torch.rand(2, 4, 8, 8).softmax(-1) for _ in range(3)]
>>> rollout.attention_rollout(maps, query=0).shape
torch.Size([2, 8])
"""

from rollout._capture import CaptureError, capture, register_capture
from rollout.api import attention_rollout, attention_rollout_qk
from rollout.method import METHODS
from rollout.tape import Record
from rollout_kernels.method import Method

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "CaptureError",
    "Method",
    "Record",
    "attention_rollout",
    "attention_rollout_qk",
    "capture",
    "register_capture",
]
