"""PyHealth's Transformer run on the distinct rows of its records, its own forward pass around them.

Where a stream's ids are looked up in an embedding, each id is embedded once: what the Transformer gets in place of the
embedding is row 0 of its encoder, [B, 1, E], which the encoder hands through. Anything else is told apart by its bits
when it comes to the encoder.
"""

from collections.abc import Callable
from typing import Any

import torch
from pyhealth.models.embedding import EmbeddingModel
from torch import Tensor, nn

from rollout._capture.adapters.pyhealth import CannotFuseError
from rollout._capture.patch import Around, foreign_forward
from rollout.pyhealth.merged.blocks import Block, blocks_of
from rollout.pyhealth.merged.encode import encode, serves
from rollout.pyhealth.merged.gradients import GradientEncoding
from rollout.pyhealth.merged.rows import Rows, rows_of, rows_of_ids
from rollout.pyhealth.merged.trial import behaves
from rollout.pyhealth.protocol import usable
from rollout.pyhealth.watch import Batch, ModelCapture, Sites, Transformer, listener
from rollout_kernels import Method

Forward = Callable[..., Any]
Blocks = dict[str, list[Block]]

BACKENDS = ("auto", "torch")


class CannotMergeError(ValueError):
    """A model that must be run on all positions; the message says why."""


def merged_blocks(model: Any, method: Method, backend: str) -> Blocks:
    """Per feature key the blocks of its encoder.

    PyHealth's own Transformer is served on a CPU, when of each stream it reads row 0 and nothing else and nobody looks
    into its layers, by methods of which one row of a layer needs no other.

    Raises:
        CannotMergeError: it must be run on all positions.
    """
    if backend not in BACKENDS:
        raise CannotMergeError(f"backend {backend!r} was asked for")
    if not serves(method):
        raise CannotMergeError(f"the method {'measures values' if method.values else 'looks at whole maps'}")
    if not isinstance(model, Transformer):
        raise CannotMergeError(f"{type(model).__name__} is no Transformer of PyHealth's")
    forwards = foreign_forward(model) is None and type(model).forward is Transformer.forward
    if not forwards or not _is_its_own(model, "forward_from_embedding"):
        raise CannotMergeError("the model has a forward pass of its own")
    blocks: Blocks = {}
    for key, layer in model.transformer.items():
        found = blocks_of(layer)
        if found is None:
            raise CannotMergeError(f"of {key!r} a layer is not all PyHealth's own, on a CPU, or has a hook in it")
        if not behaves(layer, found):
            raise CannotMergeError(f"the encoder of {key!r} tells positions apart")
        blocks[key] = found
    return blocks


def _is_its_own(model: Any, name: str) -> bool:
    """Whether a method of the Transformer is PyHealth's, neither a subclass's nor the instance's."""
    return getattr(type(model), name) is getattr(Transformer, name) and name not in vars(model)


