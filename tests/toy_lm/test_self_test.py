"""The self-test passes where everything is right, and fails where something is not."""

import pytest
import torch

from toy_lm import cli, self_test


def test_passes_and_says_so(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(self_test, "_DRAWS", 100_000)
    assert cli.main(["self-test", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(" on cpu: passed, " in line for line in lines) == 3


def test_a_wrong_kernel_is_found(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(self_test, "_DRAWS", 100_000)
    right = self_test.kernels.sample
    monkeypatch.setattr(
        self_test.kernels, "sample", lambda logits, **settings: right(logits, **{**settings, "temperature": 1.2})
    )
    wrong = {**self_test.ATTENTION, "fused": lambda q, k, v, causal: self_test.ATTENTION["classic"](q, k, v)}
    monkeypatch.setattr(self_test, "ATTENTION", wrong | {"classic": self_test.ATTENTION["classic"]})
    assert cli.main(["self-test", "--device", "cpu"]) == 1
    output = capsys.readouterr()
    assert output.err == "toy-lm: self-test: 2 of the checks failed\n"
    assert sum("FAILED" in line for line in output.out.splitlines()) == 2


def test_chi_square_tail():
    """2 degrees of freedom: exp(-x / 2)."""
    x = torch.tensor([0.1, 1.0, 5.0, 20.0])
    got = [self_test._chi_square_tail(value, 2) for value in x.tolist()]
    assert got == pytest.approx((-x / 2).exp().tolist(), rel=1e-4)
