"""Faithfulness on models whose answer is known, and the bootstrap on cases whose interval is known."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rollout.demo.training import auroc
from rollout.evaluate import Faithfulness, evaluate, faithfulness, top_codes
from rollout.intervals import bootstrap_auroc, bootstrap_mean

WEIGHTS = torch.tensor([0.0, 3.0, -2.0, 1.0, 0.5, -0.25, 2.0])
"""Log odds each code adds; code 0 is padding."""


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class Bag(nn.Module):
    """logit = -1 + Σ weight of the codes present; notes whether it ran in inference and eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout(0.5)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, codes: torch.Tensor, **ignored: object) -> dict[str, torch.Tensor]:
        self.calls.append((torch.is_inference_mode_enabled(), self.training or self.inner.training))
        logit = WEIGHTS[codes].flatten(1).sum(1) - 1
        return {"y_prob": logit.sigmoid()[:, None]}


class FirstCode(nn.Module):
    """Reads the first position alone, as PyHealth's Transformer predicts from it."""

    def forward(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y_prob": WEIGHTS[codes[:, 0]].sigmoid()[:, None]}


class ThreeClasses(nn.Module):
    """Class c gets the number of codes that leave remainder c when divided by 3; returns logits only."""

    def forward(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        counts = [((codes % 3 == c) & (codes > 0)).sum(1).float() for c in range(3)]
        return {"logit": torch.stack(counts, 1)}


def drops(codes: list[int], order: list[int], counts: list[int], target: int = 1) -> tuple[list[float], list[float]]:
    """By hand: probability drops of the bag without the first codes of `order`, and with them alone."""

    def probability(kept: list[int]) -> float:
        positive = sigmoid(-1 + sum(float(WEIGHTS[codes[i]]) for i in kept))
        return positive if target == 1 else 1 - positive

    whole = probability(list(range(len(codes))))
    without = [whole - probability([i for i in range(len(codes)) if i not in order[:k]]) for k in counts]
    return without, [whole - probability(order[:k]) for k in counts]


def test_right_ranking_by_hand() -> None:
    codes = torch.tensor([[4, 1, 3, 6]])
    found = faithfulness(Bag(), {"codes": codes}, {"codes": WEIGHTS[codes]}, percentages=(25, 50))

    # logit of all: -1 + 0.5 + 3 + 1 + 2 = 5.5; top 1 is code 1 (+3), top 2 adds code 6 (+2).
    whole = sigmoid(5.5)
    assert found.target.tolist() == [1]
    assert found.probability.item() == pytest.approx(whole, abs=1e-6)
    assert found.drop_without[0].tolist() == pytest.approx([whole - sigmoid(2.5), whole - sigmoid(0.5)], abs=1e-6)
    assert found.drop_with_only[0].tolist() == pytest.approx([whole - sigmoid(2.0), whole - sigmoid(4.0)], abs=1e-6)
    assert found.comprehensiveness.item() == pytest.approx(whole - (sigmoid(2.5) + sigmoid(0.5)) / 2, abs=1e-6)
    assert found.sufficiency.item() == pytest.approx(whole - (sigmoid(2.0) + sigmoid(4.0)) / 2, abs=1e-6)


def test_no_ranking_beats_the_right_one() -> None:
    codes = torch.tensor([[4, 1, 3, 6, 2]])
    orders = [list(order) for order in itertools.permutations(range(5))]
    scores = torch.zeros(len(orders), 5)
    for row, order in enumerate(orders):
        scores[row, order] = torch.arange(5.0, 0.0, -1.0)
    batch = {"codes": codes.expand(len(orders), 5)}

    found = faithfulness(Bag(), batch, {"codes": scores}, percentages=(20, 40, 60))
    for row in (0, 17, 119):
        without, with_only = drops(codes[0].tolist(), orders[row], [1, 2, 3])
        assert found.drop_without[row].tolist() == pytest.approx(without, abs=1e-6)
        assert found.drop_with_only[row].tolist() == pytest.approx(with_only, abs=1e-6)

    right = faithfulness(Bag(), {"codes": codes}, {"codes": WEIGHTS[codes]}, percentages=(20, 40, 60))
    assert found.comprehensiveness.max().item() == pytest.approx(right.comprehensiveness.item(), abs=1e-6)
    assert found.sufficiency.min().item() == pytest.approx(right.sufficiency.item(), abs=1e-6)
    assert found.comprehensiveness.min().item() < right.comprehensiveness.item() - 0.1


def test_both_classes() -> None:
    codes = torch.tensor([[1, 2, 3, 6], [2, 5, 4, 2]])
    batch = {"codes": codes}
    evidence = {"codes": torch.where(torch.tensor([[True], [False]]), WEIGHTS[codes], -WEIGHTS[codes])}

    found = faithfulness(Bag(), batch, evidence, percentages=(25, 50))
    assert found.target.tolist() == [1, 0]
    assert found.probability[1].item() == pytest.approx(1 - sigmoid(-1 - 2 - 0.25 + 0.5 - 2), abs=1e-6)
    for row, order in ((0, [0, 3, 2, 1]), (1, [0, 3, 1, 2])):
        without, with_only = drops(codes[row].tolist(), order, [1, 2], target=1 - row)
        assert found.drop_without[row].tolist() == pytest.approx(without, abs=1e-6)
        assert found.drop_with_only[row].tolist() == pytest.approx(with_only, abs=1e-6)

    forced = faithfulness(Bag(), batch, evidence, target=torch.tensor([0, 0]), percentages=(25, 50))
    assert forced.drop_without[0].tolist() == pytest.approx((-found.drop_without[0]).tolist(), abs=1e-6)
    assert torch.equal(forced.drop_without[1], found.drop_without[1])
    low = faithfulness(Bag(), batch, evidence, threshold=0.005)
    assert low.target.tolist() == [1, 1]


@pytest.mark.parametrize("removal", ["delete", "pad"])
def test_padding_has_no_influence(removal: str) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 7, 20, 33]
    codes = torch.zeros(5, 40, dtype=torch.long)
    scores = torch.full((5, 40), 1e6)  # what stands on padding must not matter
    for row, length in enumerate(lengths):
        codes[row, :length] = torch.randint(1, 7, (length,), generator=generator)
        scores[row, :length] = torch.rand(length, generator=generator)

    together = faithfulness(Bag(), {"codes": codes}, {"codes": scores}, removal=removal)
    assert not torch.equal(together.comprehensiveness[1:], torch.zeros(4))
    for row, length in enumerate(lengths):
        alone = faithfulness(
            Bag(), {"codes": codes[row : row + 1, :length]}, {"codes": scores[row : row + 1, :length]}, removal=removal
        )
        assert torch.allclose(alone.drop_without[0], together.drop_without[row], atol=1e-6)
        assert torch.allclose(alone.drop_with_only[0], together.drop_with_only[row], atol=1e-6)


def test_last_code_stays() -> None:
    codes = torch.tensor([[1, 0], [3, 6]])
    found = faithfulness(Bag(), {"codes": codes}, {"codes": torch.tensor([[1.0, 0.0], [1.0, 2.0]])}, percentages=(100,))
    assert found.drop_without[0].item() == 0.0
    assert found.drop_without[1].item() == pytest.approx(sigmoid(2.0) - sigmoid(0.0), abs=1e-6)
    assert found.drop_with_only.flatten().tolist() == [0.0, 0.0]


def test_delete_moves_up_and_pad_leaves_a_hole() -> None:
    batch, scores = {"codes": torch.tensor([[1, 3, 4, 2]])}, {"codes": torch.tensor([[9.0, 1.0, 2.0, 3.0]])}
    deleted = faithfulness(FirstCode(), batch, scores, percentages=(25,))
    padded = faithfulness(FirstCode(), batch, scores, percentages=(25,), removal="pad")
    assert deleted.drop_without.item() == pytest.approx(sigmoid(3) - sigmoid(1), abs=1e-6)
    assert padded.drop_without.item() == pytest.approx(sigmoid(3) - sigmoid(0), abs=1e-6)


def test_valid_positions_need_not_be_a_prefix() -> None:
    codes = torch.tensor([[0, 1, 0, 3, 6]])
    scores = torch.tensor([[5.0, 1.0, 5.0, 2.0, 3.0]])
    found = faithfulness(Bag(), {"codes": codes}, {"codes": scores}, percentages=(30,))
    assert found.drop_without.item() == pytest.approx(sigmoid(5) - sigmoid(3), abs=1e-6)
    masked = faithfulness(
        Bag(), {"codes": codes}, {"codes": scores}, percentages=(50,), valid={"codes": torch.tensor([[0, 1, 0, 1, 0]])}
    )
    assert masked.drop_with_only.item() == pytest.approx(sigmoid(5) - sigmoid(0), abs=1e-6)


def test_pairs_with_times_stay_together() -> None:
    class Timed(nn.Module):
        def forward(self, codes: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"y_prob": (codes[0] * WEIGHTS[codes[1]]).sum(1).sigmoid()[:, None]}

    batch = {"codes": (torch.tensor([[0.5, 1.0, 0.25]]), torch.tensor([[1, 3, 6]]))}
    scores = {"codes": torch.tensor([[3.0, 1.0, 2.0]])}
    for removal in ("delete", "pad"):
        found = faithfulness(Timed(), batch, scores, percentages=(33,), removal=removal)
        assert found.drop_without.item() == pytest.approx(sigmoid(3.0) - sigmoid(1.5), abs=1e-6)
    assert batch["codes"][1].tolist() == [[1, 3, 6]]


def test_nested_codes_are_padded_in_place() -> None:
    batch = {"codes": torch.tensor([[[1, 3, 0], [6, 0, 0]]])}
    scores = {"codes": torch.tensor([[[2.0, 1.0, 9.0], [3.0, 9.0, 9.0]]])}
    found = faithfulness(Bag(), batch, scores, percentages=(33, 66), removal="pad")
    assert found.drop_without[0].tolist() == pytest.approx([sigmoid(5) - sigmoid(3), sigmoid(5) - sigmoid(0)], abs=1e-6)
    with pytest.raises(ValueError, match=r"removal='delete' needs codes \[B, S\], got \[1, 2, 3\].*removal='pad'"):
        faithfulness(Bag(), batch, scores)


def test_many_classes_from_logits() -> None:
    codes = torch.tensor([[3, 6, 3, 1], [1, 4, 4, 2]])
    found = faithfulness(
        ThreeClasses(), {"codes": codes}, {"codes": torch.tensor([[4.0, 3, 2, 1], [4, 3, 2, 1]])}, percentages=(50,)
    )
    assert found.target.tolist() == [0, 1]

    def softmax(first: float, *others: float) -> float:
        return math.exp(first) / (math.exp(first) + sum(map(math.exp, others)))

    assert found.drop_without.flatten().tolist() == pytest.approx(
        [softmax(3, 1, 0) - softmax(1, 1, 0), softmax(3, 0, 1) - softmax(1, 0, 1)], abs=1e-6
    )


def test_equals_pyhealth_where_nothing_is_padded() -> None:
    metrics = pytest.importorskip("pyhealth.metrics.interpretability")
    generator = torch.Generator().manual_seed(1)
    model = Bag()
    model.dataset = SimpleNamespace(output_schema={"label": "binary"})
    theirs = metrics.Evaluator(model, sample_filter=lambda p, kind: torch.ones_like(p, dtype=torch.long))
    for length in (2, 3, 5, 10, 19, 40):
        batch = {"codes": torch.randint(1, 7, (3, length), generator=generator)}
        scores = {"codes": torch.rand(3, length, generator=generator)}
        expected = theirs.evaluate(batch, scores)
        found = faithfulness(model, batch, scores, removal="pad", target=torch.ones(3, dtype=torch.long))
        assert torch.allclose(found.comprehensiveness, expected["comprehensiveness"][0], atol=1e-6)
        assert torch.allclose(found.sufficiency, expected["sufficiency"][0], atol=1e-6)


def test_top_codes_counts_and_ties() -> None:
    valid = torch.ones(1, 10, dtype=torch.bool)
    scores = torch.arange(10.0)[None]
    counts = {q: int(top_codes(scores, valid, q).sum()) for q in (1, 10, 10.5, 20, 50, 100)}
    assert counts == {1: 1, 10: 1, 10.5: 2, 20: 2, 50: 5, 100: 10}
    assert top_codes(scores, valid & (scores < 8), 25).nonzero()[:, 1].tolist() == [6, 7]

    noisy = torch.tensor([[0.2, 0.4, 0.4 * (1 + 5e-7), 0.4 * (1 - 5e-7), 0.0]])
    assert top_codes(noisy, noisy >= 0, 20).nonzero()[:, 1].tolist() == [1]
    assert top_codes(noisy, noisy >= 0, 40).nonzero()[:, 1].tolist() == [1, 2]
    apart = torch.tensor([[0.2, 0.4, 0.4 * (1 + 5e-5)]])
    assert top_codes(apart, apart > 0, 30).nonzero()[:, 1].tolist() == [2]
    assert not top_codes(torch.rand(1, 4), torch.zeros(1, 4, dtype=torch.bool), 50).any()
    holes = torch.tensor([[False, True, False, True]])
    assert torch.equal(top_codes(torch.tensor([[9.0, 1.0, 9.0, 2.0]]), holes, 100), holes)


def test_model_is_left_as_it_was() -> None:
    model = Bag().train()
    model.inner.eval()
    batch = {"codes": torch.tensor([[1, 2, 3]])}
    found = faithfulness(model, batch, {"codes": torch.rand(1, 3)})
    assert (model.training, model.inner.training) == (True, False)
    assert model.calls == [(True, False)]  # all versions of the record in one stack
    assert not any(t.is_inference() for t in (found.target, found.probability, found.drop_without))

    with pytest.raises(IndexError):
        faithfulness(model, {"codes": torch.tensor([[1, 99]])}, {"codes": torch.rand(1, 2)})
    assert (model.training, model.inner.training) == (True, False)


def test_evaluate_scores_each_method_on_every_batch() -> None:
    batches = [{"codes": torch.tensor([[1, 3, 6]])}, {"codes": torch.tensor([[2, 5, 1, 4], [3, 0, 0, 0]])}]
    methods = {
        "right": lambda codes: {"codes": WEIGHTS[codes]},
        "wrong": lambda codes: {"codes": -WEIGHTS[codes]},
    }
    found = evaluate(Bag(), iter(batches), methods, target=None, percentages=(50,))
    assert list(found) == ["right", "wrong"]
    parts = [faithfulness(Bag(), b, {"codes": WEIGHTS[b["codes"]]}, percentages=(50,)) for b in batches]
    assert found["right"].drop_without.tolist() == [*parts[0].drop_without.tolist(), *parts[1].drop_without.tolist()]
    assert found["right"].comprehensiveness[0] > found["wrong"].comprehensiveness[0]
    assert isinstance(found["wrong"], Faithfulness)
    assert found["wrong"].target.shape == (3,)
    with pytest.raises(ValueError, match="evaluate: batches must hold at least one batch"):
        evaluate(Bag(), [], methods)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"removal": "drop"}, r"removal must be one of \('delete', 'pad'\), got 'drop'"),
        ({"percentages": (0, 5)}, r"percentages must be one or more numbers in \(0, 100\], got \[0, 5\]"),
        ({"percentages": ()}, "percentages must be one or more"),
        ({"attributions": {}}, "attributions must name at least one feature"),
        (
            {"attributions": {"drugs": torch.rand(1, 3)}},
            r"attributions name the feature 'drugs'; the batch has \['codes'",
        ),
        ({"attributions": {"codes": torch.rand(1, 4)}}, r"shaped like the codes.*\[1, 3\]; got \[1, 4\]"),
        ({"attributions": {"codes": torch.tensor([[1.0, math.nan, 2.0]])}}, r"attributions\['codes'\] must be finite"),
        ({"target": torch.tensor([1, 0])}, r"target must be long \[B\] = \[1\], got torch.int64 \[2\]"),
        (
            {"valid": {"codes": torch.ones(1, 2)}},
            r"valid\['codes'\] must be shaped like the codes, \[1, 3\], got \[1, 2\]",
        ),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    options = {"attributions": {"codes": torch.rand(1, 3)}, **change}
    with pytest.raises(ValueError, match=message):
        faithfulness(Bag(), {"codes": torch.tensor([[1, 2, 3]])}, **options)