class MergedCapture(ModelCapture):
    """Row 0 of one forward pass and of its rollout, from the distinct rows of each record.

    Its `run` raises CannotFuseError when a layer is called with a mask that is not [B, S].

    Args:
        model, sites: as `attention_sites` found them.
        method: of the rollout.
        blocks: as `merged_blocks` found them.
    """

    def __init__(self, model: Any, sites: Sites, method: Method, blocks: Blocks) -> None:
        super().__init__(model, sites)
        self.method, self.blocks = method, blocks
        self._shapes: dict[str, tuple[int, int]] = {}
        self._first_rows: dict[str, Tensor] = {}
        self._looked_up: set[str] = set()
        self._ahead: set[str] = set()
        self.key_of |= {model.transformer[key]: key for key in sites}
        self.key_of[model.embedding_model] = ""

    def watched(self) -> dict[nn.Module, Around]:
        layers: dict[nn.Module, Around] = {self.model.transformer[key]: _through_layer for key in self.sites}
        return super().watched() | layers | {self.model.embedding_model: _through_embedding}

    def forward(self, data: Batch) -> Any:
        """Run the model once, its own hooks off, and give what it returns."""
        self._looked_up = {key for key in self.sites if is_looked_up(self.model, key, data[key])}
        return super().forward(data)

    def embed(self, forward: Forward, inputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Row 0 of an encoder in place of its embedding; None when the embedding is to be made."""
        if len(inputs) != 1 or not self._looked_up.issuperset(inputs):
            return None
        ((key, ids),) = inputs.items()
        known = self.model.embedding_model.embedding_layers[key].num_embeddings
        rows = rows_of_ids(
            ids[:, : self.model.max_seq_len],
            known,
            lambda found: forward({key: found})[key],
            self.model._mask_from_embeddings,
        )
        if rows is None:
            return None
        self._ahead.add(key)
        return {key: self._run(key, rows).unsqueeze(1)}

    def run_layer(self, layer: nn.Module, x: Tensor, mask: Tensor | None) -> Any:
        """What a `TransformerLayer` gives: None, which the Transformer does not read, and row 0, [B, E]."""
        key = self.key_of[layer]
        if key in self._ahead:
            return None, x[:, 0]
        if mask is not None and mask.shape != x.shape[:2]:
            raise CannotFuseError
        valid = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask != 0
        return None, self._run(key, rows_of(x, valid))

    def _run(self, key: str, rows: Rows) -> Tensor:
        batch, seq = rows.index.shape
        self._shapes[key] = batch, seq
        return self._encode(key, rows)

    def _encode(self, key: str, rows: Rows) -> Tensor:
        output, self._first_rows[key] = encode(self.blocks[key], rows, self.method)
        return output

    def shape(self, key: str) -> tuple[int, int]:
        self.check_layers(key, [key in self._shapes] * len(self.sites[key]))
        return self._shapes[key]

    def rollout(self, key: str) -> Tensor:
        """Row 0 [B, S] of the rollout of a feature key; what was recorded is dropped here."""
        self.shape(key)
        return self._first_rows.pop(key).clone()  # the clone is no inference tensor


class MergedGradientCapture(MergedCapture):
    """As `MergedCapture`, for a method that weights maps with the gradient of a target.

    Args:
        target: the logits [B, C] → the number whose gradient it is.
    """

    def __init__(
        self, model: Any, sites: Sites, method: Method, blocks: Blocks, target: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(model, sites, method, blocks)
        self._target = target
        self._encodings: dict[str, GradientEncoding] = {}

    def run(self, data: Batch) -> None:
        """Run the model forward, its own hooks off, and backward as far as the lowest attention."""
        with torch.inference_mode(False), torch.enable_grad():
            logits = self.forward(usable(data))["logit"]
            wanted = [each for encoding in self._encodings.values() for each in encoding.wanted]
            gradients = torch.autograd.grad(self._target(logits), wanted, materialize_grads=True)
        found = dict(zip(wanted, gradients, strict=True))
        with torch.no_grad():
            for key, encoding in self._encodings.items():
                self._first_rows[key] = encoding.relevance(found)
        self._encodings.clear()

    def _encode(self, key: str, rows: Rows) -> Tensor:
        encoding = self._encodings[key] = GradientEncoding(self.blocks[key], rows, self.method)
        return encoding.output


def is_looked_up(model: Any, key: str, feature: Any) -> bool:
    """Whether a feature is ids [B, S] without a mask, which the model looks up and nobody else sees embedded."""
    if not _looks_up(model.embedding_model, key):
        return False
    if not all(_is_its_own(model, name) for name in ("_pool_embedding", "_mask_from_embeddings")):
        return False
    schema = model.dataset.input_processors[key].schema()
    parts = (feature,) if isinstance(feature, Tensor) else feature
    if "mask" in schema or "value" not in schema or len(parts) != len(schema):
        return False
    value = parts[schema.index("value")]
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def _looks_up(embedding: nn.Module, key: str) -> bool:
    layers = embedding.embedding_layers if type(embedding) is EmbeddingModel else None
    if not isinstance(layers, nn.ModuleDict) or key not in layers:
        return False
    layer = layers[key]
    return type(layer) is nn.Embedding and _is_unwatched(embedding) and _is_unwatched(layer)


def _is_unwatched(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or foreign_forward(module) is not None)


def _through_embedding(module: nn.Module, forward: Forward, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    capture = listener(module)
    found = capture.embed(forward, inputs) if isinstance(capture, MergedCapture) else None
    return forward(inputs, *args, **kwargs) if found is None else found


def _through_layer(
    module: nn.Module, forward: Forward, x: Tensor, mask: Tensor | None = None, register_hook: bool = False
) -> Any:
    capture = listener(module)
    if not isinstance(capture, MergedCapture):
        return forward(x, mask, register_hook)
    return capture.run_layer(module, x, mask)
