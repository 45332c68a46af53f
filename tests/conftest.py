"""What the tests share: the `device` parameter, the `gpu` mark, and a count of what was skipped for want of a GPU.

A test that takes `device` runs once on the CPU and once on a CUDA device; the latter is marked `gpu`.
"""

import pytest
import torch

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
_skipped_for_gpu: list[str] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            _skipped_for_gpu.append(item.nodeid)
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter) -> None:
    for report in terminalreporter.stats.get("skipped", []):
        if not report.longrepr[2].endswith("needs a CUDA device"):
            terminalreporter.write_line(f"skipped: {report.nodeid}: {report.longrepr[2]}")
    if _skipped_for_gpu:
        terminalreporter.write_line(f"{len(_skipped_for_gpu)} GPU tests were skipped: there is no CUDA device here")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
