"""PyHealth's Transformer from batch to attributions: by PyHealth's interpreter, by ours, and its forward alone."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rollout.bench.measure import OURS, Row, Runs, compare
from rollout.bench.settings import Settings
from rollout.data.quiet import quiet_pyhealth
from rollout.errors import require

STOCK, FUSED = "PyHealth", "fused forward, no padding"
ALLOWED = 1e-5  # max|err| / max|ref| against PyHealth's own in float64
VOCABULARY, EMBEDDING = 1000, 128
MEDIAN, SPREAD, LONGEST, BATCHES = 50, 0.86, 500, 4  # of the log-normal lengths, the shape of MIMIC-IV's
CASES = ("S=256", "log-normal, unsorted")

Batches = list[dict[str, Any]]


def check(heads: int) -> None:
    """Refuse what cannot be run, before anything is.

    Raises:
        ImportError: PyHealth is not installed.
        ValueError: H does not divide the model's width.
    """
    if EMBEDDING % heads:
        raise ValueError(f"bench: with PyHealth heads must divide the model's width {EMBEDDING}, got {heads}")
    require("pyhealth", "pyhealth")


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each of `CASES`: PyHealth's Transformer of L layers and H heads with random weights, batches of B."""
    model = make_model(settings.heads, settings.layers, settings.target)
    for case in CASES:
        yield _row(model, settings, case)


def _row(model: Any, settings: Settings, case: str) -> Row:
    from pyhealth.interpret.methods import AttentionRollout as Stock

    from rollout.pyhealth import AttentionRollout

    batches = make_batches(case, settings.batch, settings.target)
    by_stock, by_us = Stock(model), AttentionRollout(model)
    runs: Runs = {
        STOCK: lambda: attribute(by_stock, batches),
        OURS: lambda: attribute(by_us, batches),
        FUSED: lambda: fused_forward(model, batches),
    }
    count = sum(len(batch["codes"]) for batch in batches)
    row = Row("samples a second, PyHealth's Transformer", case, STOCK, FUSED, {}, {}, {}, samples=count)
    allowed = {STOCK: ALLOWED, OURS: ALLOWED}
    try:
        return compare(row, runs, exact(model, batches), allowed, settings.seconds, settings.target)
    finally:
        drop_maps(model)


def make_model(
    heads: int, layers: int, device: torch.device, *, embedding: int = EMBEDDING, vocabulary: int = VOCABULARY
) -> Any:
    """A Transformer of one stream of codes with random weights, the same every time."""
    from pyhealth.datasets import create_sample_dataset
    from pyhealth.models import Transformer

    codes = [f"c{i}" for i in range(vocabulary)]
    samples = [{"patient_id": f"p{i}", "visit_id": "v", "codes": codes, "label": i} for i in range(2)]
    with quiet_pyhealth():  # it would print the vocabulary of the label
        dataset = create_sample_dataset(samples, {"codes": "sequence"}, {"label": "binary"}, dataset_name="bench")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(dataset, embedding_dim=embedding, heads=heads, num_layers=layers)
    return model.to(device).eval()


def draw_lengths(case: str, batch: int) -> list[list[int]]:
    """The lengths of the records of a case, batch by batch: "S=64", "lengths 256-512", "log-normal, sorted" or not."""
    if case.startswith("S="):
        return [[int(case.removeprefix("S="))] * batch]
    generator = np.random.default_rng(0)
    if case.startswith("lengths "):
        low, high = map(int, case.removeprefix("lengths ").split("-"))
        return [generator.integers(low, high + 1, batch).tolist()]
    drawn = np.exp(generator.normal(np.log(MEDIAN), SPREAD, BATCHES * batch)).round().clip(1, LONGEST).astype(int)
    lengths: list[list[int]] = (np.sort(drawn) if case.endswith(" sorted") else drawn).reshape(-1, batch).tolist()
    return lengths


def make_batches(case: str, batch: int, device: torch.device) -> Batches:
    """Random codes, 0 where a record has ended."""
    return [_make_batch(lengths, number, device) for number, lengths in enumerate(draw_lengths(case, batch))]


def _make_batch(lengths: Sequence[int], seed: int, device: torch.device) -> dict[str, Any]:
    longest = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    ids *= torch.arange(longest) < torch.tensor(lengths)[:, None]
    return {"codes": ids.to(device), "label": torch.zeros(len(lengths), 1, device=device)}


def exact(model: Any, batches: Batches) -> Tensor:
    """PyHealth's own in float64, record by record at its own length: row 0 does not depend on padding."""
    from pyhealth.interpret.methods import AttentionRollout as Stock

    stock, found = Stock(copy.deepcopy(model).double()), []
    for batch in batches:
        label = batch["label"][:1].double()
        for record in batch["codes"]:
            row = attribute(stock, [{"codes": record[record != 0][None], "label": label}])
            found.append(functional.pad(row, (0, len(record) - len(row))))
    return torch.cat(found)


def attribute(interpreter: Any, batches: Batches) -> Tensor:
    """The attributions of every batch, in one vector. PyHealth's needs gradients."""
    with torch.inference_mode(False), torch.enable_grad():
        return torch.cat([interpreter.attribute(**batch)["codes"].detach().flatten() for batch in batches])


def drop_maps(model: Any) -> None:
    """PyHealth's interpreters leave maps behind, and gradients of them and of the parameters."""
    for module in model.modules():
        if hasattr(module, "attn_map"):
            module.attn_map = module.attn_gradients = None
    model.zero_grad(set_to_none=True)


def plain_forward(model: Any, batches: Batches) -> Tensor:
    """The logits, as cheaply as PyHealth makes them. Not a rollout."""
    with torch.inference_mode():
        return torch.cat([model(**batch)["logit"] for batch in batches])


def fused_forward(model: Any, batches: Batches) -> Tensor:
    """The logits by fused attention over the real codes alone. Not a rollout.

    The records of a batch stand end to end in one row without padding. They meet in attention only, which is run record
    by record: PyHealth's Transformer has no position encoding.
    """
    with torch.inference_mode():
        return torch.cat([_without_padding(model, batch["codes"]) for batch in batches])


def _without_padding(model: Any, codes: Tensor) -> Tensor:
    valid = codes != 0
    lengths = valid.sum(1)
    embedded = model.embedding_model({"codes": codes[valid][None]})["codes"]
    with fused_attention(model, lengths.tolist()):
        mixed, _ = model.transformer["codes"](embedded)
    return model.fc(mixed[0, lengths.cumsum(0) - lengths])


@contextmanager
def fused_attention(model: Any, lengths: Sequence[int] | None = None) -> Iterator[None]:
    """The model on torch's fused attention, without masks: of whole rows, or of records of these lengths end to end."""
    from pyhealth.models.transformer import Attention

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any = None, dropout: Any = None) -> Any:
        each = [part.split(lengths or query.shape[2], 2) for part in (query, key, value)]
        mixed = [functional.scaled_dot_product_attention(*parts) for parts in zip(*each, strict=True)]
        return torch.cat(mixed, 2), query.new_empty(0)

    sites = [module for module in model.modules() if isinstance(module, Attention)]
    try:
        for site in sites:
            site.forward = attend
        yield
    finally:
        for site in sites:
            del site.forward
