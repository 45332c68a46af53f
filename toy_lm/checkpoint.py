"""A run folder: a Hugging Face model folder with the state of its training beside it. No file is a pickle.

    config.json  tokenizer.json  tokenizer_config.json   written once, when the run begins
    model.safetensors                                    the weights; its metadata names the step
    training-STEP.safetensors                            what else a resume needs at that step: tensors, and a JSON text

A save writes each file under another name, waits until it is on the disk, and moves it into place. The training state
goes first, under a name of its own; moving model.safetensors then is the one moment at which the new checkpoint takes
the old one's place, since the step in the weights' metadata says which training state belongs to them. A process killed
at any moment leaves the old pair or the new one.

Knows the model's config and names; knows nothing of how a model is trained.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from toy_lm.config import ModelConfig
from toy_lm.model import Transformer
from toy_lm.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `load` found: enough to generate with."""

    folder: pathlib.Path
    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    step: int

    def model(
        self, *, attention: str = "fused", device: torch.device | str = "cpu", dropout: float = 0.0
    ) -> Transformer:
        """The model with these weights, in evaluation mode."""
        model = Transformer(self.config, attention, dropout)
        shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        if shapes != {name: weight.shape for name, weight in self.weights.items()}:
            differing = sorted(
                name
                for name in shapes.keys() | self.weights.keys()
                if name not in self.weights or self.weights[name].shape != shapes.get(name)
            )
            raise ValueError(f"{self.folder / WEIGHTS}: does not fit {CONFIG}, for one in {differing[0]}")
        model.load_state_dict(self.weights)
        return model.to(device).eval()


def exists(folder: str | pathlib.Path) -> bool:
    """Whether `folder` holds a checkpoint, whole or not."""
    return (pathlib.Path(folder) / WEIGHTS).exists()


def begin(folder: str | pathlib.Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Make the folder and write what stays the same throughout a run.

    Raises OSError, in one line, if the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files = {CONFIG: json.dumps(_to_hugging_face(config), indent=2), **tokenizer.files(config.max_seqlen)}
        for name, text in files.items():
            with _in_one_step(folder / name) as unfinished:
                unfinished.write_text(text, encoding="utf-8")


def save(
    folder: str | pathlib.Path,
    *,
    step: int,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    info: Mapping[str, Any],
) -> None:
    """Put the checkpoint of `step` in the place of the one before: all of it, or nothing.

    state holds the training's tensors, info what JSON can say. Raises OSError, in one line, if the disk is full or
    cannot be written; the checkpoint before is then untouched.
    """
    folder = pathlib.Path(folder)
    state_path = _state_path(folder, step)
    with _explained(folder):
        with _in_one_step(state_path) as unfinished:
            safetensors.torch.save_file(_plain(state), unfinished, {"info": json.dumps(info)})
            shutil.copymode(folder / CONFIG, unfinished)  # safetensors shuts everybody else out
        with _in_one_step(folder / WEIGHTS) as unfinished:
            safetensors.torch.save_file(_plain(weights), unfinished, {"format": "pt", "step": str(step)})
            shutil.copymode(folder / CONFIG, unfinished)
        for old in folder.glob("*training-*"):  # and what a killed save left unfinished
            if old != state_path:
                old.unlink()


def load(folder: str | pathlib.Path) -> Checkpoint:
    """Read a run folder, or any Qwen3 model folder with tied embeddings and a byte-level tokenizer.

    Raises ValueError, in one line, for a folder that is missing, foreign, truncated, or holds a pickle.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such run folder")
    if not exists(folder):
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern)]
        pickles = [name for name in pickles if not name.startswith(("tokens-", "documents-"))]
        hint = f"; {pickles[0]} may be a pickle, which is never read" if pickles else ""
        raise ValueError(f"{folder}: there is no {WEIGHTS} in this folder{hint}")
    config = _from_hugging_face(folder / CONFIG)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}"
        )
    weights, metadata = _read(folder / WEIGHTS)
    return Checkpoint(
        folder=folder, config=config, weights=weights, tokenizer=tokenizer, step=int(metadata.get("step", 0))
    )


def load_training_state(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state and info that `save` stored with these weights.

    Raises ValueError if there are none or they are damaged.
    """
    path = _state_path(checkpoint.folder, checkpoint.step)
    if not path.is_file():
        raise ValueError(f"{checkpoint.folder}: there is no {path.name}, so that this run cannot be resumed")
    state, metadata = _read(path)
    return state, json.loads(metadata["info"])


def _state_path(folder: pathlib.Path, step: int) -> pathlib.Path:
    return folder / f"training-{step:08d}.safetensors"


def _read(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


@contextlib.contextmanager
def _in_one_step(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a name to write to; what was written then takes the place of `path`, wholly or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def _explained(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            f"{folder}: the checkpoint could not be written: {reason}; what was saved before is intact"
        ) from None


def _to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """The config under the names that transformers gives a Qwen3 model."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_seqlen,
        "rope_theta": config.rope_theta,  # where transformers 4 looks
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # and transformers 5
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }


def _from_hugging_face(path: pathlib.Path) -> ModelConfig:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": True}
        for name, value in wanted.items():
            if fields.get(name) != value:
                raise ValueError(f"{path}: {name} is {fields.get(name)!r}, this model has {value!r}")
        rope = fields.get("rope_parameters") or {"rope_theta": fields.get("rope_theta")}
        if rope.get("rope_type", "default") != "default" or fields.get("use_sliding_window"):
            raise ValueError(f"{path}: this model has neither scaled rotary positions nor a sliding window")
        return ModelConfig(
            vocab_size=fields["vocab_size"],
            model_dim=fields["hidden_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=fields["num_attention_heads"],
            num_kv_heads=fields["num_key_value_heads"],
            head_dim=fields["head_dim"],
            mlp_dim=fields["intermediate_size"],
            max_seqlen=fields["max_position_embeddings"],
            rope_theta=rope["rope_theta"],
            norm_eps=fields["rms_norm_eps"],
        )
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a model's config: {error}") from None
    except KeyError as error:
        raise ValueError(f"{path}: not a Qwen3 config, {error} is missing") from None
