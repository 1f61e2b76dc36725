"""`rollout doctor --model`: what it says of a user's own model, and how it refuses what is none."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from rollout.cli import app, main

MODULE = """
import torch
from torch import nn
from torch.nn import functional


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return x + functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, mixed=False):
        super().__init__()
        self.blocks = nn.ModuleList(OwnAttention() for _ in range(2))
        self.spare_attention = OwnAttention()
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mixed = mixed

    def forward(self, x, memory):
        for block in self.blocks:
            x = block(x)
            x = x + x.roll(1, 1) if self.mixed else x
        return x + self.cross(x, memory, memory)[0]


BATCH = {"x": torch.randn(3, 5, 8), "memory": torch.randn(3, 4, 8)}
def good(): return Model().eval(), BATCH
def positional(): return Model().eval(), tuple(BATCH.values())
def mixed(): return Model(True).eval(), BATCH
def alone(): return Model().eval()
def encoder(): return nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval(), BATCH["x"]
def training(): return nn.TransformerEncoderLayer(8, 2, 8)
def wrong(): return 3
def wrong_first(): return 3, BATCH
def misfit(): return Model().eval(), {"y": 3}
def raises(): raise OSError("no weights")
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_models", raising=False)


def doctor(name: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["doctor", "--model", f"own_models:{name}"], catch_exceptions=False)
    return result.exit_code, result.stdout.splitlines()


@pytest.mark.parametrize("name", ["good", "positional"])
def test_what_is_captured_and_what_is_not(name: str) -> None:
    assert doctor(name) == (
        0,
        [
            f"Model of own_models:{name}",
            "stream blocks: 2 layers over 5 positions, 3 samples",
            "  0  blocks.0 (OwnAttention), 2 heads of 4, causal",
            "  1  blocks.1 (OwnAttention), 2 heads of 4, causal",
            "left out, attention over another sequence: cross (MultiheadAttention)",
            "did not attend in this call: spare_attention (OwnAttention)",
            "its output with a capture is the same, bit for bit",
            "value_norm and kobayashi are not for it: capture: with values=True an attention must be seen to be "
            "multiplied by one W_O and added to a residual, x + W_O·o, and OwnAttention at blocks.0 hands the output "
            "of its heads to add before any W_O: leave values=True out",
        ],
    )


def test_what_the_value_aware_methods_need_can_be_had() -> None:
    status, lines = doctor("encoder")
    assert status == 0
    assert lines[-1] == "value_norm and kobayashi can be had: capture(model, values=True)"


def test_a_refusal_says_why_and_what_could_be_had_all_the_same() -> None:
    status, lines = doctor("mixed")
    assert status == 1
    assert "refused: capture:" in lines[1]
    assert "positions are mixed by something else between OwnAttention at blocks.1 and" in lines[1]
    assert lines[2] == "with allow='attention_layers_only', less than the model:"
    assert lines[3] == "stream blocks: 2 layers over 5 positions, 3 samples"
    assert lines[-1].startswith("  let pass: positions are mixed")


def test_how_the_drop_in_runs_a_model_of_pyhealths(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyhealth", reason="the PyHealth drop-in needs the pyhealth extra")
    from tests.support.pyhealth_models import batch, stage_net, transformer

    models = SimpleNamespace(
        transformer=lambda: (transformer("flat").eval(), batch("flat")),
        stage_net=lambda: (stage_net("stagenet").eval(), batch("stagenet")),
    )
    monkeypatch.setitem(sys.modules, "own_models", models)
    said = {}
    for name in vars(models):
        said[name] = CliRunner().invoke(app, ["doctor", "--model", f"own_models:{name}"]).output.splitlines()[1]
    assert said == {
        "transformer": "rollout.pyhealth.AttentionRollout runs it on the distinct rows of each record, every score "
        "visited once, and of the top layer one row",
        "stage_net": "rollout.pyhealth.AttentionRollout runs it on all positions with fused attention: "
        "StageAttentionNet is no Transformer of PyHealth's",
    }


def test_a_model_without_a_batch() -> None:
    status, lines = doctor("alone")
    assert status == 0
    assert lines[1].startswith("nothing that is refused before a model runs")
    assert lines[2:] == [
        "  attends by its name: blocks.0 (OwnAttention)",
        "  attends by its name: blocks.1 (OwnAttention)",
        "  attends by its name: spare_attention (OwnAttention)",
        "  attends by its name: cross (MultiheadAttention)",
    ]
    status, lines = doctor("training")
    assert status == 1
    assert "refused: capture: the model must be in eval mode" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own_models"], "--model must be package.module:function, got 'own_models'"),
        (["own_models:nothing"], "--model own_models:nothing: own_models has no function nothing"),
        (["nowhere:f"], "--model nowhere:f: there is no module nowhere to import from"),
        (["own_models:wrong"], "must return a torch.nn.Module, or (model, batch), got int"),
        (["own_models:wrong_first"], "got tuple with int first"),
        (["own_models:misfit"], "the model, called with the batch, raised TypeError:"),
        (["own_models:raises"], "--model own_models:raises raised OSError: no weights"),
        (["own_models:good", "--device", "cpu"], "--device is for the checks of the machine"),
    ],
)
def test_what_cannot_be_looked_at(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["rollout", "doctor", "--model", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
