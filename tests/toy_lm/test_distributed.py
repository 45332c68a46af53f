"""Several workers learn what one does: whole models or slices, also through a resume by another number of them."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from tests.toy_lm.test_train import ROUNDING, _run, _timeless, _tiny, _weights
from toy_lm import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
WORKER = """
import dataclasses, os, sys, torch
from tests.toy_lm import test_train
from toy_lm import train as training
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, folder = int(os.environ["RANK"]), sys.argv[1]
def run(name, config=test_train.TINY, **options):
    options = {"device": "cpu", "precision": "fp32", "log": lambda line: None, **options}
    training.train(test_train.CORPUS, config, f"{folder}/{name}", **options)
"""


def _two_workers(folder, runs):
    script = folder / "worker.py"
    script.write_text(WORKER + runs)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, timeout=150, capture_output=True, text=True)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """Every run that two workers do here, in one start of torchrun: a start takes longer than the runs."""
    folder = tmp_path_factory.mktemp("two")
    result = _two_workers(
        folder,
        "run('copies', stop_after=18)\n"
        "run('slices', shard=True, stop_after=18)\n"
        "muon = test_train._tiny(optimizer='muon', grad_accumulation=2)\n"
        "run('muon', muon, shard=True, recompute=True, stop_after=8)\n"
        "run('muon', resume=True, shard=True)\n"
        "def die(self, step, call=training.TrainStep.__call__):\n"
        "    if step == 14 and rank == 1:\n"
        "        os._exit(3)\n"
        "    call(self, step)\n"
        "training.TrainStep.__call__ = die\n"
        "run('dead')\n",
    )
    return folder, result


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same runs, done by one process."""
    folder = tmp_path_factory.mktemp("one")
    _run(folder / "adamw")
    _run(folder / "muon", _tiny(optimizer="muon"))
    return folder


def _assert_same_curve(folder, other):
    rows, other_rows = _timeless(folder), _timeless(other)
    assert len(rows) == len(other_rows) == 4
    for row, other_row in zip(rows, other_rows, strict=True):
        for name in row:
            assert float(row[name]) == pytest.approx(float(other_row[name]), rel=ROUNDING)
    weights, other_weights = _weights(folder), _weights(other)
    assert weights.keys() == other_weights.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], other_weights[name], atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["copies", "slices"])
def test_two_workers_learn_what_one_does_and_one_resumes_it(by_two, whole, name):
    folder, _ = by_two
    assert checkpoint.load(folder / name).step == 18
    assert _run(folder / name, resume=True).step == 24
    _assert_same_curve(folder / name, whole / "adamw")


def test_slices_of_muon_with_parts_and_recomputed_layers(by_two, whole):
    _assert_same_curve(by_two[0] / "muon", whole / "muon")


def test_a_worker_that_dies_ends_the_run_and_leaves_the_last_checkpoint(by_two, whole):
    folder, result = by_two
    assert result.returncode != 0 and "exitcode  : 3" in result.stderr
    assert checkpoint.load(folder / "dead").step == 10
    _run(folder / "dead", resume=True)
    _assert_same_curve(folder / "dead", whole / "adamw")
