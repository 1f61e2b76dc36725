"""PyHealth's models without the three readout methods: over what each attends, and which row its prediction reads.

One line of `READINGS` per model; `rollout.pyhealth.captured` runs them. A model is known by its class, or by a class
of its own that leaves `forward` as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from rollout._capture.read_rows import positions_read
from rollout.errors import CaptureError
from rollout.files import first_line
from rollout.pyhealth.entries import Entries, Patches, Tokens

__all__ = ["PAIR", "READINGS", "Call", "Reading", "is_read", "reading_of", "why_unread"]

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """How the part of a model that attends was called.

    Attributes:
        model: The whole model.
        data: The batch it was given.
        args: Positional arguments of the part.
        kwargs: The others.
    """

    model: Any
    data: Mapping[str, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def feature(self) -> str:
        """The model's one feature."""
        found: str = self.model.feature_keys[0]
        return found


@dataclass(frozen=True)
class Reading:
    """What is known of a model.

    Attributes:
        part: Path of the module in the model whose arguments say what the positions are.
        position: What a position is.
        shape: Rows by stream → relevance by feature, in the shape that is given back.
        lengths: How many positions each sample has, long [B], padding left out; None: as the recorded masks say.
        features: Of the batch that must be there; None: the model's own.
        predicts: What is predicted from each position; empty where the prediction reads position 0 alone.
        check: Refuses, by a ValueError, a model of the class that reads something else, or that cannot be read.
        cross_attention: Whether it is an encoder with a decoder.
        pooled: For a model that weighs the positions of its one attention by a softmax of its own: feature → the path
            of what attends, and of what gives the weights [B, S] as its second output, which are the row read.
        entries: The entries of the feature that rows of a cohort are written for; None: the codes of its visits.
        rows: As `shape`, for these entries; None: as `shape` gives them.
        each: Whether a code of a visit has a score of its own.
        predicted: Whether what is predicted from a position stands there in `y_prob`.
        no_cohort: Why a cohort of the model cannot be attributed; None: it can.
    """

    part: str
    position: str
    shape: Callable[[Rows, Call], Rows]
    lengths: Callable[[Call], Tensor] | None = None
    features: tuple[str, ...] | None = None
    predicts: str = ""
    check: Callable[[Any], None] = lambda model: None
    cross_attention: bool = False
    pooled: Callable[[Any], dict[str, tuple[str, str]]] | None = None
    entries: Callable[[Any], Entries] | None = None
    rows: Callable[[Rows, Call], Rows] | None = None
    each: bool = False
    predicted: bool = True
    no_cohort: str | None = None

    def entry_rows(self, rows: Rows, call: Call) -> Rows:
        """Relevance of what rows of a cohort are written for."""
        return (self.rows or self.shape)(rows, call)


def is_read(kind: type) -> bool:
    """Whether it is known how models of a class are read."""
    return _known(kind, READINGS) is not None


def reading_of(model: Any) -> Reading | None:
    """What is known of a model; None: it is none of these, or runs by a forward of its own."""
    name = None if "forward" in vars(model) else _known(type(model), READINGS)
    if name is None or (name == "TorchvisionModel" and not _is_vit(model)):
        return None
    return READINGS[name]


def why_unread(model: Any) -> str | None:
    """Why a model of PyHealth's that attends has no relevance by position; None: it is not known."""
    name = _known(type(model), UNREAD)
    return None if name is None else UNREAD[name]


def _known(model: type, names: Mapping[str, Any]) -> str | None:
    for kind in model.__mro__:
        if kind.__module__.startswith("pyhealth.models.") and kind.__name__ in names:
            own = getattr(model, "forward", None) is getattr(kind, "forward", None)
            return kind.__name__ if own else None
    return None


def _is_vit(model: Any) -> bool:
    from torchvision.models import VisionTransformer

    inner = model.model
    return isinstance(inner, VisionTransformer) and type(inner).forward is VisionTransformer.forward


def _masked(call: Call) -> Tensor:
    """Of a part called with an attention mask that pads on the right."""
    mask: Tensor = call.kwargs["attention_mask"]
    return mask.sum(1)


