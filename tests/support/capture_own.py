"""Models of one's own that compute attention with torch in the ways that are about, and what a capture must say."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.support.capture_family import Family, Maps
from tests.support.cases import generator

B, S, E, H = 3, 8, 16, 4
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
X = {"x": torch.randn(B, S, E, generator=generator(1))}
TWO = {**X, "memory": torch.randn(B, 5, E, generator=generator(2))}


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


class CausalSelfAttention(nn.Module):
    """As nanoGPT has it; `flash` calls the fused function, with a dropout that is 0 but in training (as ETHOS-ARES)."""

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.attn_dropout, self.dropout, self.flash = nn.Dropout(0.1), 0.1, flash
        self.register_buffer("bias", CAUSAL.view(1, 1, S, S))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(part) for part in self.c_attn(x).split(E, dim=2))
        if self.flash:
            dropped = self.dropout if self.training else 0
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropped, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (k.size(-1) ** -0.5)
            att = att.masked_fill(self.bias[:, :, :S, :S] == 0, float("-inf"))
            att = self.attn_dropout(functional.softmax(att, dim=-1))
            y = att @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, S, E))


class EinsumAttention(nn.Module):
    """As code with einops is written, dimensions that are not named included."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(E, 3 * E, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(part) for part in self.to_qkv(x).chunk(3, dim=-1))
        sim = torch.einsum("... i d, ... j d -> ... i j", q * (E // H) ** -0.5, k)
        sim = sim.masked_fill(~CAUSAL, -torch.finfo(sim.dtype).max)
        out = torch.einsum("... i j, ... j d -> ... i d", sim.softmax(dim=-1), v)
        return out.transpose(1, 2).flatten(2)


class Processor:
    """What computes attention for a module of diffusers: no module itself, and replaceable."""

    def __call__(self, attn: "ProcessedAttention", hidden: Tensor, encoder_hidden: Tensor | None = None) -> Tensor:
        q, source = attn.to_q(hidden), hidden if encoder_hidden is None else encoder_hidden
        q, k, v = split(q), split(attn.to_k(source)), split(attn.to_v(source))
        mask = CAUSAL if encoder_hidden is None else None
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)
        return attn.to_out(mixed.transpose(1, 2).reshape(hidden.shape).to(q.dtype))


class ProcessedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(E, E) for _ in range(4))
        self.processor = Processor()

    def forward(self, hidden: Tensor, encoder_hidden: Tensor | None = None) -> Tensor:
        return self.processor(self, hidden, encoder_hidden)


class FlexAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)
        self.mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(part) for part in self.qkv(x).chunk(3, dim=-1))
        return flex_attention(q, k, v, block_mask=self.mask).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, attention: nn.Module, cross: nn.Module | None = None) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.attn, self.cross = nn.LayerNorm(E), nn.LayerNorm(E), attention, cross
        self.mlp = nn.Sequential(nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        if self.cross is not None:
            x = x + self.cross(x, memory)
        return x + self.mlp(self.ln_2(x))


class Stack(nn.Module):
    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, memory)
        return x


def stack(make: Callable[[], Block]) -> Callable[[str], Stack]:
    def made(_: str) -> Stack:
        torch.manual_seed(0)
        return Stack(*(make() for _ in range(3))).eval()

    return made


def by_hand(model: Stack, inputs: dict[str, Tensor], tape: Any) -> Maps:
    """The causal maps of every block, from its projections."""
    maps, x = [], inputs["x"]
    with torch.no_grad():
        for block in model.blocks:
            hidden, attention = block.ln_1(x), block.attn
            one = [module for name, module in attention.named_children() if "qkv" in name or name == "c_attn"]
            q, k = one[0](hidden).split(E, -1)[:2] if one else (attention.to_q(hidden), attention.to_k(hidden))
            scores = (E // H) ** -0.5 * split(q) @ split(k).transpose(-1, -2)
            maps.append(scores.masked_fill(~CAUSAL, float("-inf")).softmax(-1))
            x = block(x, inputs.get("memory"))
    return {"blocks": maps}


OWN: dict[str, Family] = {
    "as nanoGPT and ETHOS-ARES": Family(
        stack(lambda: Block(CausalSelfAttention(True))), X, by_hand, implementations=("fused",)
    ),
    "as nanoGPT, written out": Family(
        stack(lambda: Block(CausalSelfAttention(False))), X, by_hand, implementations=("plain",)
    ),
    "by einsum, as with einops": Family(
        stack(lambda: Block(EinsumAttention())), X, by_hand, implementations=("plain",)
    ),
    "with processors, as diffusers": Family(
        stack(lambda: Block(ProcessedAttention(), ProcessedAttention())), TWO, by_hand, implementations=("fused",)
    ),
    "flex_attention (block mask)": Family(
        stack(lambda: Block(FlexAttention())), X, by_hand, implementations=("compiled",),
        refused="a function that torch compiles",
    ),
}  # fmt: skip
