"""Small PyHealth data sets, batches and models for the drop-in's tests, and PyHealth's own interpreter beside ours."""

import copy
from datetime import datetime
from functools import cache
from typing import Any

import torch
from pyhealth.datasets import create_sample_dataset, get_dataloader
from pyhealth.interpret.methods import AttentionRollout as Stock
from pyhealth.models import StageAttentionNet, Transformer
from torch import Tensor, nn

from rollout.pyhealth import AttentionRollout

Result = dict[str, Tensor] | Exception


def _codes(prefix: str, count: int, step: int = 1) -> list[str]:
    return [f"{prefix}{(step * i) % 13}" for i in range(count)]


def _visits(i: int, first_empty: bool = False) -> list[list[str]]:
    visits = [_codes("d", 1 + (i + k) % 3, k + 1) for k in range(1 + i)]
    return [[], *visits] if first_empty else visits


def _times(count: int) -> list[float]:
    return [1.5 * k for k in range(count)]


SCHEMAS: dict[str, dict[str, str]] = {
    "flat": {"conditions": "sequence", "drugs": "sequence"},
    "nested": {"visits": "nested_sequence"},
    "mixed": {"visits": "nested_sequence", "vitals": "tensor", "flags": "multi_hot"},
    "stagenet": {"visits": "stagenet"},
    "stagenet_flat": {"codes": "stagenet"},
    "stagenet_tensor": {"visits": "stagenet", "labs": "stagenet_tensor"},
    "timeseries": {"vitals": "timeseries"},
    "gaps": {"visits": "nested_sequence"},
    "half_empty": {"conditions": "sequence", "drugs": "sequence"},
}


def _sample(kind: str, i: int) -> dict[str, Any]:
    features = {
        "flat": {"conditions": _codes("c", 2 + 3 * i, i + 1), "drugs": _codes("m", 6 - i)},
        "nested": {"visits": _visits(i)},
        "mixed": {"visits": _visits(i), "vitals": [0.1 * i, 1.0, -2.0], "flags": _codes("f", i + 1)},
        "stagenet": {"visits": (_times(1 + i), _visits(i))},
        "stagenet_flat": {"codes": (_times(2 + i), _codes("c", 2 + i, i + 1))},
        "stagenet_tensor": {
            "visits": (_times(1 + i), _visits(i)),
            "labs": (_times(2 + i), [[0.3 * k - 1.0, 2.0, float(i)] for k in range(2 + i)]),
        },
        "timeseries": {
            "vitals": ([datetime(2020, 1, 1, k) for k in range(1 + i)], [[1.0 * k, -1.0] for k in range(1 + i)])
        },
        "gaps": {"visits": _visits(i, first_empty=i % 2 == 0)},
        "half_empty": {"conditions": _codes("c", 3 * i) if i > 2 else [], "drugs": _codes("m", 2 + i)},
    }
    return {"patient_id": f"p{i}", "visit_id": f"v{i}", "label": i % 2, **features[kind]}


@cache
def dataset(kind: str) -> Any:
    """Six samples of unequal lengths; "gaps" has empty first visits, "half_empty" three samples without conditions."""
    samples = [_sample(kind, i) for i in range(6)]
    return create_sample_dataset(samples, SCHEMAS[kind], {"label": "binary"}, dataset_name=kind)


def batch(kind: str, size: int = 6) -> dict[str, Any]:
    """The first `size` samples, as PyHealth's data loader gives them."""
    return next(iter(get_dataloader(dataset(kind), batch_size=size, shuffle=False)))


def transformer(kind: str, *, cls: type = Transformer, heads: int = 2, num_layers: int = 3, **options: Any) -> Any:
    """A seeded Transformer whose attention is far from uniform."""
    torch.manual_seed(7)
    return _sharpened(cls(dataset(kind), embedding_dim=16, heads=heads, num_layers=num_layers, **options))


def stage_net(kind: str, *, cls: type = StageAttentionNet, **options: Any) -> Any:
    """A seeded StageAttentionNet whose attention is far from uniform."""
    torch.manual_seed(7)
    return _sharpened(cls(dataset(kind), embedding_dim=8, chunk_size=4, levels=2, num_heads=2, **options))


