"""The rules of the house that a machine can keep: who imports whom, what importing does, what files may say."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("corpus", "kernels", "toy_lm", "scripts") for path in (ROOT / folder).rglob("*.py")
)
MAY_IMPORT = {
    "corpus": {"corpus"},
    "kernels": {"kernels"},
    "toy_lm": {"toy_lm", "kernels", "corpus"},
    "scripts": {"toy_lm"},
}
# What a file's header says it does not know, as imports that it must not have.
DOES_NOT_KNOW = {
    "toy_lm/config.py": {"torch", "kernels", "corpus", "pathlib"},
    "toy_lm/tokenizer.py": {"torch", "kernels", "corpus", "toy_lm"},
    "toy_lm/data.py": {"kernels", "toy_lm.model", "toy_lm.train"},
    "toy_lm/model.py": {"toy_lm.tokenizer", "toy_lm.data", "toy_lm.checkpoint", "toy_lm.train", "pathlib"},
    "toy_lm/checkpoint.py": {"toy_lm.train", "toy_lm.data", "kernels", "pickle"},
    "toy_lm/report.py": {"torch", "toy_lm.model", "toy_lm.train", "kernels"},
    "toy_lm/picture.py": {"torch", "toy_lm", "kernels"},
    "toy_lm/device.py": {"toy_lm", "kernels"},
    "toy_lm/generate.py": {"toy_lm.train", "toy_lm.data", "toy_lm.report", "corpus"},
    "toy_lm/train.py": {"toy_lm.generate", "toy_lm.cli"},
    "toy_lm/next_words.py": {"toy_lm.train"},
    "toy_lm/info.py": {"toy_lm"},
}


def imports(path: pathlib.Path) -> set[str]:
    """Every module that a file imports, anywhere in it, as `a.b` and `a.b.name`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def name_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_import_arrows(path: pathlib.Path):
    """scripts -> toy_lm -> kernels -> torch, and never back."""
    own = {name.partition(".")[0] for name in imports(path)} & {*MAY_IMPORT, "tests"}
    assert own <= MAY_IMPORT[path.relative_to(ROOT).parts[0]]


@pytest.mark.parametrize("path", sorted(DOES_NOT_KNOW))
def test_headers_are_true(path: str):
    header = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    assert re.search(r"[Kk]now", header), "the header says what the file knows"
    known = imports(ROOT / path)
    for forbidden in DOES_NOT_KNOW[path]:
        assert not any(name == forbidden or name.startswith(f"{forbidden}.") for name in known), forbidden


_IMPORT_AND_LOOK = """
import os, sys
import torch
before = dict(os.environ)
def fail(*arguments, **keywords):
    raise AssertionError("importing asked the driver, the compiler or the environment")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_capability = torch.cuda.init = fail
import subprocess
subprocess.Popen = subprocess.run = fail
read = []
class Environment(type(os.environ)):
    def __getitem__(self, key):
        if key.startswith("TOY_LM"):
            read.append(key)
        return super().__getitem__(key)
os.environ.__class__ = Environment
import kernels, toy_lm, toy_lm.cli, toy_lm.generate, toy_lm.model, toy_lm.train, toy_lm.info
assert not read, read
assert "triton" not in sys.modules, "triton was imported"
assert not torch.cuda.is_initialized()
assert dict(os.environ) == before
"""


def test_importing_does_nothing():
    """No driver query, no compiler, no environment read, no Triton."""
    result = subprocess.run([sys.executable, "-c", _IMPORT_AND_LOOK], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_command_line_starts_without_torch():
    """--help and usage errors must not wait for torch."""
    look = "import sys, toy_lm.cli; assert not {'torch', 'numpy', 'kernels'} & set(sys.modules), sys.modules.keys()"
    result = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def tracked_texts() -> list[pathlib.Path]:
    folders = ("corpus", "kernels", "toy_lm", "scripts", "tests")
    suffixes = {".py", ".cpp", ".h", ".md", ".toml", ".txt", ""}
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths += [path for path in ROOT.iterdir() if path.is_file()]
    return [path for path in paths if path.suffix in suffixes and "__pycache__" not in path.parts]


@pytest.mark.parametrize("path", tracked_texts(), ids=name_of)
def test_no_paths_of_one_machine(path: pathlib.Path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"""["'\s(=](/home/|/root/|/work/|/tmp/|/Users/|[A-Z]:\\)\w""", text)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_say_what_they_are(path: pathlib.Path):
    source = path.read_text(encoding="utf-8")
    assert not source or ast.get_docstring(ast.parse(source)), "a file opens with what it does"
    assert path.stem != "utils"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", source)
