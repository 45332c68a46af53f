"""A run folder is a Hugging Face model folder; whatever ends a save, a whole checkpoint is left; others are refused."""

import json
import os
import pickle
import resource
import shutil
import signal

import pytest
import safetensors.torch
import torch
import transformers

from toy_lm import checkpoint
from toy_lm.config import ModelConfig
from toy_lm.model import Transformer
from toy_lm.tokenizer import Tokenizer

CONFIG = ModelConfig(
    vocab_size=256,
    model_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=80,
    max_seqlen=40,
    rope_theta=5000.0,
    norm_eps=1e-5,
)


def _save(folder, step, **weights_and_state):
    weights = {"weight": torch.full((1000,), float(step))}
    checkpoint.save(folder, step=step, weights=weights, state={"moment": weights["weight"] * 2}, info={"rows": [step]})


def _step_of(folder):
    """The step of the checkpoint in `folder`, once everything in it was seen to belong to that step."""
    loaded = checkpoint.load(folder)
    state, info = checkpoint.load_training_state(loaded)
    assert torch.equal(loaded.weights["weight"], torch.full((1000,), float(loaded.step)))
    assert torch.equal(state["moment"], torch.full((1000,), 2.0 * loaded.step))
    assert info == {"rows": [loaded.step]}
    return loaded.step


@pytest.fixture
def folder(tmp_path):
    checkpoint.begin(tmp_path / "run", CONFIG, Tokenizer.bytes_tokenizer())
    return tmp_path / "run"


@pytest.fixture
def model_folder(folder):
    model = Transformer(CONFIG, "classic")
    with torch.no_grad():
        for parameter in model.parameters():  # also the norms' scales, so that none is 1
            parameter.add_(torch.randn_like(parameter) * 0.05)
    checkpoint.save(folder, step=3, weights=model.state_dict(), state={}, info={})
    return folder, model.eval()


def test_transformers_computes_the_same_logits(model_folder):
    folder, model = model_folder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(theirs, transformers.Qwen3ForCausalLM)
    token_ids = torch.randint(0, CONFIG.vocab_size, (3, CONFIG.max_seqlen))
    with torch.no_grad():
        torch.testing.assert_close(theirs(token_ids).logits, model(token_ids), atol=1e-4, rtol=0)


def test_a_loaded_model_is_the_saved_one(model_folder):
    folder, model = model_folder
    loaded = checkpoint.load(folder)
    assert (loaded.config, loaded.step) == (CONFIG, 3)
    assert loaded.tokenizer.is_bytes
    token_ids = torch.randint(0, CONFIG.vocab_size, (1, 17))
    again = loaded.model(attention="classic")
    assert not again.training
    assert torch.equal(again(token_ids), model(token_ids))


def test_a_folder_saved_by_transformers_loads(model_folder, tmp_path):
    folder, model = model_folder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    token_ids = torch.randint(0, CONFIG.vocab_size, (1, 17))
    assert torch.equal(checkpoint.load(tmp_path / "theirs").model(attention="classic")(token_ids), model(token_ids))


def test_a_save_takes_the_place_of_the_one_before(folder):
    assert not checkpoint.exists(folder)
    _save(folder, 1)
    before = sorted(path.name for path in folder.iterdir())
    _save(folder, 2)
    assert _step_of(folder) == 2
    after = [name.replace("00000001", "00000002") for name in before]
    assert sorted(path.name for path in folder.iterdir()) == after  # nothing is left of the first
    _save(folder, 2)
    assert _step_of(folder) == 2


def _killed_while_saving(folder, step, module, name, call):
    """Save in a process that is killed at the `call`-th call of module.name; True if it came to that."""
    child = os.fork()
    if child == 0:
        original, calls = getattr(module, name), 0

        def kill_at_call(*args, **keywords):
            nonlocal calls
            calls += 1
            if calls == call:
                if module is safetensors.torch:  # in the middle of a file
                    args[1].write_bytes(safetensors.torch.save(args[0])[:-999])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **keywords)

        setattr(module, name, kill_at_call)
        _save(folder, step)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("module", "name"), [(safetensors.torch, "save_file"), (os, "fsync"), (os, "replace"), (os, "close")]
)
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(folder, module, name):
    _save(folder, 1)
    step, call, seen = 1, 1, set()
    while _killed_while_saving(folder, 10 * call, module, name, call):
        now = _step_of(folder)
        assert now in (step, 10 * call)
        seen.add("new" if now == 10 * call else "old")
        step, call = now, call + 1
    assert call > 2 and "old" in seen
    assert _step_of(folder) == 10 * call  # the save that was let be
    assert len(list(folder.glob("training-*"))) == 1 and list(folder.glob(".*unfinished")) == []


def test_a_full_disk_leaves_the_checkpoint_before(folder):
    _save(folder, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=r"could not be written: .*; what was saved before is intact") as caught:
            _save(folder, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert _step_of(folder) == 1
    assert list(folder.glob(".*")) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not be written: Not a directory"):
        checkpoint.begin(tmp_path / "file" / "run", CONFIG, Tokenizer.bytes_tokenizer())


def test_truncated_files_are_refused(model_folder):
    folder, _ = model_folder
    for name in ("model.safetensors", "training-00000003.safetensors"):
        whole = (folder / name).read_bytes()
        for size in (0, 7, len(whole) // 2, len(whole) - 1):
            (folder / name).write_bytes(whole[:size])
            with pytest.raises(ValueError, match=f"{name}: not a whole safetensors file") as caught:
                checkpoint.load_training_state(checkpoint.load(folder))
            assert "\n" not in str(caught.value)
        (folder / name).write_bytes(whole)


def test_a_pickle_is_never_read(model_folder, tmp_path):
    folder, _ = model_folder

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    payload = pickle.dumps(Payload())
    (folder / "model.safetensors").write_bytes(payload)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        checkpoint.load(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(ValueError, match=r"pytorch_model.bin may be a pickle, which is never read"):
        checkpoint.load(folder)
    assert not (tmp_path / "executed").exists()


def test_foreign_folders_are_refused(model_folder, tmp_path):
    folder, _ = model_folder
    with pytest.raises(ValueError, match="there is no such run folder"):
        checkpoint.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"there is no model.safetensors"):
        checkpoint.load(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    changes = {
        "model_type": "llama",
        "hidden_act": "gelu",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "use_sliding_window": True,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0},
        "num_attention_heads": "4",
        "num_key_value_heads": 3,
        "vocab_size": 100,
    }
    for name, value in changes.items():
        (folder / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(ValueError) as caught:
            checkpoint.load(folder)
        assert "\n" not in str(caught.value)
    for text in ("", "[]", "{", json.dumps({name: value for name, value in config.items() if name != "head_dim"})):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json"):
            checkpoint.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json: cannot be read: No such file"):
        checkpoint.load(folder)


def test_weights_that_do_not_fit_the_config_are_refused(model_folder):
    folder, model = model_folder
    weights = model.state_dict()
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        for changed in ({k: v for k, v in weights.items() if k != name}, {**weights, name: weights[name][:-1]}):
            checkpoint.save(folder, step=4, weights=changed, state={}, info={})
            with pytest.raises(ValueError, match=f"does not fit config.json, for one in {name}"):
                checkpoint.load(folder).model()


def test_weights_without_training_state_cannot_be_resumed(model_folder, tmp_path):
    folder, _ = model_folder
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("training-*"))
    with pytest.raises(ValueError, match="so that this run cannot be resumed"):
        checkpoint.load_training_state(checkpoint.load(tmp_path / "copy"))