def _sharpened(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear_layers" in name:
                parameter.mul_(4.0)
    return model


def result(interpreter: type, model: Any, data: dict[str, Any], **options: Any) -> Result:
    """What an interpreter gives, or the exception it raises."""
    try:
        return interpreter(model, **options).attribute(**data)
    except Exception as error:
        return error


def both(model: Any, data: dict[str, Any]) -> tuple[Result, Result]:
    """(ours, PyHealth's)."""
    return result(AttentionRollout, model, data), result(Stock, model, data)


def assert_same(ours: Result, stock: Result, tolerance: float = 1e-5) -> None:
    """Same keys, shapes, dtypes and devices, and the same numbers."""
    assert isinstance(ours, dict), repr(ours)
    assert isinstance(stock, dict), repr(stock)
    assert list(ours) == list(stock)
    for key in stock:
        assert (ours[key].shape, ours[key].dtype) == (stock[key].shape, stock[key].dtype), key
        assert ours[key].device == stock[key].device
        torch.testing.assert_close(ours[key], stock[key], atol=tolerance, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


def maps_of(model: Any, data: dict[str, Any]) -> dict[str, list[Tensor]]:
    """The attention maps of a copy of the model, by PyHealth's own hooks, in float64."""
    model = copy.deepcopy(model).eval()
    model.requires_grad_(True)
    model.set_attention_hooks(True)
    model(**data)
    return {key: [layer.double() for layer, _ in layers] for key, layers in model.get_attention_layers().items()}


def naive_rollout(maps: list[Tensor], fuse: Any = lambda a: a.mean(1), renormalize: bool = False) -> Tensor:
    """M_L · … · M_1 with M_l = ½(I + fuse_h A_l), written out."""
    rollout = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    for attention in maps:
        matrix = 0.5 * (torch.eye(attention.shape[-1], dtype=torch.float64) + fuse(attention))
        rollout = (matrix / matrix.sum(-1, keepdim=True) if renormalize else matrix) @ rollout
    return rollout


def rows(rollout: Tensor, positions: Tensor) -> Tensor:
    """Row `positions[b]` of each [S, S]."""
    return rollout[torch.arange(len(positions)), positions]


def values(data: dict[str, Any], key: str) -> Tensor:
    """The value tensor of a feature of a batch."""
    return data[key] if isinstance(data[key], Tensor) else data[key][1]


def valid(ids: Tensor) -> Tensor:
    """Which positions hold a code: flat ids [B, S], or nested ids [B, V, C]."""
    return ids != 0 if ids.dim() == 2 else (ids != 0).any(-1)


class HookOnly(nn.Module):
    """A third-party model that knows the three readout methods only; it keeps its maps in a dict.

    It reads the mean of all rows, which is no row. Its hooks need gradients, as PyHealth's do.
    """

    def __init__(self, layers: int = 2, heads: int = 2, size: int = 8, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(20, size, padding_idx=0)
        self.projections = nn.ModuleList(nn.Linear(size, 2 * size, bias=False) for _ in range(layers))
        self.heads, self.fused, self.enabled = heads, fused, False
        self.kept: dict[str, list[Tensor]] = {}
        self.gradients: list[Tensor] = []
        self.calls: list[tuple[Any, ...]] = []

    def set_attention_hooks(self, enabled: bool) -> None:
        self.calls.append(("hooks", enabled))
        self.enabled = enabled

    def get_attention_layers(self) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
        return {key: [(attention, None) for attention in maps] for key, maps in self.kept.items()}

    def get_relevance_tensor(self, R: dict[str, Tensor], **data: Any) -> dict[str, Tensor]:
        self.calls.append(("readout", {key: r.clone() for key, r in R.items()}))
        return {key: r.mean(1) for key, r in R.items()}

    def forward(self, codes: Tensor, **data: Any) -> Tensor:
        x = self.embedding(codes)
        if self.enabled:
            self.kept = {"codes": []}
        for projection in self.projections:
            x = self._layer(projection, x)
        return x.sum((1, 2))

    def _layer(self, projection: nn.Module, x: Tensor) -> Tensor:
        q, k = projection(x).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, 1)
        attention = (4 * q @ k.transpose(-1, -2)).softmax(-1)
        attention = attention.mean(1) if self.fused else attention
        if self.enabled:
            attention.register_hook(self.gradients.append)
            self.kept["codes"].append(attention.detach())
        return x + (attention if self.fused else attention.mean(1)) @ x


def codes(batch_size: int = 3, seq: int = 5) -> Tensor:
    """Ids for `HookOnly`."""
    return torch.randint(1, 20, (batch_size, seq), generator=torch.Generator().manual_seed(1))
