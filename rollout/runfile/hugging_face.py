"""A Hugging Face sequence classifier over event tokens: read from a folder, and its records explained.

Nothing is downloaded and no code of a folder is run. Which row of the rollout is wanted is not looked up by the name of
the architecture: `rollout._capture.read_rows` finds out which positions the classifier's head reads.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rollout._capture import capture
from rollout.cohort.explain import Explained, chain_of
from rollout.cohort.shares import TOLERANCES
from rollout.data.meds.dataset import FEATURE, LABEL
from rollout.errors import require
from rollout.files import first_line, read_json
from rollout.method import sums_to_one

AUTO = "transformers:AutoModelForSequenceClassification"
"""How a run file names such a model; the architecture is that of its `config.json`."""
CONFIG, WEIGHTS = "config.json", ("model.safetensors", "model.safetensors.index.json")
MANY = "multi_label_classification"
"""The `problem_type` whose logits are log odds, each of a label of its own."""
SHOWN = 3
MOST_SIZE, MOST_LAYERS = 2**31, 1_024
"""What a number in a config may be at most, and one that counts layers."""


def check_folder(folder: Path, name: str) -> dict[str, Any]:
    """Refuse a folder that no classifier can be read from by its config and safetensors alone; return the config.

    Raises:
        ValueError: naming what lacks, or what would need code, weights or adapters from elsewhere.
    """
    if not folder.is_dir() or not (folder / CONFIG).is_file():
        raise ValueError(f"{name} must be a folder with {CONFIG} and {WEIGHTS[0]}, got {folder}")
    if not any((folder / file).is_file() for file in WEIGHTS):
        raise ValueError(f"{name} must be a folder with {WEIGHTS[0]}, got {folder}: save the model as safetensors")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} must be an object, got {type(config).__name__}")
    for key, why in (
        ("auto_map", "the model is of code of its own, which is never run"),
        ("quantization_config", "a quantised model cannot be captured"),
    ):
        if key in config:
            raise ValueError(
                f"{folder / CONFIG} has {key}: {why}; build it in Python instead: rollout attribute --entry"
            )
    for key, value in config.items():
        most = MOST_LAYERS if key.endswith(("layers", "n_layer")) else MOST_SIZE
        if isinstance(value, int | float) and not -most <= value <= most:
            raise ValueError(f"{folder / CONFIG}: {key} must be at most {most:,}, got {value}")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} has adapter_config.json: merge the adapter into the model and save that")
    return config


def load_classifier(folder: Path, name: str) -> nn.Module:
    """Read a sequence classifier, in evaluation mode; from the folder alone, without running code of it.

    Args:
        folder: With `config.json` and safetensors.
        name: What to call it in an error.

    Raises:
        ValueError: As `check_folder`; it is no sequence classifier of transformers, or weights are missing, unknown or
            of other shapes.
    """
    check_folder(folder, name)
    transformers = require("transformers", "hf")
    chosen = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), **chosen)
        config.use_cache = False
        with torch.random.fork_rng(devices=[]), _without_bar(transformers):
            model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
                str(folder), config=config, use_safetensors=True, output_loading_info=True, **chosen
            )
    except Exception as error:
        raise ValueError(
            f"{name}: {folder} holds no sequence classifier that can be read: {first_line(error)}"
        ) from error
    for key, what in (
        ("missing_keys", "are missing, and would be random"),
        ("unexpected_keys", "are unknown to the model"),
        ("mismatched_keys", "are of another shape than the model's"),
    ):
        wrong = sorted(str(one) for one in found.get(key) or ())
        if wrong:
            raise ValueError(
                f"{name}: {folder} is no {type(model).__name__} with all its weights: {', '.join(wrong[:SHOWN])}"
                f"{', …' * (len(wrong) > SHOWN)} {what}"
            )
    return model.eval()


@contextmanager
def _without_bar(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bar of weights, which takes a moment only."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_outputs(config: Any, kind: str | None, largest: int | None, name: str) -> bool:
    """Whether the probability of class 1 alone is the prediction; refuse a classifier whose outputs are no prediction
    of these labels.

    Args:
        config: Of the classifier.
        kind: The column of the labels, such as `boolean_value`; None without labels.
        largest: The largest class among the labels.
        name: What to call the model in an error.

    Raises:
        ValueError: saying what does not go together.
    """
    classes, problem = config.num_labels, config.problem_type
    if kind == "float_value" or problem == "regression" or (classes == 1 and problem != MANY):
        raise ValueError(
            f"{name} must predict classes: its config says num_labels {classes} and problem_type {problem!r}, the "
            f"labels are {kind or 'none'}; for one logit that is the log odds of class 1, problem_type must be "
            '"multi_label_classification"'
        )
    if problem == MANY and classes > 1:
        raise ValueError(f"{name} predicts {classes} labels at once, and MEDS has one label for a record")
    if kind == "boolean_value" and classes > 2:
        raise ValueError(f"{name} predicts {classes} classes, and the labels are boolean")
    if largest is not None and largest >= max(classes, 2):
        raise ValueError(f"{name} predicts {classes} classes, and the labels have the class {largest}")
    return classes == 1 or (kind in (None, "boolean_value") and classes == 2)


def check_vocabulary(model: nn.Module, vocabulary: Mapping[str, int], padding: int, name: str) -> None:
    """Refuse a vocabulary whose ids are not those of the model.

    Raises:
        ValueError: An id is past the embeddings, or another one is padding.
    """
    rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    code = max(vocabulary, key=lambda one: vocabulary[one])
    if vocabulary[code] >= rows:
        raise ValueError(f"{name}: {code!r} has the id {vocabulary[code]}, and the model has {rows} embeddings")
    own = model.config.pad_token_id  # type: ignore[union-attr]
    if own is not None and own != padding:
        raise ValueError(f"{name}: padding has the id {padding}, and by the model's config.json it is {own}")


def longest_input(model: nn.Module) -> int | None:
    """How many tokens the model takes, as its position embeddings say, else its config; None: any number."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.endswith("position_embeddings"):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    found = getattr(model.config, "max_position_embeddings", None)
    return found if type(found) is int and found > 0 else None


