"""Workers in processes of their own: the same rows as one, also when one of them is killed on the way."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rollout.cohort import CohortError
from rollout.cohort.cluster import do_part
from rollout.cohort.plan import Plan
from rollout.cohort.source import open_source
from rollout.cohort.work import Work
from tests.support.toy_cohort import VOCABULARIES, Attention, Records, attribute, collate, contents, explain, rows

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("cohort") / "whole"
    attribute(out)
    return out


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two worker processes that are started again when they die."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None, memory_limit=0,
        local_directory=str(tmp_path_factory.mktemp("dask")), silence_logs=50,
    ) as running, distributed.Client(running) as client:  # fmt: skip
        yield client


def assert_equal_rows(out: Path, whole: Path) -> None:
    """The same entries; values to rounding, as a worker may have another number of threads."""
    one, other = contents(out), contents(whole)
    assert one.keys() == other.keys()
    left, right = one["attributions"], other["attributions"]
    assert left.drop("attribution").equals(right.drop("attribution"), null_equal=True)
    np.testing.assert_allclose(left["attribution"], right["attribution"], atol=1e-6)
    assert one["predictions"].drop("y_prob").equals(other["predictions"].drop("y_prob"), null_equal=True)


def slow(model, batch):
    """Slow enough for a worker to be killed at work."""
    time.sleep(0.05)
    return explain(model, batch)


def deadly(model, batch):
    """Kill the worker at one part's batch, whichever worker it is."""
    if int((batch["lengths"]["codes"] == 9).sum()) and float(batch["label"].sum()) >= 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return explain(model, batch)


def test_workers_of_this_machine(whole, tmp_path) -> None:
    out = tmp_path / "out"
    run = attribute(out, workers=2)
    assert (run.attributed, run.failed, run.parts) == (90, 0, 5)
    assert run.seconds["forward"] > 0
    assert run.peak_bytes > 50 * 2**20
    assert_equal_rows(out, whole)
    assert sorted(path.name for path in out.iterdir()) == [
        ".rollout.lock", "attributions", "manifest.json", "parts", "predictions",
    ]  # fmt: skip
    assert json.loads((out / "manifest.json").read_text())["sessions"][0]["workers"] == 2
    assert attribute(out).kept == 5


def test_a_cluster_there_is_already(whole, tmp_path, cluster) -> None:
    run = attribute(tmp_path / "out", client=cluster)
    assert (run.attributed, run.parts) == (90, 5)
    assert_equal_rows(tmp_path / "out", whole)


def test_failures_come_back_from_workers(tmp_path, cluster) -> None:
    spoiled = {5: "nan", 21: "unreadable", 46: "unknown code"}
    run = attribute(tmp_path / "out", client=cluster, dataset=Records(90, spoiled))
    assert run.failed == 3
    assert rows(tmp_path / "out", "failures")["sample"].to_list() == [5, 21, 46]


@pytest.mark.parametrize("victims", [1, 2])
def test_killed_workers_lose_nothing(whole, tmp_path, cluster, victims: int) -> None:
    """One worker killed at work; and all of them, with the only copies of the model."""
    out = tmp_path / "out"
    killed = []

    def kill() -> None:
        while not (out / "parts").is_dir() or len(list((out / "parts").glob("*.json"))) < 2:
            time.sleep(0.01)
        for pid in list(cluster.run(os.getpid).values())[:victims]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run = attribute(out, client=cluster, explain=slow, part_samples=10)
    killer.join()
    assert len(killed) == victims
    assert (run.attributed, run.failed, run.parts) == (90, 0, 9)
    assert_equal_rows(out, whole)


def test_a_part_that_kills_its_workers_is_named(tmp_path, cluster) -> None:
    with pytest.raises(CohortError, match="workers keep dying"):
        attribute(tmp_path / "out", client=cluster, explain=deadly)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["status"] == "running"


def test_what_dask_may_be_sending_on_is_not_run() -> None:
    """A model at work is patched: a copy of it taken then would run otherwise on the worker that gets it."""
    ran = []

    def noting(model, batch):
        ran.append(model)
        return explain(model, batch)

    source = open_source(Records(40), collate, VOCABULARIES)
    work = Work(Attention(), source, noting, Plan(part_samples=20))
    parts = [do_part(work, number, None, threads=None, gpu_by_name=False) for number in (0, 1)]
    assert [part.record["attributed"] for part in parts] == [20, 20]
    assert all(model is ran[0] and model is not work.model for model in ran)
    assert ran[0].head.weight.equal(work.model.head.weight)
