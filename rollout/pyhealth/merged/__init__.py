"""Encoders without positions run on the distinct rows of each record: equal rows in, equal rows at every layer.

`rows` finds the distinct rows of a batch and shares their relevance out again, `blocks` says what an encoder must be
for it and `trial` tries whether it is, `attend` visits each score once, `encode` runs the blocks and the chain,
`gradients` the gradient-weighted methods, and `capture` has PyHealth's Transformer run so.
"""

from rollout.pyhealth.merged.capture import (
    Blocks,
    CannotMergeError,
    MergedCapture,
    MergedGradientCapture,
    merged_blocks,
)

__all__ = ["Blocks", "CannotMergeError", "MergedCapture", "MergedGradientCapture", "merged_blocks"]
