"""`bench ladder` and `info --ptx`: every step and peer in the table, the JSON and the picture; the counts are right."""

import dataclasses
import json

import pytest
import torch

from toy_lm import cli, info
from toy_lm.bench import ladder as module
from toy_lm.bench.ladder import Ladder, Rung, bench, duration, plot, table


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.ATTENTION_SIZE, "cpu", (1, 2, 16, 16))
    monkeypatch.setitem(module.TOP_K_SIZES, "cpu", ((3, 700, 4), (5, 40, 7)))
    monkeypatch.setattr(module, "measure_ceilings", lambda device, milliseconds: {"matmul": 1e11, "memory": 1e10})


def test_every_step_and_peer_is_measured(tiny: None, tmp_path):
    lines: list[str] = []
    measured = bench("cpu", ["attention", "top-K"], milliseconds=1.0, out=tmp_path, log=lines.append)
    contents = json.loads((tmp_path / "ladder.json").read_text())
    assert [one["ladder"] for one in contents["ladders"]] == ["attention", "top-K", "top-K"]
    assert contents["ceilings"] == {"matmul": 1e11, "memory": 1e10}
    for ladder in measured:
        numbers = [rung.number for rung in ladder.rungs if rung.number is not None]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 4
        peers = [rung for rung in ladder.rungs if rung.number is None]
        assert peers and all(rung.seconds and rung.gain is None for rung in peers)
        before = None
        for rung in ladder.rungs[: len(numbers)]:
            assert (rung.seconds is None) == bool(rung.note)
            assert rung.gain == (before / rung.seconds if before and rung.seconds else None)
            before = rung.seconds or before
        printed = table(ladder)
        assert printed in "\n".join(lines)
        assert printed.count("\n| ") == len(ladder.rungs) + 2  # the names of the columns, and the line below them
    assert [rung.note for rung in measured[2].rungs if rung.note] == ["a row of fewer than K groups is not cut"]
    for name in ("attention", "top-k"):
        picture = tmp_path / f"ladder-{name}.png"
        if picture.exists():
            assert picture.read_bytes().startswith(b"\x89PNG")
        else:
            assert "matplotlib is not installed" in "\n".join(lines)


def test_figures_follow_from_the_time(tmp_path):
    rungs = [
        Rung(name="slow", number=1, seconds=4e-3, bytes_moved=8e6),
        Rung(name="fast", number=2, seconds=1e-3, bytes_moved=4e6, gain=4.0, predicted_gain=8.0, why="half the bytes"),
        Rung(name="elsewhere", number=3, seconds=None, note="needs another machine"),
        Rung(name="peer", number=None, seconds=2e-3),
    ]
    lines = table(Ladder(ladder="top-K", size="tiny", flops=0.0, floor=5e-4, rungs=rungs)).splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if "|" in line
    }
    assert cells["1. slow"] == ["4 ms", "2 GB/s", "8 MB", "-", "-", "12.5 %"]
    assert cells["2. fast"] == ["1 ms", "4 GB/s", "4 MB", "4.00x", "8x", "50.0 %"]
    assert cells["3. elsewhere"] == ["-"] * 6
    assert cells["peer"] == ["2 ms", "-", "-", "-", "-", "25.0 %"]
    assert lines[-2:] == ["2. predicted: half the bytes", "3. does not run: needs another machine"]
    rungs[0] = dataclasses.replace(rungs[0], flops=8e9)  # twice what the answer takes
    counted = table(Ladder(ladder="attention", size="tiny", flops=4e9, floor=5e-4, rungs=rungs)).splitlines()
    assert [cell.strip() for cell in counted[4].split("|")[1:6]] == ["1. slow", "4 ms", "1 TFLOP/s", "8 G", "8 MB"]
    assert "4 TFLOP/s" in counted[5]
    pytest.importorskip("matplotlib")
    plot(tmp_path / "ladder.png", [Ladder(ladder="top-K", size="tiny", flops=0.0, floor=5e-4, rungs=rungs)])
    assert (tmp_path / "ladder.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "seconds, expected", [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (7.1e-5, "71 us"), (4e-8, "0.04 us")]
)
def test_a_time_comes_in_the_unit_that_suits_it(seconds: float, expected: str):
    assert duration(seconds) == expected


def test_ceilings_are_measured(device: str):
    ceilings = module.measure_ceilings(torch.device(device), 20.0)
    assert set(ceilings) == {"matmul", "memory"}
    assert all(1e9 < value < 1e16 for value in ceilings.values())


PTX = """
\t@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
\tld.global.b64 \t%rd5, [%rd4];
\t{ ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [%rd1]; }
\tcp.async.cg.shared.global [%r1], [%rd1], 16;
\tcp.async.bulk.tensor.4d.shared::cluster.global.mbarrier [%r1];
\t@!%p3 bar.sync \t0;
\tfma.rn.f32 %f1, %f2, %f3, %f4;
\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 };
\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {};
\tredux.sync.max.u32 %r1, %r2, -1;
"""


def test_instructions_are_counted_by_what_they_stand_for():
    from kernels.steps.ahead import count

    assert count(PTX) == {
        "wgmma": 1,
        "mma.sync": 1,
        "cp.async.bulk.tensor": 1,
        "cp.async": 1,
        "fma": 1,
        "redux": 1,
        "bar.sync": 1,
        "ld.global 16 B": 1,
        "ld.global 8 B": 2,
    }


def test_info_says_what_it_cannot_compile_for(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    assert cli.main(["info", "--ptx", "--capability", "71"]) == 1
    assert "capability: got 71, needs one of 80, 89, 90, 100, 120" in capsys.readouterr().err
    monkeypatch.setattr(info, "_version", lambda package: "not installed")
    assert cli.main(["info", "--ptx"]) == 1
    assert "needs Triton" in capsys.readouterr().err


def test_info_says_what_is_made_for_another_card(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton", reason="Triton is made for Linux on x86-64 alone")
    from kernels import steps

    last = steps.attention_steps(torch.device("cuda"))[-1]
    monkeypatch.setattr(steps, "attention_steps", lambda device: [last])
    monkeypatch.setattr(steps, "top_k_steps", lambda device: [])
    assert list(info.describe_steps(80))[-1] == "  made for compute capability 9.0 alone"
