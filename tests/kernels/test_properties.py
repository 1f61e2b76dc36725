"""What must hold of every result, on inputs drawn by hypothesis."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rollout
from rollout import METHODS, Method
from tests.support.cases import generator, poison, random_qk, same_bits
from tests.support.oracles import array, assert_close, rollout_matrices, softmax_maps

FUSIONS = st.sampled_from(["mean", "max", "min"])
ALPHAS = st.sampled_from([0.0, 0.1, 0.5, 1.0])


@dataclass
class Case:
    """Positive maps whose rows sum to about 1, and a length per sample."""

    maps: list[Tensor]
    lengths: list[int]
    query: Tensor
    seed: int

    @property
    def ends(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.long)


@st.composite
def cases(draw: st.DrawFn, batch: int | None = None) -> Case:
    b = batch or draw(st.integers(1, 4))
    h, s, layers = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 10_000))
    lengths = draw(st.lists(st.integers(1, s), min_size=b, max_size=b))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    source = generator(seed)
    maps = [(3 * torch.randn(b, h, s, s, generator=source)).softmax(-1).to(dtype) for _ in range(layers)]
    query = torch.tensor([draw(st.integers(-n, n - 1)) for n in lengths])
    return Case(maps, lengths, query, seed)


def run(case: Case, **arguments: Any) -> Tensor:
    return rollout.attention_rollout(case.maps, **{"lengths": case.ends, **arguments})


def weights(case: Case, rows: int, seed: int = 0) -> Tensor:
    shape = len(case.lengths), rows, case.maps[0].shape[-1]
    return torch.randn(shape, generator=generator(case.seed + seed), dtype=torch.float64)


@given(cases(), FUSIONS, ALPHAS, st.sampled_from([0.0, 0.4]))
def test_rows_sum_to_one(case: Case, fusion: str, residual: float, ratio: float):
    if ratio and not residual:
        return  # a row may be discarded whole
    result = run(case, method=Method(head_fusion=fusion, residual=residual, discard_ratio=ratio))
    expected = torch.zeros(result.shape[:2], dtype=torch.float64)
    for b, n in enumerate(case.lengths):
        expected[b, :n] = 1.0
    assert_close(result.double().sum(-1).to(result.dtype), expected)
    assert bool((result >= 0).all())


@given(cases(), FUSIONS, st.sampled_from(["rollout", "pyhealth", "chefer_rollout", "own"]))
def test_identity_in_identity_out(case: Case, fusion: str, name: str):
    method = Method(head_fusion=fusion, residual=0.3) if name == "own" else METHODS[name]
    eye = torch.eye(case.maps[0].shape[-1])
    case.maps = [eye.expand(m.shape).to(m.dtype) for m in case.maps]
    expected = torch.zeros(len(case.lengths), *eye.shape)
    for b, n in enumerate(case.lengths):
        expected[b, :n, :n] = eye[:n, :n]
    assert_close(run(case, method=method), expected)


@given(cases(), FUSIONS, st.randoms(use_true_random=False))
def test_the_order_of_heads_does_not_matter(case: Case, fusion: str, random: Any):
    order = list(range(case.maps[0].shape[1]))
    random.shuffle(order)
    method = Method(head_fusion=fusion)
    before = run(case, query=case.query, method=method)
    case.maps = [m[:, order] for m in case.maps]
    assert_close(run(case, query=case.query, method=method), before)


@given(cases(), FUSIONS)
def test_repeated_heads_change_nothing(case: Case, fusion: str):
    method = Method(head_fusion=fusion)
    before = run(case, query=case.query, method=method)
    case.maps = [torch.cat([m, m], 1) for m in case.maps]
    assert_close(run(case, query=case.query, method=method), before)


@given(cases(), st.sampled_from(["rollout", "pyhealth", "discard", "chefer_rollout"]), st.sampled_from(["full", "row"]))
def test_a_sample_does_not_see_its_batch(case: Case, name: str, form: str):
    """Alone, at its own length, unpadded, it gives what it gives padded with NaN in the batch."""
    case.maps = poison(case.maps, case.lengths, (-1, -2))
    together = run(case, method=name, query=case.query if form == "row" else None)
    for b, n in enumerate(case.lengths):
        alone = [m[b : b + 1, :, :n, :n] for m in case.maps]
        query = case.query[b : b + 1] if form == "row" else None
        expected = rollout.attention_rollout(alone, query=query, method=name)
        inside = together[b : b + 1, :n] if form == "row" else together[b : b + 1, :n, :n]
        assert_close(inside, expected)
        assert not together[b, ..., n:].any()
        assert form == "row" or not together[b, n:].any()


@given(cases(), st.sampled_from(["rollout", "max", "discard", "pyhealth"]))
def test_a_negative_query_counts_from_the_end(case: Case, name: str):
    method = Method(head_fusion="max") if name == "max" else METHODS[name]
    ends = case.ends
    positive = torch.where(case.query < 0, case.query + ends, case.query)
    result = run(case, query=case.query, method=method)
    assert same_bits(result, run(case, query=positive, method=method))
    assert same_bits(result, run(case, query=positive - ends, method=method))
    assert same_bits(run(case, query=-1, method=method), run(case, query=ends - 1, method=method))
    full = run(case, method=method)
    assert_close(result, full[torch.arange(len(ends)), positive])


@given(cases(), st.sampled_from(["rollout", "pyhealth", "chefer_rollout"]))
def test_weights_are_linear(case: Case, name: str):
    """Any weighting is that mixture of the rows of R; a one-hot weighting is its row, ones are the column sums."""
    full, start = run(case, method=name), weights(case, 3)
    mixed = torch.bmm(start, full.double())
    several = run(case, method=name, query=start)
    scale = (start.abs() @ full.double()).amax((1, 2))
    for b in range(len(case.lengths)):  # the weights cancel: relative to what was added up
        assert (
            float((several[b].double() - mixed[b]).abs().max())
            <= (1e-6 if full.dtype == torch.float32 else 1e-13) * scale[b]
        )
    assert_close(run(case, method=name, query=start[:, 1]), several[:, 1])
    ones = torch.ones(full.shape[:2])
    assert_close(run(case, method=name, query=ones), full.double().sum(1))
    rows = torch.where(case.query < 0, case.query + case.ends, case.query)
    one_hot = torch.nn.functional.one_hot(rows, full.shape[-1]).float()
    assert_close(run(case, method=name, query=one_hot), run(case, method=name, query=rows))
    assert_close(run(case, method=name, query=-2.0 * one_hot), -2.0 * run(case, method=name, query=rows))


@given(
    cases(),
    st.sampled_from([name for name, method in METHODS.items() if method.values is None]),
    st.sampled_from(["full", "row", "weights"]),
)
def test_the_same_call_gives_the_same_bits(case: Case, name: str, form: str):
    if name == "product":
        case.maps = [m[:, 0] for m in case.maps]
    slopes = [torch.randn(m.shape, generator=generator(1)) for m in case.maps]
    query = {"full": None, "row": case.query, "weights": weights(case, 2)}[form]
    first = run(case, query=query, method=name, gradients=slopes)
    assert same_bits(first, run(case, query=query, method=name, gradients=slopes))
    full = rollout_matrices(case.maps, METHODS[name], case.lengths, slopes)
    if form == "full" and name != "discard":  # rounded means and maxima may change which entry goes
        assert_close(first, full)


@given(cases())
def test_product_is_a_chain_of_matrix_products(case: Case):
    """Also of parts: the product of two halves' products, and of matrices of any sign."""
    source = generator(case.seed)
    matrices = [torch.randn(m[:, 0].shape, generator=source, dtype=torch.float64) for m in case.maps]
    chain = matrices[0]
    for matrix in matrices[1:]:
        chain = matrix @ chain
    assert_close(rollout.attention_rollout(matrices, method="product"), chain)
    assert_close(rollout.attention_rollout(matrices, method="product", query=-1), chain[:, -1])
    cut = len(matrices) // 2
    if cut:
        halves = [rollout.attention_rollout(part, method="product") for part in (matrices[:cut], matrices[cut:])]
        assert_close(rollout.attention_rollout(halves, method="product"), chain)


