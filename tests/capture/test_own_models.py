"""Models of one's own, in every way that attention is written with torch, nested and in threads."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import rollout
from tests.support.capture_family import Family, check, prepared
from tests.support.capture_own import OWN
from tests.support.capture_state import assert_nothing_left, state
from tests.support.capture_table import assert_in_table, cases
from tests.support.cases import same_bits

SEEN = ["as nanoGPT and ETHOS-ARES", "as nanoGPT, written out"]


@pytest.mark.parametrize(("name", "kind"), cases(OWN))
def test_family(name: str, kind: str) -> None:
    check(OWN[name], kind)


def test_the_page_has_every_family() -> None:
    assert_in_table(OWN, "torch")


def test_x_transformers() -> None:
    pytest.importorskip("x_transformers", reason="x-transformers is not installed: pip install x-transformers")
    from tests.support.capture_x_transformers import X_TRANSFORMERS

    assert_in_table(X_TRANSFORMERS, "x-transformers")
    for name, kind in cases(X_TRANSFORMERS):
        check(X_TRANSFORMERS[name], kind)


def made(name: str) -> tuple[Any, Tensor]:
    family: Family = OWN[name]
    model, inputs = prepared(family, family.implementations[0])
    return model, inputs["x"]


@pytest.mark.parametrize("name", SEEN)
def test_nested_and_reentered(name: str) -> None:
    """Of what torch computes, too: each capture has its own tape, and what closes first leaves the other open."""
    model, x = made(name)
    before = state(model)
    with torch.no_grad(), rollout.capture(model) as alone:
        model(x)
    wanted = alone.rollout(-1)["blocks"]
    again = rollout.capture(model)
    with torch.no_grad(), rollout.capture(model) as outer, rollout.capture(model.blocks[1]) as part:
        with again as inner:
            model(x)
            with again as innermost:
                model(x.flip(1))
        model(x)
    assert same_bits(outer.rollout(-1)["blocks"], wanted)
    assert same_bits(inner.rollout(-1)["blocks"], innermost.rollout(-1)["blocks"])
    assert not torch.equal(inner.rollout(-1)["blocks"], wanted)
    assert part.modules() == ("attn",)
    assert same_bits(part.layers()[0].queries, outer.layers()[1].queries)
    handle = model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), again, rollout.capture(model):
        model(x)
    handle.remove()
    assert_nothing_left(model, before)


@pytest.mark.parametrize("name", SEEN)
def test_each_thread_records_its_own(name: str) -> None:
    """The first call of a model, which is looked at, made in two threads at once, beside one that does not capture."""
    model, x = made(name)
    before, plain = state(model), model(x).detach()
    inputs, wanted, results = [x, x.flip(1)], [], [None, None]
    twin, _ = made(name)
    for one in inputs:
        with torch.no_grad(), rollout.capture(twin) as tape:
            twin(one)
        wanted.append(tape.rollout(-1)["blocks"])
    barrier, stray = threading.Barrier(3), []

    def work(at: int) -> None:
        barrier.wait()
        for _ in range(8):
            with torch.no_grad(), rollout.capture(model) as tape:
                model(inputs[at])
            results[at] = tape.rollout(-1)["blocks"]

    def bystander() -> None:
        barrier.wait()
        stray.extend(model(x).detach() for _ in range(40))

    threads = [threading.Thread(target=work, args=(at,)) for at in range(2)] + [threading.Thread(target=bystander)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(result, one) for result, one in zip(results, wanted, strict=True))
    assert len(stray) == 40
    assert all(same_bits(output, plain) for output in stray)
    assert_nothing_left(model, before)


def test_layers_that_share_weights_go_round_a_stack() -> None:
    """A stack of two run twice is a chain of four; run on two inputs it is none."""

    class Round(torch.nn.Module):
        def __init__(self, side_by_side: bool) -> None:
            super().__init__()
            self.stack, self.side_by_side = made(SEEN[0])[0], side_by_side

        def forward(self, x: Tensor) -> Tensor:
            return self.stack(x) + self.stack(x.flip(1)) if self.side_by_side else self.stack(self.stack(x))

    x = made(SEEN[0])[1]
    model = Round(False)
    with torch.no_grad(), rollout.capture(model, shared_layers=True) as tape:
        model(x)
    assert tape.modules() == tuple(f"stack.blocks.{at}.attn" for at in (0, 1, 2, 0, 1, 2))
    with torch.no_grad(), pytest.raises(rollout.CaptureError, match="pass shared_layers=True"), rollout.capture(model):
        model(x)
    siamese = Round(True)
    with torch.no_grad(), pytest.raises(rollout.CaptureError, match="one input at a time"), rollout.capture(siamese):
        siamese(x)
    with (
        torch.no_grad(),
        pytest.raises(rollout.CaptureError, match="they run side by side"),
        rollout.capture(siamese, shared_layers=True),
    ):
        siamese(x)
