"""`toy-lm bench top-k` at sizes that take no time: every call is measured, reported and drawn."""

import json

import pytest
import torch

from toy_lm.bench import top_k


def test_every_call_is_measured_and_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(top_k, "CPU_SECONDS", 0.0)
    monkeypatch.setattr(top_k, "CPU_SIZES", ((3, 40, 7),))
    monkeypatch.setattr(top_k, "CPU_CURVE_SIZE", (2, max(top_k.CURVE)))
    lines: list[str] = []
    top_k.bench("cpu", tmp_path, log=lines.append)

    report = json.loads((tmp_path / "top_k.json").read_text(encoding="utf-8"))
    assert [row["dtype"] for row in report["seconds"]] == ["float32", "bfloat16"]
    for row in report["seconds"]:
        for name in top_k.calls(torch.zeros(3, 40), 7):
            assert row[name] > 0
            assert name == "max" or name in top_k.MARKS
            assert any(name in line for line in lines)
    assert set(report["curve"]) <= {*top_k.MARKS, "max"}
    assert all(list(times) == [str(k) for k in top_k.CURVE] for times in report["curve"].values())
    assert (tmp_path / "top_k.png").stat().st_size > 10_000