@given(cases())
def test_layers_compose(case: Case):
    """The chain over all layers is the chain of the upper ones times that of the lower ones."""
    maps = [m.double() for m in case.maps]
    cut = len(maps) // 2
    if cut:
        parts = [rollout.attention_rollout(part, lengths=case.ends) for part in (maps[:cut], maps[cut:])]
        whole = rollout.attention_rollout(parts, lengths=case.ends, method="product")
        assert_close(rollout.attention_rollout(maps, lengths=case.ends), whole)


@given(cases(), st.randoms(use_true_random=False))
def test_renaming_positions_renames_the_result(case: Case, random: Any):
    seq = case.maps[0].shape[-1]
    order = list(range(seq))
    random.shuffle(order)
    before = rollout.attention_rollout(case.maps)
    after = rollout.attention_rollout([m[:, :, order][..., order] for m in case.maps])
    assert_close(after, before[:, order][..., order])


@given(
    st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 10), st.sampled_from([(4, 4), (4, 2), (3, 1)]), st.data()
)
def test_queries_and_keys_equal_their_softmax(
    seed: int, batch: int, seq: int, heads: tuple[int, int], data: st.DataObject
):
    """Whatever the masks, rows from Q and K are rows from the maps that the loops make of them."""
    queries, keys = random_qk(batch, heads[0], seq, 4, groups=heads[1], dtype=torch.float64, seed=seed)
    lengths = data.draw(st.lists(st.integers(1, seq), min_size=batch, max_size=batch))
    side = st.one_of(st.none(), st.integers(0, seq))
    mask = torch.rand(batch, seq, generator=generator(seed)) < data.draw(st.sampled_from([0.0, 0.5, 1.1]))
    masks: dict[str, Any] = {
        "key_mask": mask,
        "causal": data.draw(st.booleans()),
        "window": data.draw(st.tuples(side, side)),
    }
    query = torch.tensor([data.draw(st.integers(-n, n - 1)) for n in lengths])
    maps, sums = softmax_maps(queries, keys, lengths, **masks)
    tensors = [torch.from_numpy(m) for m in maps]
    for method in (METHODS["rollout"], METHODS["pyhealth"], Method(head_fusion="max")):
        expected = rollout.attention_rollout(tensors, query=query, lengths=torch.tensor(lengths), method=method)
        for lse in (None, [torch.from_numpy(s) for s in sums]):
            result = rollout.attention_rollout_qk(
                queries, keys, query=query, lengths=torch.tensor(lengths), method=method, logsumexp=lse, **masks
            )
            assert_close(result, expected, "qk")


