"""PyHealth's `AttentionRollout`, `CheferRelevance` and `evaluate_attribution`: change one import line, nothing else.

    from rollout.pyhealth import AttentionRollout        # was: from pyhealth.interpret.methods import AttentionRollout

The same numbers, shapes, device and dtype. They also run where PyHealth's cannot: under `torch.no_grad()` and
`torch.inference_mode()`, with frozen parameters, in float16, for sequences beyond `max_seq_len`, for empty features,
and for a StageAttentionNet of flat features; `AttentionRollout` also for TransformersModel, ViT and others that have no
readout methods. `FrozenGradient` is signed and class-specific, and no chain.
"""

from rollout.errors import brought_by

with brought_by("pyhealth"):
    from rollout.pyhealth.attention_rollout import AttentionRollout
    from rollout.pyhealth.evaluation import evaluate_attribution
    from rollout.pyhealth.frozen_gradient import FrozenGradient
    from rollout.pyhealth.gradient_rollout import CheferRelevance, GradientRollout
    from rollout.pyhealth.readout import MissingFeatureError

__all__ = [
    "AttentionRollout",
    "CheferRelevance",
    "FrozenGradient",
    "GradientRollout",
    "MissingFeatureError",
    "evaluate_attribution",
]
