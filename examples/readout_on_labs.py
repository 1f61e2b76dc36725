"""Which row of a StageAttentionNet: the one PyHealth's readout picks, or the one the forward pass predicted from.

    python examples/readout_on_labs.py --ehr_root <MIMIC-IV folder with labevents>

Needs the pyhealth extra; about half a minute on the 100 patients of the MIMIC-IV demo. The model predicts from the last
position of its mask, which it takes from the embedding; PyHealth's `get_relevance_tensor` takes the mask from the raw
values. On lab values the two differ: a linear embedding has a bias, so padding and missing values count as valid to the
model. Printed per feature: in how many samples the rows differ, and how much relevance lies on padding either way.
"""

import argparse
import tempfile
from collections import defaultdict

import torch
from pyhealth.datasets import MIMIC4Dataset, get_dataloader
from pyhealth.models import StageAttentionNet
from pyhealth.tasks import MortalityPredictionStageNetMIMIC4

from rollout.data.mimic import check_mimic_root
from rollout.pyhealth import AttentionRollout

TABLES = ["diagnoses_icd", "procedures_icd", "labevents"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ehr_root", required=True)
    root = parser.parse_args().ehr_root
    check_mimic_root(root)
    with tempfile.TemporaryDirectory() as cache:
        tables = MIMIC4Dataset(ehr_root=str(root), ehr_tables=TABLES, cache_dir=cache, num_workers=1)
        samples = tables.set_task(MortalityPredictionStageNetMIMIC4(), num_workers=1)
        compare(samples)


def compare(samples: object) -> None:
    """Attribute every sample under both readouts and print what differs, per feature."""
    torch.manual_seed(0)
    model = StageAttentionNet(samples, embedding_dim=32, chunk_size=16, levels=2)
    by_readout = AttentionRollout(model, readout="model"), AttentionRollout(model, readout="forward")
    differ: dict[str, int] = defaultdict(int)
    on_padding: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    count = 0
    for batch in get_dataloader(samples, batch_size=32, shuffle=False):
        count += len(batch["patient_id"])
        picked, read = (interpreter.attribute(**batch) for interpreter in by_readout)
        for key in model.feature_keys:
            values = batch[key][1] if isinstance(batch[key], tuple | list) else batch[key]
            rows = [per_position(relevance[key]) for relevance in (picked, read)]
            differ[key] += int(((rows[0] - rows[1]).abs().amax(1) > 1e-6).sum())
            padding = values.reshape(*values.shape[:2], -1).eq(0).all(-1)
            for i, row in enumerate(rows):
                on_padding[key][i] += float((row * padding).sum())

    print(f"\n{count} samples, untrained StageAttentionNet, seed 0")
    print(f"{'feature':<14}{'rows differ':>14}{'on padding: model':>20}{'forward':>10}")
    for key in model.feature_keys:
        shares = [total / count for total in on_padding[key]]
        print(f"{key:<14}{differ[key]:>7} of {count:<4}{shares[0]:>19.0%}{shares[1]:>10.0%}")


def per_position(relevance: torch.Tensor) -> torch.Tensor:
    """[B, S] of a score that was copied to every cell of its position."""
    return relevance.reshape(*relevance.shape[:2], -1)[:, :, 0]


if __name__ == "__main__":
    main()
