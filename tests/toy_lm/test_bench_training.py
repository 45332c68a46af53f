"""`bench training`: both contestants in the tables, the loss that is raced for, and what is refused."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from toy_lm import config, data
from toy_lm.bench import training

# A stand-in for nanoGPT's model.py: what the bench calls of it, with a table of bigrams inside.
STAND_IN = """
import dataclasses, torch
from torch.nn import functional as F

@dataclasses.dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
    def forward(self, ids, targets):
        logits = self.table(ids)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(STAND_IN)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    full = config.preset("shakespeare-cpu")
    train = dataclasses.replace(full.train, batch_size=2, seqlen=16, num_steps=40, warmup_steps=4, nanogpt_loss=3.5)
    shape = dataclasses.replace(full.model, num_layers=1, model_dim=32, num_heads=2, num_kv_heads=2, head_dim=16)
    monkeypatch.setitem(config.PRESETS, "shakespeare-cpu", dataclasses.replace(full, model=shape, train=train))
    monkeypatch.setattr(training, "_matrix_product_flops", lambda device: 1e12)
    return ["--device", "cpu", "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]


def test_both_run_and_the_race_is_for_nanogpts_loss_unless_told(arguments, tmp_path, capsys):
    training.run([*arguments, "--nanogpt", str(tmp_path), "--seeds", "2"])
    out = capsys.readouterr().out
    names = re.findall(r"^\| (shakespeare-cpu, seed 0|nanoGPT) \|", out, re.MULTILINE)
    assert names == ["shakespeare-cpu, seed 0", "nanoGPT"]
    ours = re.findall(r"^shakespeare-cpu, seed [01] \(.*loss 3.5 after \d+\.\d\d s, step \d+; best", out, re.M)
    assert len(ours) == 2
    assert re.search(r"^nanoGPT \(\d+ parameters\): .*; 2000 steps in", out, re.MULTILINE)
    assert re.search(
        r"^loss 3.5, slowest of 2: \d+\.\d\d s; nanoGPT (there after|does not get there)", out, re.MULTILINE
    )
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert [row["name"] for row in written["steady"]] == names
    raced = [race["name"] for race in written["races"]]
    assert raced == ["shakespeare-cpu, seed 0", "shakespeare-cpu, seed 1", "nanoGPT"]
    best = [f"best {min(loss for _, _, loss in race['curve']):.4f} at" for race in written["races"]]
    assert all(words in out for words in best)
    assert (tmp_path / "out" / "training.png").stat().st_size > 1000 or "matplotlib is not installed" in out


def test_several_presets_race_and_the_first_is_timed(arguments, tmp_path, monkeypatch, capsys):
    first = config.preset("shakespeare-cpu")
    longer = dataclasses.replace(first, train=dataclasses.replace(first.train, num_steps=60))
    monkeypatch.setitem(config.PRESETS, "longer", longer)
    training.run([*arguments, "--preset", "shakespeare-cpu", "longer"])
    out = capsys.readouterr().out
    assert re.findall(r"^\| (\S+, seed 0) \|", out, re.MULTILINE) == ["shakespeare-cpu, seed 0"]
    assert re.findall(r"^(\S+), seed 0 \(.*; (\d+) steps in", out, re.M) == [
        ("shakespeare-cpu", "40"),
        ("longer", "60"),
    ]
    with pytest.raises(ValueError, match=r"preset: 'shakespeare' has context 256, 'shakespeare-cpu' has 16"):
        training.run([*arguments, "--preset", "shakespeare-cpu", "shakespeare"])


def test_the_loss_is_the_mean_over_the_whole_validation_text(arguments, capsys):
    training.run([*arguments, "--target", "0.001"])
    out = capsys.readouterr().out
    assert "loss 0.001 after not reached" in out
    best = float(re.search(r"best (\d\.\d{4}) at step", out)[1])
    chosen = config.preset("shakespeare-cpu")
    token_ids = np.frombuffer((b"the quick brown fox jumps over the lazy dog\n" * 100), dtype=np.uint8).astype(
        np.uint16
    )
    train_ids, validation_ids = data.split(token_ids, 0.1, 16)
    contestant = training._this_project("ours", chosen, data.Windows(train_ids, 16, "cpu"), torch.device("cpu"), seed=0)
    losses = []
    for step in range(40):
        contestant.step(step)
        windows = np.lib.stride_tricks.sliding_window_view(validation_ids, 17)[::16].astype(np.int64)
        with torch.no_grad():
            nats = contestant.losses(torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:]))
        losses.append(nats.mean().item())
    assert best == pytest.approx(min(losses[1:]), abs=2e-2)  # bf16 where the machine has it, in batches of other sizes


def test_what_it_cannot_do_is_refused_in_one_line(arguments, tmp_path):
    with pytest.raises(ValueError, match=r"nanogpt: there is no model.py in .*; name a clone of nanoGPT"):
        training.run([*arguments, "--nanogpt", str(tmp_path / "none")])
    with pytest.raises(
        ValueError, match=r"preset: got 'sample', for which nanoGPT's loss is not known; name a --target"
    ):
        training.run([*arguments, "--preset", "sample"])