def _labelled(call: Call) -> Tensor:
    """Of a decoder, which has an input for each of its labels."""
    labels: Tensor = call.kwargs["labels"]
    return (labels != -100).sum(1)


_read: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Which positions the pooled output of a model reads, asked once."""


def _check_pooled(model: Any) -> None:
    """Refuse a text model whose pooled output is made of anything but position 0."""
    inner, tokenizer, kind = model.model, model.tokenizer, type(model.model).__name__
    _check_padding(model)
    if inner not in _read:
        with torch.inference_mode(False):
            inputs = tokenizer(["0 1 2 3 4", "0", "0 1 2"], return_tensors="pt", padding=True).to(model.device)
            try:
                _read[inner] = positions_read(inner, inputs, lambda output: output.pooler_output)
            except (CaptureError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"AttentionRollout: the TransformersModel's {kind} cannot be explained: {first_line(error)}"
                ) from error
    if _read[inner] != "first":
        raise ValueError(
            f"AttentionRollout: a TransformersModel's pooled output must read the first position, that of its {kind} "
            f"reads the {_read[inner]}: record it by rollout.capture(model)"
        )


def _check_padding(model: Any) -> None:
    if model.tokenizer.padding_side != "right":
        raise ValueError(
            f"AttentionRollout: the tokenizer of a {type(model).__name__} must pad on the right, got "
            f"{model.tokenizer.padding_side!r}"
        )


def _tokens(rows: Rows, call: Call) -> Rows:
    (row,) = rows.values()
    return {call.feature: row}


MOST = 256
"""Tokens that a TransformersModel reads of a text."""


def tokens_of(model: Any) -> Tokens:
    """The tokens that a model of texts reads: a TransformerDeID's has a `max_length`, and takes words."""
    most = getattr(model, "max_length", None)
    return Tokens(model.tokenizer, MOST if most is None else most, most is not None)


def _token_rows(rows: Rows, call: Call) -> Rows:
    """Relevance of the text's own tokens, [B, S']."""
    (row,) = rows.values()
    tokens, ids = tokens_of(call.model), call.kwargs["input_ids"]
    own = call.kwargs["attention_mask"].bool() & ~tokens.is_special(ids)
    for b, text in enumerate(call.data[call.feature]):
        if ids[b, own[b]].tolist() != tokens(text).tolist():
            raise ValueError(
                f"the tokens that the {type(call.model).__name__} read must be the first {tokens.most} of its text, "
                f"those of text {b} are not"
            )
    order = (~own).long().argsort(dim=1, stable=True)[:, : int(own.sum(1).max())]
    return {call.feature: row.masked_fill(~own, 0).gather(1, order)}