def inputs_of(ids: Tensor, padding: int, first: int | None, last: int | None) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, S'] of records of codes [B, S], with the tokens that begin and end them."""
    mask = ids != padding
    if last is not None:
        ends = torch.arange(1, ids.shape[1] + 1, device=ids.device).mul(mask).amax(1, keepdim=True)
        ids = torch.cat([ids, ids.new_full((len(ids), 1), padding)], 1).scatter(1, ends, last)
        mask = torch.cat([mask, mask.new_zeros(len(ids), 1)], 1).scatter(1, ends, True)
    if first is not None:
        ids = torch.cat([ids.new_full((len(ids), 1), first), ids], 1)
        mask = torch.cat([mask.new_ones(len(ids), 1), mask], 1)
    return {"input_ids": ids, "attention_mask": mask.long()}


def rows_read(read: str, mask: Tensor) -> Tensor:
    """The rows of the rollout that are wanted: long [B], or weights float [B, S] for a mean.

    Args:
        read: `first`, `last` or `mean`.
        mask: The tokens there are, [B, S].
    """
    if read == "mean":
        return mask / mask.sum(1, keepdim=True)
    last = torch.arange(mask.shape[1], device=mask.device).mul(mask).amax(1)
    return torch.zeros_like(last) if read == "first" else last


def explain_events(
    model: Any,
    batch: Mapping[str, Any],
    *,
    method: str,
    backend: str,
    padding: int,
    first: int | None,
    last: int | None,
    read: str,
    single: bool,
    limit: int | None,
) -> Explained:
    """Relevance of the codes of records for what the classifier reads, and its prediction; one forward pass. Not yet
    run on a GPU.

    The relevance of the tokens that begin and end a record is left out: the codes' sums to 1 less that.

    Args:
        model: The classifier.
        batch: `codes`, as (hours [B, S], ids [B, S]), and `label` where there is one.
        method: A method that forms its chain from attention alone.
        backend: As in `rollout.attention_rollout`.
        padding: Id of padding, which stands on the right.
        first, last: Ids of the tokens that begin and end a record; None: none does.
        read: What the head reads: `first`, `last` or `mean`.
        single: Whether the prediction is the probability of class 1 alone.
        limit: Most tokens that the model takes.
    """
    ids = batch[FEATURE][1].to(model.device)
    inputs = _checked(inputs_of(ids, padding, first, last), limit)
    mask = inputs["attention_mask"]
    with capture(model, shared_layers=True) as tape, torch.inference_mode():
        logits = model(**inputs).logits
    chain = chain_of(method)
    assert chain is not None
    (row,) = tape.rollout(rows_read(read, mask), method=chain, lengths=mask.sum(1), backend=backend).values()
    emptied = not chain.own_path
    whole = sums_to_one(chain)
    off = (row.sum(1) - 1).abs() > TOLERANCES.get(row.dtype, 1e-4)
    if emptied:
        off &= row.any(1)
    if whole and bool(off.any()):
        raise ValueError(
            f"the relevance of all tokens sums to {float(row.sum(1)[off][0]):.6g}, must be 1 by the method"
        )
    start = int(first is not None)
    codes = row[:, start : start + ids.shape[1]].masked_fill(ids == padding, 0.0)
    alone = whole and first is None and last is None
    predicted = _probabilities(logits, single)
    return Explained({FEATURE: codes}, predicted, batch.get(LABEL), row_sums=alone, zero_rows=emptied)


def predict_events(
    model: Any,
    batch: Mapping[str, Any],
    *,
    padding: int,
    first: int | None,
    last: int | None,
    single: bool,
    limit: int | None,
) -> Tensor:
    """The prediction alone, [B, K]; arguments as in `explain_events`, padding may stand anywhere."""
    inputs = _checked(inputs_of(batch[FEATURE][1].to(model.device), padding, first, last), limit)
    with torch.inference_mode():
        return _probabilities(model(**inputs).logits, single)


def _checked(inputs: dict[str, Tensor], limit: int | None) -> dict[str, Tensor]:
    longest = int(inputs["attention_mask"].sum(1).max())
    if limit is not None and inputs["input_ids"].shape[1] > limit:
        added = longest - limit
        raise ValueError(
            f"the record has {longest} tokens, {added} more than the {limit} that the model takes: keep the last ones "
            "with [dataset] arguments = { max_events = … }"
        )
    return inputs


def _probabilities(logits: Tensor, single: bool) -> Tensor:
    logits = logits.float()
    if logits.shape[1] == 1:
        return logits.sigmoid()
    found = logits.softmax(1)
    return found[:, 1:] if single else found
