"""The comparison: what it writes, and that memory and error are those of the call."""

import json

import pytest
import torch

from toy_lm import compare as module
from toy_lm.compare import Measured, Sizes, compare, compare_alone, peak_memory, plot


def test_writes_figures_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "CPU_SIZES", Sizes(seqlens=(16, 32), num_tokens=32, num_heads=2, head_dim=8, repetitions=1)
    )
    lines: list[str] = []
    compare(tmp_path, device="cpu", steps=4, log=lines.append)
    figures = json.loads((tmp_path / "compare.json").read_text())
    assert [(row["kind"], row["seqlen"]) for row in figures["alone"]] == [
        ("classic", 16),
        ("fused", 16),
        ("classic", 32),
        ("fused", 32),
    ]
    assert all(row["milliseconds"] > 0 for row in figures["alone"] + figures["inside"])
    classic, fused = figures["losses"]["classic"], figures["losses"]["fused"]
    assert [row[0] for row in classic] == [row[0] for row in fused] == [1, 2, 3, 4]
    assert all(abs(a[2] - b[2]) < 1e-3 for a, b in zip(classic, fused, strict=True))
    assert any("validation loss" in line for line in lines)
    if (tmp_path / "compare.png").exists():
        assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert "matplotlib is not installed" in lines[-1]


def test_error_is_relative_to_fp64(device: str):
    sizes = Sizes(seqlens=(33,), num_tokens=33, num_heads=2, head_dim=16, repetitions=1)
    for row in compare_alone(sizes, torch.device(device)):
        assert row.error is not None and 1e-9 < row.error < (1e-5 if device == "cpu" else 2e-2)


def test_peak_memory_counts_what_the_call_holds_at_once(device: str):
    def twice_32_mib() -> None:
        held = torch.ones(8 << 20, device=device)
        held + 1.0

    def once_32_mib() -> None:
        for _ in range(3):
            torch.ones(8 << 20, device=device)

    twice, once = (peak_memory(call, torch.device(device)) for call in (twice_32_mib, once_32_mib))
    if twice is None or once is None:
        pytest.skip("this system does not say how much memory a process held")
    assert twice == pytest.approx(64, abs=4)
    assert once == pytest.approx(32, abs=4)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        compare(tmp_path / "file" / "out", device="cpu", steps=0)
    with pytest.raises(ValueError, match=r"^steps: got -1"):
        compare(tmp_path, device="cpu", steps=-1)


def test_plot_without_memory(tmp_path):
    """Where memory cannot be measured, the picture still comes."""
    pytest.importorskip("matplotlib")
    rows = [Measured(kind=kind, seqlen=8, milliseconds=1.0, peak_mib=None) for kind in module.KINDS]
    plot(tmp_path / "compare.png", rows, {}, "nothing")
    assert (tmp_path / "compare.png").stat().st_size > 1000