def patches_of(model: Any) -> Patches:
    """The patches that a ViT cuts an image into."""
    return Patches(model.model.image_size // model.model.patch_size)


def _patch_rows(rows: Rows, call: Call) -> Rows:
    (row,) = rows.values()
    return {call.feature: row[:, 1:]}


def _image(rows: Rows, call: Call) -> Rows:
    """[B, 1, H, W] as PyHealth's relevance of images; the class token's own is left out."""
    (row,) = rows.values()
    side, across = call.model.model.image_size, patches_of(call.model).across
    patches = row[:, 1:].unflatten(1, (1, across, across))
    if call.data.get("interpolate", True):
        patches = functional.interpolate(patches, size=(side, side), mode="bilinear", align_corners=False)
    return {call.feature: patches}


def _codes(rows: Rows, call: Call) -> Rows:
    """Relevance of the stream's codes where they stand in the visits, [B, V, C]; that of its marks is left out."""
    (row,) = rows.values()
    visits, ids = call.data["visits"].to(row.device), call.kwargs["input_ids"]
    is_code = call.kwargs["attention_mask"].bool() & (ids < call.model.code_vocab_size)
    relevance = row.new_zeros(visits.shape)
    for b, visit in enumerate(visits):
        at = visit.nonzero(as_tuple=True)
        read = is_code[b].nonzero()[:, 0]
        if not torch.equal(visit[at][: len(read)], ids[b, read]):
            raise ValueError(
                f"AttentionRollout: the codes that {type(call.model).__name__} reads must be those of the visits in "
                f"their order; of sample {b} they are not"
            )
        relevance[b][tuple(place[: len(read)] for place in at)] = row[b, read]
    return {"visits": relevance}


def _visits(rows: Rows, call: Call) -> Rows:
    """A visit's relevance in each cell of its codes, [B, V, C]: the visits stand from position 2 on."""
    (row,) = rows.values()
    count = call.data["visits"].shape[1]
    of_visits = functional.pad(row[:, 2:], (0, max(0, count - row.shape[1] + 2)))[:, :count]
    return {"visits": of_visits[..., None].expand(call.data["visits"].shape)}


def _visits_end(call: Call) -> Tensor:
    """HALO marks a record's end on the position of its last visit; without visits, on position 1."""
    layout = call.model.config
    visits: Tensor = call.args[0]
    return visits[..., layout.code_vocab_size + layout.label_vocab_size + 1].argmax(1) + 1


def _weighed(model: Any) -> dict[str, tuple[str, str]]:
    """The parts of a ConCare, of each feature of several positions; a single one attends to itself."""
    return {
        key: (f"concare.{key}.MultiHeadedAttention", f"concare.{key}.FinalAttentionQKV")
        for key in model.dynamic_feature_keys
        if model.concare[key].input_dim + bool(model.concare[key].static_dim) > 1
    }


def _columns(rows: Rows, call: Call) -> Rows:
    """A column's relevance in each of its steps; codes are one column; that of the static features is left out."""
    relevance = {}
    for key in call.model.dynamic_feature_keys:
        value = call.data[key]
        row = rows.get(key, torch.ones(len(value), 1, device=call.model.device))
        ones = [1] * (value.dim() - 2)
        columns = value.shape[2] if call.model._proc_types[key] == "other" else 1
        relevance[key] = row[:, :columns].view(len(value), *ones, columns).expand(value.shape)
    return relevance


PAIR = {"s_q": "bwd_", "s_p": "fwd_"}
"""What MedLink is given → how the stream of it begins: queries are read backward in time, the corpus forward."""


def _pairs(rows: Rows, call: Call) -> Rows:
    return {key: row for key, start in PAIR.items() for stream, row in rows.items() if stream.startswith(start)}


TOKENS = "a token of its tokenizer, such as [CLS]"
READINGS: Mapping[str, Reading] = {
    "TransformersModel": Reading(
        "model", TOKENS, _tokens, _masked, check=_check_pooled, entries=tokens_of, rows=_token_rows,
    ),
    "TorchvisionModel": Reading(
        "model", "the class token, then the patches row by row", _image, entries=patches_of, rows=_patch_rows,
    ),
    "TransformerDeID": Reading(
        "encoder", TOKENS, _tokens, _masked, predicts="its own label", check=_check_padding, entries=tokens_of,
        rows=_token_rows,
    ),
    "ConCare": Reading(
        "", "a column of a feature, and the static features as one more", _columns, pooled=_weighed,
        no_cohort="its positions are the columns of a record, and rows are written of its steps",
    ),
    "GPT2": Reading(
        "gpt2", "a token of the stream [BOS] codes [VISIT_DELIM] codes … [EOS]", _codes, _masked, ("visits",),
        predicts="the next token", each=True,
    ),
    "HALO": Reading(
        "halo_model", "the start, an empty one, then a visit each", _visits, _visits_end, ("visits",),
        predicts="the next visit", predicted=False,  # it gives 0 where none follows
    ),
    "PromptEHR": Reading(
        "bart", "a token of the decoder, [EOS] and [CODE_PROMPT] first", lambda rows, call: rows, _labelled,
        ("visits",), predicts="the next token", cross_attention=True,
        no_cohort="it masks other codes of a record in each call, and has two relevances for a code",
    ),
    "MedLink": Reading(
        "", "a code of the queries or of the corpus", _pairs, features=("s_q", "s_p"),
        predicts="a score for every code, of which the largest counts",
        no_cohort="it takes pairs of records, which samples are not",
    ),
}  # fmt: skip
UNREAD: Mapping[str, str] = {
    "MoleRec": "its attention is over the set of all substructures, the same for every patient, so that it says "
    "nothing of a record; record it by rollout.capture(model.layer.substructure_interaction_module)",
}
"""Models with attention that are refused, and why."""