def test_model_without_probabilities() -> None:
    class Silent(nn.Module):
        def forward(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": codes.float().sum()}

    with pytest.raises(ValueError, match=r"must return 'y_prob' or 'logit', got \['loss'\]"):
        faithfulness(Silent(), {"codes": torch.tensor([[1, 2]])}, {"codes": torch.rand(1, 2)})


def test_interval_of_two_patients_by_hand() -> None:
    # Resamples: both 0 (¼), one of each (½), both 1 (¼): the means of a patient of three 0s and one of a single 4.
    found = bootstrap_mean([0, 0, 0, 4], ["a", "a", "a", "b"])
    assert (found.estimate, found.low, found.high, found.groups) == (1.0, 0.0, 4.0, 2)
    assert not found.excludes(0.0)
    assert found.excludes(4.1)
    assert str(found) == "+1.0000 [+0.0000, +4.0000]"
    middle = bootstrap_mean([0, 0, 0, 4], ["a", "a", "a", "b"], level=0.4)
    assert (middle.low, middle.high) == (1.0, 1.0)


def test_interval_covers_the_truth_by_patient_only() -> None:
    rng = np.random.default_rng(0)
    trials, patients, visits = 300, 40, 6
    by_patient = by_sample = 0
    for trial in range(trials):
        values = (rng.normal(0.3, 1.0, patients)[:, None] + rng.normal(0, 0.3, (patients, visits))).ravel()
        owner = np.repeat(np.arange(patients), visits)
        by_patient += not bootstrap_mean(values, owner, draws=400, seed=trial).excludes(0.3)
        by_sample += not bootstrap_mean(values, range(len(values)), draws=400, seed=trial).excludes(0.3)
    assert 0.90 <= by_patient / trials <= 0.98
    assert by_sample / trials < 0.75


def test_interval_has_the_width_theory_gives() -> None:
    values = np.random.default_rng(1).normal(0, 2.0, 400)
    found = bootstrap_mean(values, range(400), draws=8000)
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert found == bootstrap_mean(values, range(400), draws=8000)
    assert found != bootstrap_mean(values, range(400), draws=8000, seed=1)


def test_auroc_by_hand_and_within_strata() -> None:
    label, prob = [1, 0, 1, 0, 0], [0.9, 0.8, 0.4, 0.4, 0.1]
    found = bootstrap_auroc(label, prob, list("abcde"))
    assert found.estimate == pytest.approx((3 + 0 + 0.5 + 1) / 6)
    assert 0.0 <= found.low < found.estimate < found.high <= 1.0

    # Model 1 gives every probability 0.5 more than model 0: each ranks rightly, pooled they do not.
    label, prob, model = [1, 0, 1, 0], [0.4, 0.3, 0.9, 0.8], [0, 0, 1, 1]
    assert bootstrap_auroc(label, prob, list("abcd")).estimate == pytest.approx(3 / 4)
    within = bootstrap_auroc(label, prob, list("abcd"), strata=model)
    assert (within.estimate, within.low, within.high) == (1.0, 1.0, 1.0)


def test_auroc_agrees_with_ranks_and_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    truth = 0.5 * (1 + math.erf(1.0 / 2))  # P(N(1, 1) > N(0, 1)) = Φ(1/√2)
    covered = 0
    for trial in range(150):
        label = (np.arange(120) % 3 == 0).astype(float)
        prob = np.round(rng.normal(label, 1.0), 1)
        found = bootstrap_auroc(label, prob, np.arange(120) // 2, draws=300, seed=trial)
        assert found.estimate == pytest.approx(auroc(label, prob), abs=1e-12)
        covered += not found.excludes(truth)
    assert 0.88 <= covered / 150 <= 0.99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([], []), "needs N ≥ 1 values"),
        (lambda: bootstrap_mean([1.0, 2.0], ["a"]), "one group each"),
        (lambda: bootstrap_mean([1.0, math.nan], ["a", "b"]), "values must be finite, got 1"),
        (lambda: bootstrap_mean([1.0, 2.0], ["a", "a"]), "at least 2 groups to resample, got 1"),
        (lambda: bootstrap_mean([1.0, 2.0], ["a", "b"], level=1.0), "level must lie between 0 and 1, got 1.0"),
        (lambda: bootstrap_mean([1.0, 2.0], ["a", "b"], draws=0), "draws must be at least 1, got 0"),
        (lambda: bootstrap_auroc([0, 2], [0.1, 0.2], ["a", "b"]), "y_true must be 2 zeros and ones"),
        (lambda: bootstrap_auroc([1, 1], [0.1, 0.2], ["a", "b"]), "a positive and a negative sample in one stratum"),
    ],
)
def test_bad_intervals(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