@given(st.integers(0, 10_000), st.integers(2, 9))
def test_a_shift_of_a_whole_row_of_scores_changes_nothing(seed: int, seq: int):
    queries, keys = random_qk(2, 3, seq, 4, dtype=torch.float64, seed=seed)
    shift = 5.0 * torch.randn(2, 3, seq, 1, generator=generator(seed))
    plain = rollout.attention_rollout_qk(queries, keys, query=0)
    assert_close(rollout.attention_rollout_qk(queries, keys, query=0, bias=shift), plain, "qk")


@given(st.integers(0, 10_000), st.integers(2, 9), st.data())
def test_masking_keys_by_lengths_mask_or_bias_is_one_thing(seed: int, seq: int, data: st.DataObject):
    """Rows inside the sample do not tell a length from a key mask or a bias of −inf."""
    queries, keys = random_qk(1, 2, seq, 4, dtype=torch.float64, seed=seed)
    n = data.draw(st.integers(1, seq))
    row = data.draw(st.integers(0, n - 1))
    kept = (torch.arange(seq) < n)[None]
    by_length = rollout.attention_rollout_qk(queries, keys, query=row, lengths=torch.tensor([n]))
    bias = torch.zeros(1, seq).masked_fill(~kept, -torch.inf)
    assert_close(rollout.attention_rollout_qk(queries, keys, query=row, key_mask=kept), by_length, "qk")
    assert_close(rollout.attention_rollout_qk(queries, keys, query=row, bias=bias), by_length, "qk")
    assert array(by_length)[0, n:].sum() == 0
