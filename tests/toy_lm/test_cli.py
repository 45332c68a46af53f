"""The command line: what each job prints, and that whatever is expected to go wrong ends in one line and a status."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import toy_lm
from toy_lm import checkpoint, cli

ROOT = pathlib.Path(__file__).parents[2]


def command(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "toy_lm.cli", *arguments],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **environment},
    )


def fails_in_one_line(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Run a job that must fail; what it says."""
    status = cli.main(arguments)
    error = capsys.readouterr().err
    assert status == 1
    assert error.startswith("toy-lm: ") and error.count("\n") == 1, error
    return error


def test_generate_prints_prompt_and_text(run_folder: str, capsys: pytest.CaptureFixture):
    lm = toy_lm.load(run_folder, device="cpu")
    expected = lm.generate("the quick", max_new_tokens=20, seed=4)[0]
    arguments = ("generate", "the", "quick", "--run", run_folder, "--device", "cpu", "--max-new-tokens", "20")
    assert cli.main([*arguments, "--seed", "4"]) == 0
    assert capsys.readouterr().out == f"the quick{expected}\n"

    assert cli.main([*arguments, "--seed", "3", "--num-samples", "2"]) == 0
    assert capsys.readouterr().out.endswith(f"--- sample 1 (seed 4)\nthe quick{expected}\n")


def test_show_top_k_prints_the_candidates(run_folder: str, capsys: pytest.CaptureFixture):
    arguments = ["generate", "the", "--run", run_folder, "--device", "cpu", "--temperature", "0"]
    assert cli.main([*arguments, "--max-new-tokens", "3", "--show-top-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines:  # at temperature 0 the first candidate is the token itself
        token, candidates = line.split("  from  ")
        assert candidates.startswith(token) and len(candidates.split("  ")) == 2


def test_prompt_from_a_pipe_and_from_a_file(run_folder: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    prompt = "the quick 😀 über\nthe"
    settings = ("--run", run_folder, "--device", "cpu", "--max-new-tokens", "5")
    piped = command("generate", *settings, stdin=f"{prompt}\n".encode())
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.decode().startswith(prompt)
    assert command("generate", "-", *settings, stdin=prompt.encode()).stdout == piped.stdout
    (tmp_path / "prompt.txt").write_text(prompt + "\n", encoding="utf-8")
    assert cli.main(["generate", "--prompt-file", str(tmp_path / "prompt.txt"), *settings]) == 0
    assert capsys.readouterr().out.encode() == piped.stdout


def test_prompt_that_is_not_utf8(run_folder: str):
    result = command("generate", "-", "--run", run_folder, stdin=b"\xff\xfe")
    assert result.returncode == 1
    assert result.stderr == b"toy-lm: prompt: stdin is not UTF-8 text (invalid start byte, byte 0)\n"


def test_a_closed_pipe_is_no_error(run_folder: str):
    generate = [sys.executable, "-m", "toy_lm.cli", "generate", "the", "--run", run_folder, "--device", "cpu"]
    with subprocess.Popen(
        [*generate, "--max-new-tokens", "3000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--top-k", "0"), "top_k: got 0"),
        (("--top-k", "100000"), "top_k: got 100000"),
        (("--top-p", "0"), "top_p: got 0.0"),
        (("--temperature", "-1"), "temperature: got -1.0"),
        (("--seed", "-1"), "seed: got -1"),
        (("--num-samples", "0"), "num_samples: got 0"),
        (("--max-new-tokens", "-5"), "max_new_tokens: got -5"),
        (("--show-top-k", "100000"), "num_candidates: got 100000"),
        (("--device", "abacus"), "device: got 'abacus'"),
        (("--prompt-file", "missing.txt"), "missing.txt"),
    ],
)
def test_generate_refuses(run_folder: str, capsys: pytest.CaptureFixture, arguments: tuple[str, ...], said: str):
    prompt = () if "--prompt-file" in arguments else ("the",)
    assert said in fails_in_one_line(capsys, "generate", *prompt, "--run", run_folder, *arguments)


def test_run_folders_that_are_refused(tmp_path: pathlib.Path, run_folder: str, capsys: pytest.CaptureFixture):
    generate = ("generate", "the", "--device", "cpu", "--run")
    assert "no such run folder" in fails_in_one_line(capsys, *generate, str(tmp_path / "missing"))
    assert "no model.safetensors" in fails_in_one_line(capsys, *generate, str(tmp_path))
    for path in pathlib.Path(run_folder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "not a whole safetensors file" in fails_in_one_line(capsys, *generate, str(tmp_path))


def test_weights_that_give_no_number(tmp_path: pathlib.Path, run_folder: str, capsys: pytest.CaptureFixture):
    saved = checkpoint.load(run_folder)
    checkpoint.begin(tmp_path, saved.config, saved.tokenizer)
    weights = {name: torch.full_like(weight, float("nan")) for name, weight in saved.weights.items()}
    checkpoint.save(tmp_path, step=1, weights=weights, state={}, info={})
    assert "logits are not finite" in fails_in_one_line(capsys, "generate", "the", "--run", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--corpus", "missing.txt"), "corpus: got 'missing.txt'"),
        (("--preset", "huge"), "preset: got 'huge'"),
        (("--steps", "0"), "steps: got 0"),
        (("--resume",), "no such run folder"),
    ],
)
def test_train_refuses(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, arguments: tuple[str, ...], said: str):
    assert said in fails_in_one_line(capsys, "train", "--out", str(tmp_path / "run"), "--device", "cpu", *arguments)
    assert not (tmp_path / "run").exists()


def test_train_and_generate(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    run = str(tmp_path / "run")
    assert cli.main(["train", "--corpus", "sample", "--out", run, "--steps", "2", "--device", "cpu"]) == 0
    assert cli.main(["generate", "the", "--run", run, "--device", "cpu", "--max-new-tokens", "3"]) == 0
    assert "already holds a run" in fails_in_one_line(capsys, "train", "--out", run, "--device", "cpu")


def test_info_says_what_is_bound_and_why(capsys: pytest.CaptureFixture):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("cpu: ") for line in lines) and any(line.startswith("cuda: ") for line in lines)
    reference = command("info", TOY_LM_KERNELS="reference").stdout.decode()
    assert "cpu: the reference implementations in plain torch (slow), because: TOY_LM_KERNELS=reference" in reference
    refused = command("info", TOY_LM_KERNELS="quick")
    assert refused.returncode == 1
    assert refused.stderr == b"toy-lm: TOY_LM_KERNELS: got 'quick', allowed are 'fused', 'reference' and unset\n"


def test_no_compiler_and_fused_kernels_asked_for(tmp_path: pathlib.Path):
    result = command("info", TOY_LM_KERNELS="fused", CXX="no-such-compiler", TOY_LM_CACHE=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith(b"toy-lm: no C++ compiler found (looked for no-such-compiler); install one")
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize("arguments", [(), ("juggle",), ("generate", "--juggle"), ("bench", "juggle")])
def test_usage_errors(arguments: tuple[str, ...]):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2


def test_every_bench_that_is_offered_can_run():
    parser_names = sorted(path.stem for path in cli.BENCH_FOLDER.glob("[a-z]*.py"))
    for name in parser_names:
        assert "def run(" in (cli.BENCH_FOLDER / f"{name}.py").read_text()
