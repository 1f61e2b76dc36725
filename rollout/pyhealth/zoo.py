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

__all__ = ["PAIR", "READINGS", "Call", "Reading", "reading_of", "why_unread"]

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
    """

    part: str
    position: str
    shape: Callable[[Rows, Call], Rows]
    lengths: Callable[[Call], Tensor] | None = None
    features: tuple[str, ...] | None = None
    predicts: str = ""
    check: Callable[[Any], None] = lambda model: None
    cross_attention: bool = False


def reading_of(model: Any) -> Reading | None:
    """What is known of a model; None: it is none of these, or runs by a forward of its own."""
    name = _known(model, READINGS)
    if name == "TorchvisionModel" and not _is_vit(model):
        return None
    return None if name is None else READINGS[name]


def why_unread(model: Any) -> str | None:
    """Why a model of PyHealth's that attends has no relevance by position; None: it is not known."""
    name = _known(model, UNREAD)
    return None if name is None else UNREAD[name]


def _known(model: Any, names: Mapping[str, Any]) -> str | None:
    for kind in type(model).__mro__:
        if kind.__module__.startswith("pyhealth.models.") and kind.__name__ in names:
            own = getattr(type(model), "forward", None) is getattr(kind, "forward", None) and "forward" not in vars(
                model
            )
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


def _image(rows: Rows, call: Call) -> Rows:
    """[B, 1, H, W] as PyHealth's relevance of images; the class token's own is left out."""
    (row,) = rows.values()
    side = call.model.model.image_size
    across = side // call.model.model.patch_size
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


PAIR = {"s_q": "bwd_", "s_p": "fwd_"}
"""What MedLink is given → how the stream of it begins: queries are read backward in time, the corpus forward."""


def _pairs(rows: Rows, call: Call) -> Rows:
    return {key: row for key, start in PAIR.items() for stream, row in rows.items() if stream.startswith(start)}


TOKENS = "a token of its tokenizer, such as [CLS]"
READINGS: Mapping[str, Reading] = {
    "TransformersModel": Reading("model", TOKENS, _tokens, check=_check_pooled),
    "TorchvisionModel": Reading("model", "the class token, then the patches row by row", _image),
    "TransformerDeID": Reading("encoder", TOKENS, _tokens, _masked, predicts="its own label", check=_check_padding),
    "GPT2": Reading(
        "gpt2", "a token of the stream [BOS] codes [VISIT_DELIM] codes … [EOS]", _codes, _masked, ("visits",),
        predicts="the next token",
    ),
    "HALO": Reading(
        "halo_model", "the start, an empty one, then a visit each", _visits, _visits_end, ("visits",),
        predicts="the next visit",
    ),
    "PromptEHR": Reading(
        "bart", "a token of the decoder, [EOS] and [CODE_PROMPT] first", lambda rows, call: rows, _labelled,
        ("visits",), predicts="the next token", cross_attention=True,
    ),
    "MedLink": Reading(
        "", "a code of the queries or of the corpus", _pairs, features=("s_q", "s_p"),
        predicts="a score for every code, of which the largest counts",
    ),
}  # fmt: skip
UNREAD: Mapping[str, str] = {
    "ConCare": "its one attention is over features, between a pooling over time and one over features by weights of "
    "its own, so that no row of it is what the prediction reads; record it by "
    "rollout.capture(model.concare[feature].MultiHeadedAttention)",
    "MoleRec": "its attention is over the set of all substructures, the same for every patient, so that it says "
    "nothing of a record; record it by rollout.capture(model.layer.substructure_interaction_module)",
}
"""Models with attention that are refused, and why."""
