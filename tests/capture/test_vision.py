"""Capture of models of images: torchvision, every family of timm, and what the stages of an image model do."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import rollout
from tests.support.capture_state import assert_nothing_left, state
from tests.support.cases import generator, same_bits
from tests.support.oracles import assert_close, rollout_matrices

pytest.importorskip("timm", reason="timm is not installed: pip install 'attention-rollout[dev]'")

import timm

from tests.support.capture_family import check
from tests.support.capture_table import assert_in_table, cases
from tests.support.capture_timm import TIMM

ROLLOUT = rollout.METHODS["rollout"]
B, S, E, H = 3, 7, 16, 4
PADDED = torch.arange(S) >= torch.tensor([7, 4, 2])[:, None]
HOLES = torch.rand(S, S, generator=generator(5)) < 0.3
HOLES.fill_diagonal_(False)


@pytest.mark.parametrize(("name", "kind"), cases(TIMM))
def test_family(name: str, kind: str) -> None:
    check(TIMM[name], kind)


def test_the_page_has_every_family() -> None:
    assert_in_table(TIMM, "timm")


def test_torchvision_vit():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(16, 4, 3, H, E, 24, num_classes=5).double().eval()
    torch.nn.init.normal_(model.heads.head.weight)
    x = torch.randn(2, 3, 16, 16, generator=generator(2), dtype=torch.float64)
    before = state(model)
    with torch.inference_mode():
        plain = model(x)
        with rollout.capture(model) as tape:
            output = model(x)
        hidden = (
            torch.cat([model.class_token.expand(2, -1, -1), model._process_input(x)], 1) + model.encoder.pos_embedding
        )
        maps = []
        for block in model.encoder.layers:
            normed = block.ln_1(hidden)
            maps.append(block.self_attention(normed, normed, normed, average_attn_weights=False)[1])
            hidden = block(hidden)
    assert plain.abs().max() > 0
    assert same_bits(output.clone(), plain.clone())
    full = rollout_matrices(maps, ROLLOUT)
    assert_close(tape.rollout(0)["encoder.layers"], full[:, 0], "qk")
    assert_close(tape.rollout()["encoder.layers"], full, "qk")
    assert_nothing_left(model, before)


def test_timm_masks():
    torch.manual_seed(0)
    x = torch.randn(B, S, E, generator=generator(1), dtype=torch.float64)
    model = timm.layers.Attention(E, H, qkv_bias=True).double().eval()
    model.fused_attn = False
    maps: list[Tensor] = []
    model.attn_drop.register_forward_hook(lambda module, args, result: maps.append(result))
    for given in (
        {"attn_mask": ~HOLES},
        {"attn_mask": torch.zeros(S, S).masked_fill(HOLES, -math.inf).double()},
        {"attn_mask": ~PADDED[:, None, None]},
        {"is_causal": True},
    ):
        with torch.inference_mode(), rollout.capture(model) as tape:
            model(x, **given)
        assert_close(tape.maps(0), maps.pop(), "qk")


class ImageBlock(nn.Module):
    """Attention over the pixels of [B, C, H, W] or [B, H, W, C], and a convolution when it is asked for."""

    def __init__(self, last: bool, convolved: bool) -> None:
        super().__init__()
        self.attn, self.last = Pixels(), last
        self.conv = nn.Conv2d(E, E, 3, padding=1) if convolved else None

    def forward(self, x: Tensor) -> Tensor:
        sequence = (x if self.last else x.movedim(1, -1)).flatten(1, 2)
        mixed = self.attn(sequence).unflatten(1, x.shape[1:3] if self.last else x.shape[2:])
        x = x + (mixed if self.last else mixed.movedim(-1, 1))
        return x if self.conv is None else x + self.conv(x)


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)
        self.maps: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        self.maps = [(q @ k.transpose(-1, -2) * (E // H) ** -0.5).softmax(-1).detach()]
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def images(last: bool, *convolved: bool) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(*(ImageBlock(last, one) for one in convolved)))
    shape = (2, 4, 6, E) if last else (2, E, 4, 6)
    return model.double().eval(), torch.randn(shape, generator=generator(1), dtype=torch.float64)


@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
def test_a_stack_over_images(last: bool) -> None:
    model, x = images(last, False, False)
    with torch.no_grad(), rollout.capture(model) as tape:
        model(x)
    maps = [block.attn.maps[0] for block in model[0]]
    assert_close(tape.rollout()["0"], rollout_matrices(maps, ROLLOUT), "qk")


def test_an_image_as_wide_as_its_channels() -> None:
    """Which axis has the channels cannot be told from the shape."""
    for last in (False, True):
        model, _ = images(last, False, False)
        x = torch.randn(2, E, E, E, generator=generator(2), dtype=torch.float64)
        with torch.no_grad(), rollout.capture(model) as tape:
            model(x)
        assert tape.layers()[0].seq == E * E
        assert tape.notes == ()


@pytest.mark.parametrize(
    ("convolved", "where"),
    [((True, False), "between Pixels at 0.1.attn and the attention below"),
     ((False, True), "between the last attention and the end of ImageBlock at 0.1")],
    ids=["between", "at-the-end"],
)  # fmt: skip
def test_a_convolution_over_images_is_refused(where: str, convolved: tuple[bool, bool]) -> None:
    model, x = images(False, *convolved)
    with pytest.raises(rollout.CaptureError, match=where), torch.no_grad(), rollout.capture(model):
        model(x)


def test_attention_over_channels_is_refused() -> None:
    """One layer, whose heads attend from channel to channel: no chain of positions."""

    class Channels(Pixels):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.unflatten(-1, (H, -1)).permute(0, 2, 3, 1) for part in self.qkv(x).chunk(3, -1))
            return x + functional.scaled_dot_product_attention(q, k, v).permute(0, 3, 1, 2).flatten(2)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.xca = Channels()

        def forward(self, x: Tensor) -> Tensor:
            return self.xca(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(Block()).double().eval(), torch.randn(B, S, E, generator=generator(1), dtype=torch.float64)
    with pytest.raises(rollout.CaptureError, match="attends over 4 positions"), torch.no_grad(), rollout.capture(model):
        model(x)
