"""Training learns, resumes to the bit, saves on Ctrl-C, stops where the loss is lost, refuses bad input in one line."""

import csv
import dataclasses
import json
import math
import os
import pathlib
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from corpus import SAMPLE
from toy_lm import checkpoint, data, report, step
from toy_lm import train as training
from toy_lm.config import ModelConfig, Preset, TrainConfig, preset
from toy_lm.model import AddNorm, Copies, Dropout, Transformer
from toy_lm.optimizer import Optimizer
from toy_lm.train import learning_rate, train

TINY = Preset(
    model=ModelConfig(
        vocab_size=300, model_dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=48, max_seqlen=16
    ),
    train=TrainConfig(
        batch_size=4,
        seqlen=16,
        num_steps=24,
        learning_rate=3e-3,
        min_learning_rate=3e-4,
        warmup_steps=4,
        tokenizer="bpe",
        vocab_size=300,
        eval_every=6,
        eval_batches=2,
        checkpoint_every=10,
    ),
)
ROOT = pathlib.Path(__file__).parents[2]
CORPUS = "grammar:20000"
# How far losses part that differ in the order of sums alone: AdamW's first steps are lr * sign(gradient), so that the
# rounding of a gradient near 0 moves its weight by the whole step, the other way.
ROUNDING = 1e-3


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """These models are too small to share out, and a machine that is busy otherwise would have to be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _tiny(**changes):
    return dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, **changes))


def _run(out, preset=TINY, corpus=CORPUS, **options):
    return train(corpus, preset, out, **{"device": "cpu", "precision": "fp32", "log": lambda line: None, **options})


def _weights(folder):
    return checkpoint.load(folder).weights


def _timeless(folder):
    """The rows of metrics.csv without the columns that tell the time."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def _assert_same_run(folder, other):
    weights, other_weights = _weights(folder), _weights(other)
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    state, info = checkpoint.load_training_state(checkpoint.load(folder))
    other_state, other_info = checkpoint.load_training_state(checkpoint.load(other))
    assert state.keys() == other_state.keys() and all(torch.equal(state[name], other_state[name]) for name in state)
    assert info["losses"] == other_info["losses"]
    assert _timeless(folder) == _timeless(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, _run(folder)


def test_the_loss_falls_and_the_folder_is_complete(whole):
    folder, result = whole
    rows = _timeless(folder)
    assert [int(row["step"]) for row in rows] == [6, 12, 18, 24]
    losses = [float(row["validation_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.3
    assert float(rows[-1]["perplexity"]) == pytest.approx(math.exp(losses[-1]))
    assert (result.step, result.num_steps, result.interrupted) == (24, 24, False)
    assert result.validation_loss == result.best_validation_loss == losses[-1]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.csv", "loss.png"} <= names
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not any(name.startswith(("_orig_mod", "module.")) for name in _weights(folder))


@pytest.mark.parametrize("stop", [1, 12, 13])
def test_stopped_and_resumed_is_the_same_to_the_bit(whole, tmp_path, stop):
    first = _run(tmp_path / "run", stop_after=stop)
    assert (first.step, first.interrupted) == (stop, True)
    torch.manual_seed(12345)  # what a new process would not have in common with the old one
    second = _run(tmp_path / "run", resume=True)
    assert (second.step, second.interrupted) == (24, False)
    _assert_same_run(tmp_path / "run", whole[0])


def test_every_device_learns_the_same_and_resumes(whole, tmp_path, device):
    """On a GPU in bf16, from a captured graph: the CPU's losses but for bf16's rounding."""
    precision = "fp32" if device == "cpu" else "bf16"
    _run(tmp_path / "run", device=device, precision=precision, stop_after=11)
    _run(tmp_path / "run", device=device, precision=precision, resume=True)
    for row, other in zip(_timeless(tmp_path / "run"), _timeless(whole[0]), strict=True):
        for name in ("train_loss", "validation_loss"):
            assert float(row[name]) == pytest.approx(float(other[name]), abs=0.0 if device == "cpu" else 0.02)


def test_bf16_learns_what_fp32_does_and_resumes_to_the_bit(whole, tmp_path):
    _run(tmp_path / "bf16", precision="bf16")
    for row, other in zip(_timeless(tmp_path / "bf16"), _timeless(whole[0]), strict=True):
        assert row["train_loss"] != other["train_loss"]
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), abs=0.02)
    _run(tmp_path / "run", precision="bf16", stop_after=13)
    _run(tmp_path / "run", precision="bf16", resume=True)
    _assert_same_run(tmp_path / "run", tmp_path / "bf16")
    assert {weight.dtype for weight in _weights(tmp_path / "bf16").values()} == {torch.float32}


def test_how_many_steps_are_laid_out_at_once_does_not_matter(whole, tmp_path, monkeypatch, device):
    monkeypatch.setattr(step, "TABLE", 5)
    _run(tmp_path / "run", device=device, precision="auto" if device == "cuda" else "fp32")
    for row, other in zip(_timeless(tmp_path / "run"), _timeless(whole[0]), strict=True):
        assert float(row["train_loss"]) == pytest.approx(
            float(other["train_loss"]), abs=0.0 if device == "cpu" else 0.02
        )


def test_rows_written_after_the_last_checkpoint_are_written_anew(whole, tmp_path, monkeypatch):
    def die(self):
        if self.step == 20:
            raise SystemExit  # as a kill at the second checkpoint would
        return save(self)

    save = training.Trainer.save
    monkeypatch.setattr(training.Trainer, "save", die)
    with pytest.raises(SystemExit):
        _run(tmp_path / "run")
    monkeypatch.undo()
    assert len(_timeless(tmp_path / "run")) == 3
    assert checkpoint.load(tmp_path / "run").step == 10
    _run(tmp_path / "run", resume=True)
    _assert_same_run(tmp_path / "run", whole[0])


def test_a_killed_run_resumes_as_if_it_had_not_been(whole, tmp_path):
    """kill -9 while it trains: what was saved loads, and the run ends as the whole one did, to the bit."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)

        def kill(line):
            if line.startswith("step 18"):
                os.kill(os.getpid(), signal.SIGKILL)

        _run(tmp_path / "run", log=kill)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert checkpoint.load(tmp_path / "run").step == 10
    _run(tmp_path / "run", resume=True)
    _assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.parametrize("size", [100, 20_000])
def test_a_full_disk_ends_in_one_line_and_what_was_saved_resumes(whole, tmp_path, size):
    """From the step after a checkpoint on no file can grow beyond `size`: not metrics.csv, or not the weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    train_step = step.TrainStep.__call__

    def fill_up(self, number):
        if number == 11:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        train_step(self, number)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step.TrainStep, "__call__", fill_up)
            with pytest.raises(OSError, match="File too large") as caught:
                _run(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert checkpoint.load(tmp_path / "run").step == 10
    _run(tmp_path / "run", resume=True)
    _assert_same_run(tmp_path / "run", whole[0])


def test_ctrl_c_saves_and_the_run_goes_on_from_there(whole, tmp_path):
    def interrupt(line):
        if line.startswith("step 12"):
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    result = _run(tmp_path / "run", log=interrupt)
    assert result.interrupted and 12 <= result.step <= 13
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint.load(tmp_path / "run").step == result.step
    _run(tmp_path / "run", resume=True)
    _assert_same_run(tmp_path / "run", whole[0])


def test_a_resumed_run_keeps_its_own_preset(tmp_path):
    _run(tmp_path / "run", _tiny(seed=7), stop_after=3, steps=5)
    result = _run(tmp_path / "run", preset("shakespeare"), resume=True)
    assert (result.step, result.num_steps) == (5, 5)
    _run(tmp_path / "other", _tiny(seed=7), steps=5)
    _assert_same_run(tmp_path / "run", tmp_path / "other")


def test_another_seed_is_another_run(whole, tmp_path):
    _run(tmp_path / "run", seed=1)
    assert _timeless(tmp_path / "run")[0]["train_loss"] != _timeless(whole[0])[0]["train_loss"]


def test_classic_and_fused_attention_learn_alike(whole, tmp_path):
    _run(tmp_path / "run", attention="classic")
    for row, other in zip(_timeless(tmp_path / "run"), _timeless(whole[0]), strict=True):
        for name in ("train_loss", "validation_loss"):
            assert float(row[name]) == pytest.approx(float(other[name]), rel=ROUNDING)


def test_parts_of_a_batch_add_up_to_the_whole(whole, tmp_path):
    _run(tmp_path / "run", _tiny(grad_accumulation=2))
    for row, other in zip(_timeless(tmp_path / "run"), _timeless(whole[0]), strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=ROUNDING)
    with pytest.raises(ValueError, match="grad_accumulation: got 3, needs a divisor of batch_size = 4"):
        _tiny(grad_accumulation=3)


def test_documents_are_learnt_each_by_itself(tmp_path, device):
    """The losses of a run on packed documents are those of its documents, worked out one by one in fp64."""
    precision = "fp32" if device == "cpu" else "bf16"
    config = _tiny(num_steps=6, eval_batches=1000)
    result = _run(tmp_path / "run", config, documents="\n", device=device, precision=precision)
    loaded = checkpoint.load(tmp_path / "run")
    model = loaded.model(attention="classic").double()
    text = "".join(data.open_corpus(CORPUS).parts())
    documents = [loaded.tokenizer.encode(line + "\n") for line in text.split("\n") if line]
    owner = [number for number, document in enumerate(documents) for _ in document]
    token_ids = [token_id for document in documents for token_id in document]
    num_train = len(data.split(np.array(token_ids), 0.1, 16)[0])
    nats, count = 0.0, 0
    for start in range(num_train, len(token_ids) - 16, 16):
        for document in dict.fromkeys(owner[start : start + 16]):
            inside = [i for i in range(start, start + 16) if owner[i] == document]
            with torch.no_grad():
                logits = model(torch.tensor([[token_ids[i] for i in inside]]))[0]
            nats += F.cross_entropy(logits, torch.tensor([token_ids[i + 1] for i in inside]), reduction="sum").item()
            count += len(inside)
    tolerance = 1e-5 if device == "cpu" else 2e-3
    assert result.validation_loss == pytest.approx(nats / count, rel=tolerance)
    if device == "cpu":
        _run(
            tmp_path / "parts",
            dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accumulation=2)),
            documents="\n",
            stop_after=4,
        )
        again = _run(tmp_path / "parts", resume=True)
        assert again.validation_loss == pytest.approx(result.validation_loss, rel=ROUNDING)


