"""The bench of growing contexts prints a row for each, also where one of the two does not fit in memory."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from toy_lm.bench import contexts

SMALL = ["--preset", "sample", "--tokens", "64", "--steps", "1", "--device", "cpu"]


def test_every_context_gets_a_row(capsys):
    contexts.run([*SMALL, "--contexts", "16", "64"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| 16", "| 64"))]
    assert len(rows) == 2
    for row in rows:
        classic, fused = (float(cell.replace(",", "")) for cell in row[1:3])
        assert float(row[3].rstrip("x")) == pytest.approx(fused / classic, abs=0.1)


def test_what_does_not_fit_is_said_to_be_so(capsys, monkeypatch):
    class Full(contexts.TrainStep):
        def __call__(self, step):
            if self.model.model.layers[0].self_attn.attention is contexts.kernels.classic_attention:
                raise torch.OutOfMemoryError
            super().__call__(step)

    monkeypatch.setattr(contexts, "TrainStep", Full)
    contexts.run([*SMALL, "--contexts", "32"])
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[1] == "out of memory" and float(row[2].replace(",", "")) > 0 and row[3] == "-"


def test_processes_under_torchrun_share_the_tokens_and_speak_once():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "toy_lm.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = pathlib.Path(__file__).parents[2]
    command += ["bench", "contexts", *SMALL, "--contexts", "16"]
    result = subprocess.run(command, env=environment, cwd=root, timeout=150, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "64 tokens a step, 2 processes" in result.stdout
    assert sum(line.startswith("| 16 | ") for line in result.stdout.splitlines()) == 1


def test_a_context_that_does_not_divide_the_tokens_is_refused():
    with pytest.raises(ValueError, match="contexts: got 48, needs divisors of tokens = 64"):
        contexts.run([*SMALL, "--contexts", "16", "48"])
