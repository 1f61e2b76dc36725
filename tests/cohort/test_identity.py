"""What tells one run from another: the caller's code, what it holds, the model's settings, the samples' content."""

import functools
import json
import os
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rollout.cohort import content
from rollout.cohort.code import describe
from rollout.cohort.content import UNKNOWN, sample_digest
from rollout.cohort.digest import shown
from rollout.cohort.identity import function_identity, model_identity, read_state
from tests.support.toy_cohort import Attention, Records, assert_same, attribute, explain, rows

ROOT = Path(__file__).resolve().parents[2]
MODULE = '''
import functools
import json
import numpy as np
import torch
import mine.helpers as helpers
from mine.helpers import rescale

SCALE = 0.5
NAMES = {{"a", "b", "c", "d"}}
TABLE = {{"double": lambda x: x * 2}}

class Base:
    floor = 0.25
    def limit(self, x):
        return max(x, self.floor)

class Explain(Base):
    """A callable object."""
    def __init__(self, factor=2):
        self.factor, self._secret, self.calls = factor, "s", 0
        self.weights = torch.arange(3.0)
    def __call__(self, model, batch):
        self.calls += 1
        return self.limit(self.factor)

class Net(torch.nn.Module):
    depth = 3
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self._temperature, self.heads = torch.nn.Linear(2, 2), 1.0, (2, 4)
    def forward(self, x):
        return rescale(self.layer(x)) / self._temperature

def made(power):
    def inner(model, batch):
        return batch ** power
    return inner

@torch.inference_mode()
def explain(model, batch, *, margin=0.1):
    # a comment
    if batch in {{"x", "y", "z"}} or batch in NAMES:
        return helpers.shift(batch) + margin
    return [rescale(one) * SCALE for one in batch] + json.loads("[1]") + [TABLE["double"](1)]

partial = functools.partial(explain, margin=0.3)
'''
HELPERS = """
OFFSET = 7
def shift(x):
    return x + OFFSET
def rescale(x):
    return x / 3
def unused(x):
    return 1
"""
PROBE = """
import json, sys
sys.path[:0] = {paths!r}
import torch
from rollout.cohort.identity import function_identity, model_identity, read_state
from rollout.cohort.content import sample_digest
from tests.support.toy_cohort import Records
import mine.explaining as m
net, found = m.Net(), {{}}
functions = dict(explain=m.explain, partial=m.partial, made=m.made(3), object=m.Explain())
for name, function in functions.items():
    found[name] = function_identity(function, [net])["code"]
found["state"] = read_state(net, functions, [net])
found["model"] = model_identity(net)
found["samples"] = [sample_digest(Records(9)[n]) for n in range(9)]
print(json.dumps(found))
"""