def test_layers_that_are_computed_again_learn_the_same_to_the_bit(tmp_path):
    _run(tmp_path / "kept", _tiny(dropout=0.2), steps=8)
    _run(tmp_path / "run", _tiny(dropout=0.2), steps=8, recompute=True)
    _assert_same_run(tmp_path / "run", tmp_path / "kept")
    model = checkpoint.load(tmp_path / "run").model().train()
    kept = []
    for recompute in (False, True):
        saved = 0

        def count(x):
            nonlocal saved
            saved += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            model.hidden(torch.zeros(4, 16, dtype=torch.int64), recompute=recompute)
        kept.append(saved)
    assert kept[1] < kept[0] / 4


def test_rows_are_written_for_tensorboard_or_one_line_says_why_not(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = _run(tmp_path / "run", steps=12, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = events.Scalars("validation_loss")
    assert [event.step for event in losses] == [6, 12]
    assert losses[-1].value == pytest.approx(result.validation_loss)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard: it is not installed; pip install tensorboard"):
        _run(tmp_path / "other", tensorboard=True)


def test_the_picture_shows_the_limit_and_the_peer(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines = []
    axhline = Axes.axhline
    monkeypatch.setattr(Axes, "axhline", lambda *a, label, **k: (lines.append(label), axhline(*a, label=label, **k))[1])
    monkeypatch.setattr(data, "TINY_SHAKESPEARE", data.open_corpus(CORPUS).fingerprint)
    _run(tmp_path / "run", _tiny(nanogpt_loss=1.5), steps=6)
    assert [line.partition(",")[0] for line in lines] == ["the text's entropy", "nanoGPT's best"]
    monkeypatch.undo()
    _run(tmp_path / "other", _tiny(nanogpt_loss=1.5), steps=6)  # another text
    assert len(lines) == 2


def test_a_profile_is_a_trace_of_some_steps(tmp_path):
    _run(tmp_path / "run", _tiny(num_steps=30), profile=True)
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    updates = sum(event.get("name") == "aten::_fused_adamw_" for event in events)
    assert updates == 5 * 2  # of what decays and of what does not


def test_nothing_of_torch_compile_is_imported(tmp_path, device):
    """It takes seconds, and has nothing to do here."""
    arguments = ["train", "--corpus", CORPUS, "--steps", "6", "--device", device, "--out", str(tmp_path / "run")]
    code = f"import sys; from toy_lm import cli; cli.main({arguments}); sys.exit('torch._dynamo' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_run_with_dropout_resumes_to_the_bit(whole, tmp_path):
    _run(tmp_path / "whole", _tiny(dropout=0.2), steps=8)
    _run(tmp_path / "run", _tiny(dropout=0.2), steps=8, stop_after=5)
    torch.manual_seed(12345)
    _run(tmp_path / "run", resume=True)
    _assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert _timeless(tmp_path / "run")[0]["train_loss"] != _timeless(whole[0])[0]["train_loss"]
    with pytest.raises(ValueError, match=r"dropout: got 1.0, needs 0 or more, and less than 1"):
        _tiny(dropout=1.0)


def test_a_muon_run_resumes_to_the_bit(tmp_path):
    _run(tmp_path / "whole", _tiny(optimizer="muon"), steps=8)
    _run(tmp_path / "run", _tiny(optimizer="muon"), steps=8, stop_after=5)
    _run(tmp_path / "run", resume=True)
    _assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_one_step_is_adamw_on_the_mean_cross_entropy(tmp_path):
    """The first step's weights, worked out again in fp64 from the formulas."""
    config = _tiny(num_steps=1, warmup_steps=0, grad_clip=0.5, weight_decay=0.2)
    _run(tmp_path / "start", config, stop_after=0)
    _run(tmp_path / "run", config)
    start = checkpoint.load(tmp_path / "start")
    model = start.model(attention="classic").double()
    corpus = data.open_corpus(CORPUS)
    token_ids, _ = data.split(data.tokenize(corpus, start.tokenizer, tmp_path), 0.1, 16)
    windows = data.Windows(token_ids, 16, "cpu")
    inputs, targets = windows.at(windows.random_starts(4, 0, 0))
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
    assert norm > 0.5
    for name, weight in _weights(tmp_path / "run").items():
        parameter = model.get_parameter(name)
        gradient = parameter.grad * (0.5 / norm)
        decayed = parameter * (1 - 3e-3 * 0.2) if parameter.dim() >= 2 else parameter
        # After one step both moments are the gradient's, so that AdamW moves by lr * g / (|g| + 1e-8).
        expected = decayed - 3e-3 * gradient / (gradient.abs() + 1e-8)
        clear = gradient.abs() > 1e-5  # where rounding cannot turn the sign
        torch.testing.assert_close(weight[clear], expected[clear].float(), atol=2e-5, rtol=1e-4)
    row = report.read_metrics(tmp_path / "run" / "metrics.csv")[0]
    assert row.train_loss == pytest.approx(loss.item(), rel=1e-5)


def test_the_validation_loss_is_the_mean_over_the_counted_tokens(tmp_path):
    config = _tiny(num_steps=6, eval_batches=1000, eval_context=5)
    result = _run(tmp_path / "run", config)
    loaded = checkpoint.load(tmp_path / "run")
    model, tokenizer = loaded.model(attention="classic").double(), loaded.tokenizer
    token_ids = data.tokenize(data.open_corpus(CORPUS), tokenizer, tmp_path)
    _, validation = data.split(token_ids, 0.1, 16)
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for start in range(0, len(validation) - 16, 11):
        window = torch.tensor(validation[start : start + 17].astype("int64"))
        with torch.no_grad():
            logprobs = model(window[None, :-1])[0].log_softmax(-1)
        for position in range(5, 16):
            target = window[position + 1].item()
            nats -= logprobs[position, target].item()
            num_tokens += 1
            num_bytes += len(tokenizer.token_bytes(target))
    assert result.validation_loss == pytest.approx(nats / num_tokens, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)


def test_learning_rate_warms_up_and_falls_by_a_cosine():
    config = _tiny(num_steps=104, warmup_steps=4, learning_rate=1.0, min_learning_rate=0.2).train
    rates = [learning_rate(step, config) for step in range(105)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[54] == pytest.approx(0.6)  # half way between the two
    assert rates[104] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_a_loss_that_is_not_finite_stops_and_names_the_step_and_the_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "learning_rate", lambda step, config: 1e-3 if step < 14 else 1e36)
    with pytest.raises(FloatingPointError, match=r"^step 1[67]: the loss is .*the checkpoint of step 10 in .* is good"):
        _run(tmp_path / "run")
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "run").step == 10
    assert all(weight.isfinite().all() for weight in _weights(tmp_path / "run").values())
    assert _run(tmp_path / "run", resume=True).step == 24


def test_the_sample_preset_comes_near_the_entropy_of_its_text(tmp_path):
    lines = []
    result = _run(tmp_path / "run", preset("sample"), "sample", steps=250, log=lines.append)
    assert result.entropy_bits_per_byte == SAMPLE.entropy().bits_per_byte
    # Below the limit by chance only: the validation text is finite.
    assert 0.97 < result.bits_per_byte / result.entropy_bits_per_byte < 1.05
    assert any("limit: the text's exact entropy, 0.0813 bits per byte" in line for line in lines)
    assert any(line.startswith("step 250: train ") and "(limit 0.0813)" in line for line in lines)


def test_bad_input_is_refused_in_one_line_and_nothing_is_damaged(whole, tmp_path):
    folder, _ = whole
    before = (folder / "model.safetensors").read_bytes()
    (tmp_path / "short.txt").write_text("the quick brown foxes")
    (tmp_path / "words.txt").write_text("the quick brown foxes\n" * 4)
    cases = [
        ({"out": folder}, "out: .* already holds a run; resume it, or name another folder"),
        ({"out": folder, "corpus": "sample:3000", "resume": True}, "corpus: 'sample:3000' is not the text"),
        ({"out": tmp_path / "new", "resume": True}, "there is no such run folder"),
        ({"out": tmp_path / "new", "corpus": str(tmp_path / "none.txt")}, "there is no such file"),
        (
            {"out": tmp_path / "new", "corpus": str(tmp_path / "short.txt")},
            "has 21 bytes; a context of 16 tokens needs 34",
        ),
        (
            {"out": tmp_path / "new", "corpus": str(tmp_path / "words.txt")},
            "it has 20 tokens, but a context of 16 needs",
        ),
        ({"out": tmp_path / "new", "attention": "fast"}, "attention: got 'fast', allowed are 'fused', 'classic'"),
        ({"out": tmp_path / "new", "device": "tpu"}, "device: got 'tpu', allowed are 'auto', 'cpu' and 'cuda'"),
        ({"out": tmp_path / "new", "precision": "fp8"}, "precision: got 'fp8', allowed are 'auto', 'fp32' and 'bf16'"),
        ({"out": tmp_path / "new", "steps": 0}, "num_steps: got 0, needs 1 or more"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            train(**{"corpus": CORPUS, "preset": TINY, "device": "cpu", "log": print, **options})
        assert "\n" not in str(caught.value)
        assert not checkpoint.exists(tmp_path / "new")
    assert (folder / "model.safetensors").read_bytes() == before
    with pytest.raises(OSError, match="Not a directory"):
        _run(tmp_path / "short.txt" / "run")


def test_metrics_come_back_as_they_were_written(tmp_path):
    rows = [
        report.Metrics(
            step=step,
            train_loss=1 / 3,
            validation_loss=0.1 + 0.2,
            perplexity=math.e,
            bits_per_byte=1e-17,
            learning_rate=3e-4,
            tokens_per_second=12.5,
            seconds=0.1,
        )
        for step in (5, 10)
    ]
    path = tmp_path / "metrics.csv"
    assert report.read_metrics(path) == []
    report.write_metrics(path, rows)
    assert report.read_metrics(path) == rows
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"not a metrics.csv"):
        report.read_metrics(path)


def test_without_matplotlib_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = report.plot_losses(pathlib.Path("loss.png"), [], limit=None, title="")
    assert line == "no loss.png: matplotlib is not installed (pip install matplotlib)"


def test_dropout_leaves_out_its_share_and_keeps_the_mean(device):
    dropout = Dropout(0.2).train()
    keys = dropout(3, torch.device(device))
    x = torch.full((16, 128, 99), 3.0, device=device, requires_grad=True)
    add_norm = AddNorm(dataclasses.replace(TINY.model, model_dim=99), dropout).to(device)
    out, _ = add_norm(torch.zeros_like(x), x, keys[0])
    out.sum().backward()
    kept = out != 0
    share, num_entries = 51 / 256, x.numel()
    deviation = (share * (1 - share) / num_entries) ** 0.5
    assert abs((~kept).double().mean().item() - share) < 4 * deviation
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 3 / (1 - share)))
    assert torch.equal(x.grad, out.detach() / 3)
    assert torch.equal(add_norm(torch.zeros_like(x), x, None)[0], x)
    assert dropout.eval()(8, torch.device(device)) is None
    assert Dropout(0.0).train()(8, torch.device(device)) is None
    # Neighbours in a row, in a column, and of another key are left out independently of each other.
    other = add_norm(torch.zeros_like(x), x, keys[1])[0] != 0
    near = [kept.roll((i, j), (1, 2)) for i in range(3) for j in range(6) if i or j]
    for second in (other, *near):
        assert abs((~kept & ~second).double().mean().item() - share**2) < 5 * deviation


def test_copies_are_rounded_weights_and_hand_their_gradients_on(device):
    weights = [torch.randn(shape, device=device, requires_grad=True) for shape in ((3, 4), (2, 4), (5, 6))]
    copies = Copies.apply(torch.bfloat16, (2, 1), *weights)
    plain = (torch.cat(weights[:2]).bfloat16(), weights[2].bfloat16())
    assert all(torch.equal(x, y) for x, y in zip(copies, plain, strict=True))
    found, expected = (torch.autograd.grad(sum(x.sin().sum() for x in xs), weights) for xs in (copies, plain))
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_a_small_vocabulary_is_looked_up_by_a_product(monkeypatch):
    model = Transformer(TINY.model).to("cuda").train()
    token_ids = torch.randint(300, (4, 16), device="cuda")
    found = []
    for largest in (1024, 0):
        monkeypatch.setattr("toy_lm.model._SMALL_VOCABULARY", largest)
        embedded = model._embedded(token_ids)
        (gradient,) = torch.autograd.grad(embedded.sin().sum(), model.model.embed_tokens.weight)
        found.append((embedded, gradient))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


def test_the_share_of_noise_among_the_inputs_is_replaced_and_the_targets_are_not(device, monkeypatch):
    config = dataclasses.replace(TINY.train, batch_size=256, token_noise=0.25)
    windows = data.Windows(np.full(4096, 7), config.seqlen, torch.device(device))
    model = Transformer(TINY.model).to(device)
    seen = []
    monkeypatch.setattr(model, "hidden", lambda ids, **k: (seen.append(ids), model.model.embed_tokens(ids))[1])
    monkeypatch.setattr(model, "losses", lambda hidden, ids: (seen.append(ids), hidden.sum((1, 2)))[1])
    optimizer = Optimizer(model, config, torch.device(device))
    train_step = step.TrainStep(
        model, optimizer, windows, config, lambda i: 0.0, device=torch.device(device), autocast=None
    )
    train_step(0)
    inputs, targets = (ids.cpu() for ids in seen)
    assert (targets == 7).all() and inputs.min() >= 0 and inputs.max() < TINY.model.vocab_size
    share = 0.25 * (1 - 1 / TINY.model.vocab_size)
    assert abs((inputs != 7).float().mean().item() - share) < 4 * (share * (1 - share) / inputs.numel()) ** 0.5
    assert inputs.unique().numel() > TINY.model.vocab_size / 2
