"""`toy-lm bench generate` on a small run folder: who is timed, what is written, what is refused."""

import json
import pathlib

import pytest

from toy_lm.bench import generate


def test_rows_and_losses(run_folder: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    options = ["--device", "cpu", "--run", run_folder, "--no-peers", "--num-tokens", "4", "--repetitions", "1"]
    generate.run([*options, "--batch-sizes", "1", "3", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "generate.json").read_text())["rows"]
    assert {(row["name"], row["dtype"], row["batch_size"]) for row in rows} == {
        (name, dtype, batch_size)
        for name in ("toy-lm", "toy-lm int8")
        for dtype in ("float32", "bfloat16")
        for batch_size in (1, 3)
    }
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["batch_size"] * 4 / row["seconds"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "nats/token" in line]
    for line in lines:
        exact, rounded = (float(number) for number in line.rpartition(": ")[2].split(", int8 "))
        assert 0 < abs(exact - rounded) < 0.05 * exact
    assert len(lines) == 2


def test_rows_are_written_as_they_come(run_folder: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    def time(contestants, batch_size: int, *_) -> dict[str, float]:
        if batch_size == 3:
            raise KeyboardInterrupt
        return dict.fromkeys(contestants, 1.0)

    monkeypatch.setattr(generate, "_time", time)
    options = ["--device", "cpu", "--run", run_folder, "--no-peers", "--num-tokens", "4", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        generate.run([*options, "--batch-sizes", "1", "3"])
    rows = json.loads((tmp_path / "generate.json").read_text())["rows"]
    assert [(row["name"], row["batch_size"]) for row in rows] == [("toy-lm", 1), ("toy-lm int8", 1)]


def test_texts_longer_than_the_context_are_refused(run_folder: str):
    with pytest.raises(ValueError, match=r"^num-tokens: got 24, needs 1 to 23"):
        generate.run(["--device", "cpu", "--run", run_folder, "--num-tokens", "24"])


@pytest.mark.parametrize("peer", ["nanogpt", "gpt-fast"])
def test_a_folder_without_the_peer_is_refused(run_folder: str, tmp_path: pathlib.Path, peer: str):
    with pytest.raises(ValueError, match=f"^{peer}: got .*, there is no model.py in it"):
        generate.run(["--device", "cpu", "--run", run_folder, "--num-tokens", "4", f"--{peer}", str(tmp_path)])