def probe(folder: Path, replace: tuple[str, str] = ("", ""), seed: int = 0) -> dict[str, Any]:
    """What another process makes of the module, with some of it replaced."""
    package = folder / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name, text in (("explaining", MODULE.replace("{{", "{").replace("}}", "}")), ("helpers", HELPERS)):
        (package / f"{name}.py").write_text(text.replace(*replace) if replace[0] else text)
    script = PROBE.format(paths=[str(folder), str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return probe(tmp_path_factory.mktemp("first"))


def test_it_is_the_same_in_every_process_and_place(first, tmp_path: Path) -> None:
    assert probe(tmp_path / "elsewhere", seed=1) == first
    plain = {name: value for name, value in first["state"].items() if not str(value).startswith("sha256:")}
    assert plain == {
        "model._temperature": 1.0, "model.heads": "[2, 4]", "model.layer.in_features": 2,
        "model.layer.out_features": 2, "mine.explaining.Net.depth": 3, "explain.margin": 0.1, "explain.SCALE": 0.5,
        "explain.helpers.shift.OFFSET": 7, "partial.margin": 0.3, "partial.SCALE": 0.5,
        "partial.helpers.shift.OFFSET": 7, "made.power": 3, "object._secret": "s", "object.calls": 0,
        "object.factor": 2, "mine.explaining.Explain.__init__.factor": 2, "mine.explaining.Explain.floor": 0.25,
    }  # fmt: skip
    assert {"explain.NAMES", "explain.TABLE", "object.weights"} <= set(first["state"]) - set(plain)


CASES = [
    (("# a comment", "# another\n    # comment"), set()),
    (("return 1\n", "return 2\n"), set()),
    (("+ margin", "- margin"), {"explain", "partial"}),
    (('"z"}', '"w"}'), {"explain", "partial"}),
    (("x / 3", "x / 4"), {"explain", "partial", "model"}),
    (("x * 2", "x * 3"), {"explain", "partial"}),
    (("x + OFFSET", "x - OFFSET"), {"explain", "partial"}),
    (("batch ** power", "batch * power"), {"made"}),
    (("self.limit(self.factor)", "self.limit(-self.factor)"), {"object"}),
    (("max(x", "min(x"), {"object"}),
    (("/ self._temperature", "* self._temperature"), {"model"}),
    (("SCALE = 0.5", "SCALE = 0.6"), {"state"}),
    (("OFFSET = 7", "OFFSET = 8"), {"state"}),
    (("margin=0.1", "margin=0.2"), {"state"}),
    (("floor = 0.25", "floor = 0.5"), {"state"}),
    (('"d"}', '"e"}'), {"state"}),
    (("_temperature, self.heads = torch.nn.Linear(2, 2), 1.0", "_temperature, self.heads = torch.nn.Linear(2, 2), 2.0"),
     {"model", "state"}),
    (("arange(3.0)", "arange(4.0)"), {"object", "state"}),
    (("manual_seed(0)", "manual_seed(1)"), {"model"}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("replace", "differ"), CASES, ids=[case[0][1] for case in CASES])
def test_what_is_changed_is_seen_in_another_process(first, tmp_path: Path, replace, differ: set[str]) -> None:
    now = probe(tmp_path, replace)
    assert {key for key in first if now[key] != first[key]} == differ
    if "state" in differ:
        assert sum(first["state"][key] != now["state"].get(key) for key in first["state"]) >= 1


def test_what_is_changed_is_seen() -> None:
    """The same cases, each compiled in this process."""

    def found(replace: tuple[str, str]) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for name, text in (("helpers", HELPERS), ("explaining", MODULE.replace("{{", "{").replace("}}", "}"))):
            module = type(sys)(f"mine.{name}")
            sys.modules[f"mine.{name}"] = module
            names[name] = module
            if name == "helpers":
                sys.modules["mine"] = type(sys)("mine")
                sys.modules["mine"].helpers = module  # type: ignore[attr-defined]
            text = text.replace(*replace) if replace[0] else text
            exec(compile(text, f"{name}.py", "exec"), vars(module))
        m = names["explaining"]
        net = m.Net()
        functions = {"explain": m.explain, "partial": m.partial, "made": m.made(3), "object": m.Explain()}
        codes = {name: function_identity(function, [net])["code"] for name, function in functions.items()}
        return {**codes, "model": model_identity(net), "state": read_state(net, functions, [net])}

    try:
        before = found(("", ""))
        assert None not in before.values()
        for replace, differ in CASES:
            now = found(replace)
            assert {key for key in before if now[key] != before[key]} == differ, replace
    finally:
        for name in ("mine", "mine.helpers", "mine.explaining"):
            sys.modules.pop(name, None)


def test_installed_code_is_not_looked_at() -> None:
    assert describe([torch.relu, json.dumps, nn.Linear, functools.partial(np.sum, axis=1)], "f").code is None
    assert model_identity(nn.Sequential(nn.Linear(2, 2)))["code"] is None
    assert model_identity(Attention())["code"] is not None


def test_the_model_and_the_dataset_are_not_entered() -> None:
    model, records = Attention(), Records(3)

    def closing(batch):
        return model, records, batch

    assert describe([closing], "f", [model, records]).state == {}
    assert "f.records.count" in describe([closing], "f", [model]).state


def test_a_circle_of_functions_ends() -> None:
    def ping(n):
        return pong(n - 1)

    def pong(n):
        return ping(n)

    one = describe([ping], "f")
    assert one.code is not None
    assert one == describe([ping], "f")


def counting(model, batch):
    counting.calls += 1  # type: ignore[attr-defined]
    model.calls = getattr(model, "calls", 0) + 1
    model.embed._seen = [*getattr(model.embed, "_seen", []), len(batch["codes"])]
    if counting.calls == 14:  # type: ignore[attr-defined]
        raise KeyboardInterrupt
    return explain(model, batch)


def test_counters_do_not_break_a_resume(tmp_path: Path) -> None:
    """Kept by the model, in a private list, and by the function; stopped, gone on with, and with another start."""
    counting.calls, model = 0, Attention()  # type: ignore[attr-defined]
    attribute(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        attribute(tmp_path / "out", model=model, explain=counting)
    assert counting.calls == 14  # type: ignore[attr-defined]
    volatile = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["volatile"]
    assert volatile == ["explain.calls", "model.calls", "model.embed._seen"]
    counting.calls = 100  # type: ignore[attr-defined]
    assert attribute(tmp_path / "out", model=model, explain=counting).done > 0
    assert_same(tmp_path / "out", tmp_path / "whole")
    counting.calls = 0  # type: ignore[attr-defined]
    assert attribute(tmp_path / "out", model=Attention(), explain=counting).kept == 5


def other_explain(model, batch):
    found = explain(model, batch)
    return found.__class__({key: value * 2 for key, value in found.relevance.items()}, found.y_prob, found.y_true)


def with_private(value: float) -> Attention:
    model = Attention()
    model.embed._temperature = value  # type: ignore[assignment]
    return model


def test_another_explain_collate_or_private_setting_is_refused_by_name(tmp_path: Path) -> None:
    def make_explain(factor: float, twice: bool = False):
        def mine(model, batch):
            return explain(model, batch)

        def mine_too(model, batch):
            return other_explain(model, batch)

        mine.factor = mine_too.factor = factor  # type: ignore[attr-defined]
        chosen = mine_too if twice else mine
        chosen.__qualname__ = "mine"
        return chosen

    def make_collate(pad: int):
        def mine(samples):
            from tests.support.toy_cohort import collate

            return collate(samples) | {"pad": pad}

        return mine

    first = {"model": with_private(1.0), "explain": make_explain(1.0), "collate": make_collate(0)}
    attribute(tmp_path / "out", **first)
    before = rows(tmp_path / "out")
    assert attribute(tmp_path / "out", **first).kept == 5
    for change, match in [
        ({"explain": make_explain(1.0, twice=True)}, r'explain\.code: "\w+…" there, "\w+…" now'),
        ({"explain": make_explain(2.0)}, r"explain\.factor: 1\.0 there, 2\.0 now"),
        ({"explain": explain}, r'explain\.name: .* there, "tests\.support\.toy_cohort\.explain" now'),
        ({"collate": make_collate(1)}, r"collate\.pad: 0 there, 1 now"),
        ({"model": with_private(2.0)}, r"model\.embed\._temperature: 1\.0 there, 2\.0 now"),
        ({"model": Attention()}, r"model\.embed\._temperature: 1\.0 there, null now"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=rf"out holds another run .*What differs: .*{match}"):
            attribute(tmp_path / "out", **{**first, **change})
    assert rows(tmp_path / "out").equals(before, null_equal=True)


def test_another_version_is_noted_and_not_refused(tmp_path: Path, monkeypatch) -> None:
    from rollout.cohort import run, session

    out = tmp_path / "out"
    attribute(out)
    (out / "parts" / "part-00001.json").unlink()
    real = session.version
    monkeypatch.setattr(session, "version", lambda name: "9.9.9" if name == "numpy" else real(name))
    monkeypatch.setattr(run, "python_version", lambda: "cpython-399")
    monkeypatch.setattr(run, "function_identity", lambda f, known: {**function_identity(f, known), "code": "c" * 64})
    assert attribute(out).done == 20
    notes = json.loads((out / "manifest.json").read_bytes())["notes"]
    assert notes == [
        f"code was compiled by {sys.implementation.cache_tag}; that of a later session could not be compared with it",
        f"session 2: numpy {np.__version__} → 9.9.9",
    ]
    monkeypatch.undo()
    assert attribute(out).kept == 5


SAMPLE = {
    "patient_id": "p1", "visit_id": None, "n": 3, "flag": True, "x": 0.5, "codes": torch.tensor([1, 2]),
    "timed": (torch.tensor([0.5]), torch.tensor([[1, 2]])), "words": ["a", "b"], "nested": [[1, 2], [3]],
    "array": np.arange(3), "half": torch.ones(2, dtype=torch.bfloat16), "text": "é\ud800",
}  # fmt: skip
OTHERS = [
    {"patient_id": "p2"}, {"visit_id": "None"}, {"n": 3.0}, {"n": True}, {"flag": 1}, {"x": 0.25}, {"text": "é"},
    {"codes": torch.tensor([2, 1])}, {"codes": torch.tensor([1, 2], dtype=torch.int32)}, {"codes": [1, 2]},
    {"codes": torch.tensor([[1, 2]])}, {"timed": (torch.tensor([0.5]), torch.tensor([[1], [2]]))},
    {"timed": (None, torch.tensor([[1, 2]]))}, {"words": ["ab"]}, {"words": ["a", "c"]}, {"nested": [[1], [2, 3]]},
    {"array": np.arange(3.0)}, {"half": torch.zeros(2, dtype=torch.bfloat16)}, {"another": 1},
]  # fmt: skip


def test_a_digest_tells_samples_apart() -> None:
    digests = [sample_digest(SAMPLE | change) for change in [{}, *OTHERS]]
    assert len(set(digests)) == len(digests)
    assert UNKNOWN not in digests
    assert sample_digest(OrderedDict(reversed(SAMPLE.items()))) == digests[0]
    assert sample_digest({1: 2, "a": 3}) == UNKNOWN


def test_spot_checks_are_of_the_parts_that_are_done(monkeypatch) -> None:
    def part(start: int, stop: int) -> Any:
        return SimpleNamespace(start=start, stop=stop)

    parts = [part(40, 60), part(0, 10)]
    assert content.spot_checks([]) == []
    assert content.spot_checks(parts) == [*range(10), *range(40, 60)]
    monkeypatch.setattr(content, "SPOT_CHECKS", 12)
    drawn = [content.spot_checks(parts) for _ in range(200)]
    assert all(len(set(one)) == 12 and one == sorted(one) for one in drawn)
    assert {number for one in drawn for number in one} == {*range(10), *range(40, 60)}


class Replaced(Records):
    """Records of which all hold other values but those that are kept."""

    dataset_name = "Records"

    def __init__(self, count: int, kept: set[int]) -> None:
        super().__init__(count)
        self.kept = kept

    def __getitem__(self, number: int) -> dict[str, Any]:
        return super().__getitem__(number if number in self.kept else number + self.count)


def test_a_dataset_whose_other_samples_were_replaced_is_refused(tmp_path: Path) -> None:
    """1,136 of 1,200: all but the 64 that stand in the manifest."""
    attribute(tmp_path / "out", 1200, part_samples=400, batch_tokens=4000)
    known = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["identity"]["dataset"]["content"]
    replaced = Replaced(1200, {int(number) for number in known})
    assert sum(number not in replaced.kept for number in range(1200)) == 1136
    (tmp_path / "out" / "parts" / "part-00002.json").unlink()
    with pytest.raises(ValueError, match=r"dataset\.samples \d+, .* hold other values than when they were attributed"):
        attribute(tmp_path / "out", dataset=replaced, part_samples=400, batch_tokens=4000)
    assert not (tmp_path / "out" / "parts" / "part-00002.json").exists()
    assert attribute(tmp_path / "out", 1200, part_samples=400, batch_tokens=4000).done == 400


def test_a_part_done_again_must_be_of_the_same_samples(tmp_path: Path, monkeypatch) -> None:
    """One sample that no spot check looks at: it is seen as its part is done again."""
    from rollout.cohort.run import CohortRun
    from rollout.errors import CohortError

    monkeypatch.setattr(content, "SPOT_CHECKS", 0)
    out = tmp_path / "out"
    attribute(out, 300)
    (out / "attributions" / "part-00001.parquet").write_bytes(b"")
    kept = set(range(300)) - {26}
    with pytest.raises(CohortError, match=r"samples 26 hold other values than when part 1 was done first"):
        attribute(out, dataset=Replaced(300, kept))
    assert isinstance(attribute(out, 300), CohortRun)


def test_digests_cost_little_of_a_run(tmp_path: Path) -> None:
    """Against the same run: less than a thirtieth of it, in the thread that collates."""
    records = [Records(2000)[number] for number in range(2000)]
    begun = time.process_time()
    for record in records:
        sample_digest(record)
    spent = time.process_time() - begun
    begun = time.process_time()
    attribute(tmp_path / "out", 2000, part_samples=2000, batch_tokens=8192)
    whole = time.process_time() - begun
    print(f"digests {spent / 2000 * 1e6:.1f} µs a sample, {100 * spent / whole:.2f} % of the toy run")
    assert spent < 0.1 * whole


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1),
        (0.5, 0.5),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (None, None),
        ("text", "text"),
        ([1, "a"], '[1, "a"]'),
    ],
)
def test_short_settings_are_shown_as_they_are(value: object, expected: object) -> None:
    assert shown(value) == expected


def test_long_settings_are_shown_by_a_digest() -> None:
    for value in ("x" * 41, list(range(100)), "line\nbreak"):
        assert str(shown(value)).startswith("sha256:")
