"""`frozen_gradient`: against a network written out by hand, that it sums to the logit, and what it refuses."""

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rollout.errors import CaptureError
from rollout.frozen import frozen_gradient

WIDTH, HEADS, CLASSES = 16, 4, 3


class Classifier(nn.Module):
    """An encoder and a head over its first position, in float64."""

    def __init__(self, norm_first: bool = False, activation: str = "gelu") -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, 0.1, activation, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, 0])


def embedded(batch: int = 2, seq: int = 5) -> Tensor:
    return torch.randn(batch, seq, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def left_as_found(model: nn.Module) -> None:
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any({"forward", "_compiled_call_impl"} & set(vars(module)) for module in model.modules())


class ByHand:
    """The classifier's arithmetic for one sample; what is held is that of `x`, whatever the network is given.

    Its output is then linear in what it is given, up to a constant: a position's relevance is what the logit loses when
    that position's embedding is 0.
    """

    def __init__(self, model: Classifier, norm_first: bool) -> None:
        self.model, self.norm_first = model, norm_first
        self.held: list[Tensor] = []

    def logits(self, x: Tensor, of: list[Tensor] | None = None) -> Tensor:
        self.held, self.given = [], None if of is None else iter(of)
        for layer in self.model.encoder.layers:
            if self.norm_first:
                x = x + self.attention(layer.self_attn, self.norm(layer.norm1, x))
                x = x + self.feed(layer, self.norm(layer.norm2, x))
            else:
                x = self.norm(layer.norm1, x + self.attention(layer.self_attn, x))
                x = self.norm(layer.norm2, x + self.feed(layer, x))
        return x[0] @ self.model.head.weight.T + self.model.head.bias

    def hold(self, value: Tensor) -> Tensor:
        kept = value if self.given is None else next(self.given)
        self.held.append(kept)
        return kept

    def norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        deviation = self.hold((centred.square().mean(1, keepdim=True) + norm.eps).sqrt())
        return centred / deviation * norm.weight + norm.bias

    def attention(self, site: nn.MultiheadAttention, x: Tensor) -> Tensor:
        q, k, v = (x @ site.in_proj_weight.T + site.in_proj_bias).view(len(x), 3, HEADS, -1).permute(1, 2, 0, 3)
        weights = self.hold((q @ k.mT / math.sqrt(WIDTH // HEADS)).softmax(-1))
        mixed = (weights @ v).transpose(0, 1).reshape(len(x), WIDTH)
        return mixed @ site.out_proj.weight.T + site.out_proj.bias

    def feed(self, layer: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
        inner = x @ layer.linear1.weight.T + layer.linear1.bias
        return inner * self.hold(functional.gelu(inner) / inner) @ layer.linear2.weight.T + layer.linear2.bias


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_position_counts_for_what_the_held_network_loses_without_it(norm_first: bool) -> None:
    model, x = Classifier(norm_first), embedded()
    found = frozen_gradient(model, x, target=1)
    with torch.no_grad():
        for sample, scores in zip(x, found, strict=True):
            network = ByHand(model, norm_first)
            whole = network.logits(sample)
            torch.testing.assert_close(whole, model(sample[None])[0])
            held = network.held
            for position in range(len(sample)):
                without = sample.index_fill(0, torch.tensor(position), 0.0)
                lost = (whole - network.logits(without, of=held))[1]
                assert scores[position].item() == pytest.approx(lost.item(), abs=1e-12)
    left_as_found(model)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_scores_sum_to_the_logit_of_a_network_without_biases(norm_first: bool, activation: str) -> None:
    model, x = without_biases(Classifier(norm_first, activation)), embedded(3)
    logits = model(x).detach()
    torch.testing.assert_close(frozen_gradient(model, x).sum(1), logits.max(1).values)
    for target in range(CLASSES):
        torch.testing.assert_close(frozen_gradient(model, x, target).sum(1), logits[:, target])
    by_function = frozen_gradient(model, x, lambda output: output[:, 2] - output[:, 0])
    torch.testing.assert_close(by_function.sum(1), logits[:, 2] - logits[:, 0])


def without_biases(model: nn.Module) -> Any:
    """Those of position embeddings too: what does not depend on the tokens."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "position" in name or "token_type" in name or "pos_embed" in name or "wpe" in name:
            nn.init.zeros_(parameter)
        if name.endswith(("cls_token", "dist_token", "reg_token")):
            nn.init.zeros_(parameter)
    return model


HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "eager BERT": ("Bert", {"attn_implementation": "eager"}),
    "BERT": ("Bert", {}),
    "ModernBERT": ("ModernBert", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
                                  "sep_token_id": 2}),
    "Llama": ("Llama", {"pad_token_id": 0, "num_key_value_heads": 2}),
    "GPT-2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "bos_token_id": 1,
                       "eos_token_id": 2}),
    "ALBERT": ("Albert", {"embedding_size": 32}),
}  # fmt: skip


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_hugging_face_encoders_and_decoders_sum_to_their_logit(family: str) -> None:
    """Post-LN, pre-LN, RMSNorm, gates, activations of several operations, fused attention and written out."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    name, options = HUGGING_FACE[family]
    options = dict(options)
    attention = options.pop("attn_implementation", "sdpa")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=60,
        num_labels=CLASSES, **options,
    )  # fmt: skip
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = without_biases(getattr(transformers, f"{name}ForSequenceClassification")(config)).double().eval()
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    found = frozen_gradient(model, {"input_ids": ids}, 1)
    assert found.shape == ids.shape
    error = (found.sum(1) - model(input_ids=ids).logits[:, 1]).abs().max() / found.abs().max()
    assert error.item() < (1e-6 if name == "Llama" else 1e-12)  # Llama's norms are float32
    left_as_found(model)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "eva02_tiny_patch14_224"])
def test_timm_encoders_sum_to_their_logit(name: str) -> None:
    """Patches are the positions; LayerScale and gates among them."""
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'attention-rollout[dev]'")
    torch.manual_seed(0)
    model = without_biases(timm.create_model(name, num_classes=CLASSES, depth=2)).double().eval()
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = frozen_gradient(model, image, 2)
    error = (found.sum() - model(image)[0, 2]).abs() / found.abs().max()
    assert error.item() < 1e-12


class Body(nn.Module):
    """What a function does between a layer and a head."""

    def __init__(self, function: Callable[["Body", Tensor], Tensor], inner: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.head = nn.Linear(WIDTH, WIDTH), inner, nn.Linear(WIDTH, CLASSES)
        self.function = function
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, self.first(x)).mean(1))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


def untaught(body: Body, x: Tensor) -> Tensor:
    with torch.no_grad():
        fixed = body.first(x)
    return fixed + x


def written(body: Body, x: Tensor) -> Tensor:
    x[:, 0] = x[:, 1].exp()
    return x


REFUSED: dict[str, tuple[Callable[[Body, Tensor], Tensor], nn.Module | None, str]] = {
    "exponential": (lambda m, x: x.exp(), None, r"exp in the root \(Body\) is not known to be linear"),
    "square": (lambda m, x: x**2, None, "pow in the root"),
    "product": (lambda m, x: x * m.first(x), None, "mul in the root .* multiplies or divides by what depends"),
    "product by name": (lambda m, x: torch.mul(x, other=m.first(x)), None, "multiplies or divides"),
    "quotient": (lambda m, x: 1.0 / x, None, r"in the root \(Body\)"),
    "linear attention": (lambda m, x: x @ (functional.elu(x).mT @ x), None, "matmul in the root"),
    "recurrence": (lambda m, x: m.inner(x)[0], nn.GRU(WIDTH, WIDTH, batch_first=True), r"gru in inner \(GRU\)"),
    "group norm": (lambda m, x: m.inner(x.mT).mT, nn.GroupNorm(2, WIDTH), r"group_norm in inner \(GroupNorm\)"),
    "weights as a signal": (lambda m, x: x + x.softmax(-1), None, "makes a signal of what is held, of softmax in the"),
    "root as a signal": (lambda m, x: torch.cat([x, x.abs().sqrt()], 1), None, "of what is held, of sqrt in the root"),
    "detached": (lambda m, x: x + m.first(x).detach(), None, "of what is held, of detach in the root"),
    "no gradient": (untaught, None, r"of what is held, of no_grad in first \(Linear\)"),
    "custom function": (lambda m, x: Doubled.apply(x), None, "made by code that torch does not show"),
    "written in place": (written, None, "__setitem__ in the root .* must write what is linear"),
    "nothing but weights": (
        lambda m, x: x.softmax(-1),
        None,
        "the target must be a logit.* made by softmax in the root",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_to_be_linear_is_refused_by_name(case: str) -> None:
    function, inner, message = REFUSED[case]
    model = Body(function, inner)
    with pytest.raises(CaptureError, match=message):
        frozen_gradient(model, embedded())
    left_as_found(model)


def renormalised(body: Body, x: Tensor) -> Tensor:
    weights = (x @ x.mT).softmax(-1).tril()
    return torch.einsum("bij,bjd->bid", weights / weights.sum(-1, keepdim=True), x)


ALLOWED: dict[str, Callable[[Body, Tensor], Tensor]] = {
    "gate": lambda m, x: x * torch.sigmoid(m.first(x)),
    "gated by an activation": lambda m, x: functional.silu(m.first(x)) * x,
    "quick gelu": lambda m, x: x * torch.sigmoid(1.702 * x),
    "glu": lambda m, x: functional.glu(torch.cat([x, m.first(x)], -1)),
    "own layer norm": lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6),
    "own root mean square norm": lambda m, x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt(),
    "l2 norm": lambda m, x: functional.normalize(x, dim=-1),
    "weights summed to 1 again": renormalised,
    "written in place": lambda m, x: x.clone().mul_(2.0),
    "unused nonlinearity": lambda m, x: (x.exp(), x)[1],
    "activation at zero": lambda m, x: functional.gelu(functional.relu(x)),
    "pooled by the largest": lambda m, x: x.amax(1, keepdim=True),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_is_linear_once_it_is_held_sums_to_the_logit(case: str) -> None:
    model, x = without_biases(Body(ALLOWED[case])), embedded()
    torch.testing.assert_close(frozen_gradient(model, x, 0).sum(1), model(x)[:, 0].detach())


def test_under_inference_mode_with_frozen_parameters_and_in_two_threads() -> None:
    model, x = Classifier(), embedded()
    wanted = frozen_gradient(model, x)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        torch.testing.assert_close(frozen_gradient(model, x.clone()), wanted, rtol=0, atol=0)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(frozen_gradient(model, x))) for _ in range(2)]
    for thread in threads:
        thread.start()
    plain = model(x)
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert all(torch.equal(scores, wanted) for scores in found)
    assert torch.equal(plain, model(x))
    assert not any(p.requires_grad for p in model.parameters())


class Meanwhile(nn.Module):
    """Has another thread train it, and explain it, in the midst of its forward, and reads a weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.matrix, self.nested = Classifier(), nn.Parameter(torch.eye(WIDTH).double()), True
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.nested:
            self.nested = False
            threads = [threading.Thread(target=each, args=(x.detach().clone(),)) for each in (self.train_it, self.run)]
            for thread in threads:
                thread.start()
                thread.join()
        return self.model(x @ self.matrix.T)

    def train_it(self, x: Tensor) -> None:
        self.seen += torch.autograd.grad(self(x).sum(), list(self.parameters()))

    def run(self, x: Tensor) -> None:
        self.seen.append(frozen_gradient(self, x))


def test_another_thread_meets_the_parameters_as_they_are() -> None:
    model, x = Meanwhile(), embedded()
    wanted = frozen_gradient(model.model, x)
    torch.testing.assert_close(frozen_gradient(model, x), wanted, rtol=0, atol=1e-14)
    *gradients, nested = model.seen
    assert torch.allclose(nested, wanted, rtol=0, atol=1e-14)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for found, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, other)
    left_as_found(model)


def test_a_sample_is_the_same_alone() -> None:
    model, x = Classifier(), embedded(4)
    torch.testing.assert_close(frozen_gradient(model, x, 0)[2:3], frozen_gradient(model, x[2:3], 0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": 3}, ValueError, "target must be a class below 3, got 3"),
        ({"target": -1}, ValueError, "target must be a class below 3, got -1"),
        ({"at": "nowhere"}, ValueError, "at must be the path of a module of the model, got 'nowhere'"),
        ({"at": "encoder.layers.0.self_attn.out_proj"}, ValueError, "must run encoder.layers.0.self_attn.out_proj"),
        ({"target": lambda output: output.softmax(-1)[:, 0]}, CaptureError, "take it before softmax or sigmoid"),
        ({"target": lambda output: torch.ones(2)}, CaptureError, "made by nothing that depends on the embedding"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Classifier()
    with pytest.raises(error, match=message):
        frozen_gradient(model, embedded(), **arguments)
    left_as_found(model)


def test_a_model_that_drops_out_or_is_none_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"frozen_gradient: the model must be in eval mode.*call model.eval\(\)"):
        frozen_gradient(Classifier().train(), embedded())
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        frozen_gradient("model", embedded())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the embedding must be a floating tensor \[B, …, E\], got torch.int64"):
        frozen_gradient(Classifier(), torch.ones(2, 3, dtype=torch.long))
