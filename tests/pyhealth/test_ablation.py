"""Predictions for what is kept of a record: those the model itself gives for it, version by version."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("pyhealth", reason="the PyHealth drop-in needs the pyhealth extra")

from rollout.evaluate.removal import Removal
from rollout.evaluate.stack import class_probabilities, predict_kept
from rollout.pyhealth.merged import CannotMergeError
from rollout.pyhealth.merged.ablation import Ablation
from tests.support.merged_records import batches, repeated, with_masked_starts
from tests.support.pyhealth_models import batch, transformer


@cache
def model() -> Any:
    return transformer("flat", num_layers=3, heads=4).double().eval()


def one_by_one(model: Any, data: dict[str, Any], kept: dict[str, Tensor], removal: Removal) -> Tensor:
    """The model asked for each version of each record, alone in a batch as wide as the whole."""
    versions, samples = next(iter(kept.values())).shape[:2]
    rows = []
    with torch.no_grad():
        for version in range(versions):
            for b in range(samples):
                one = dict(data)
                for key, each in kept.items():
                    one[key] = removal.cut(key, data[key], each[version, b : b + 1], torch.tensor([b]))
                one |= {key: value[b : b + 1] for key, value in data.items() if key not in kept}
                rows.append(class_probabilities({"y_prob": model(**one)["y_prob"]}))
    return torch.cat(rows).view(versions, samples, -1)


def drawn_kept(data: dict[str, Any], seed: int, versions: int = 5) -> dict[str, Tensor]:
    """Versions with anything between nothing and all of a record kept, some of them equal."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for key in ("conditions", "drugs"):
        share = torch.rand(versions, len(data[key]), 1, generator=generator)
        each = torch.rand(versions, *data[key].shape, generator=generator) < share
        each[0], each[-1] = True, each[1]
        each[..., :1] |= ~(each & (data[key] != 0)).any(2, keepdim=True)  # a record that lost all is another's test
        kept[key] = each
    return kept


PLAIN = batches().filter(lambda data: all(isinstance(data[key], Tensor) for key in ("conditions", "drugs")))


@settings(deadline=None)
@given(PLAIN, st.integers(0, 10**6), st.sampled_from(["delete", "pad", "resample"]))
def test_the_models_own(data: dict[str, Any], seed: int, kind: str) -> None:
    kept = drawn_kept(data, seed)
    if kind == "delete":
        kept = {key: each & (data[key] != 0) for key, each in kept.items()}
    drawn = {key: torch.randint(0, 8, data[key].shape, generator=torch.Generator().manual_seed(seed)) for key in kept}
    removal = Removal(kind, drawn=drawn)
    subject = Ablation(model())
    assert subject.serves(data, kept)
    found = subject.predict(data, kept, removal)
    with torch.inference_mode():
        plain = predict_kept(lambda stack: class_probabilities(model()(**stack)), data, kept, removal, tokens=50)
    wanted = one_by_one(model(), data, kept, removal)
    torch.testing.assert_close(found, wanted.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(plain, wanted.float(), atol=1e-6, rtol=0)


def test_a_stream_that_keeps_all_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from rollout.pyhealth.merged import ablation

    data = repeated()
    counted: list[int] = []
    real = ablation.first_rows

    def count(blocks: Any, rows: Any) -> Tensor:
        counted.append(len(rows.index))
        return real(blocks, rows)

    monkeypatch.setattr(ablation, "first_rows", count)
    samples = len(data["drugs"])
    kept = {"conditions": torch.ones(4, *data["conditions"].shape, dtype=torch.bool)}
    kept["conditions"][2, :, 1] = False
    Ablation(model()).predict(data, kept, Removal("pad"))
    assert counted == [samples, samples, samples]  # both whole once, and the one version that lacks something


def test_an_empty_record_and_one_that_lost_all() -> None:
    data = with_masked_starts()
    kept = {key: torch.zeros(2, *data[key].shape, dtype=torch.bool) for key in ("conditions", "drugs")}
    found = Ablation(model()).predict(data, kept, Removal("pad"))
    torch.testing.assert_close(found, one_by_one(model(), data, kept, Removal("pad")).float(), atol=1e-6, rtol=0)


def test_padding_that_is_attended_to_is_refused() -> None:
    subject = transformer("flat").eval()
    with torch.no_grad():
        subject.embedding_model.embedding_layers["drugs"].weight[0] = 1.0
    data = batch("flat")
    kept = {key: (data[key] != 0)[None] for key in ("conditions", "drugs")}
    with pytest.raises(ValueError, match=r"needs a padding embedding of 0, and that of 'drugs' is not"):
        Ablation(subject).predict(data, kept, Removal("delete"))
    found = Ablation(subject).predict(data, kept, Removal("pad"))
    torch.testing.assert_close(found, one_by_one(subject, data, kept, Removal("pad")), atol=1e-5, rtol=0)


def test_a_watched_model_is_not_served() -> None:
    subject = transformer("flat").eval()
    handle = subject.register_forward_hook(lambda *args: None)
    with pytest.raises(CannotMergeError, match="hook"):
        Ablation(subject)
    handle.remove()
    assert Ablation(subject).serves(batch("flat"), {})
