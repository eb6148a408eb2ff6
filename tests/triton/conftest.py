"""The demo model's engine, what it generates, and a server to put it on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from minicache_trt.runtime.llm import LLM
from minicache_trt.serving.triton.repository import deploy, this_environment
from minicache_trt.serving.triton.settings import InstanceSettings, ModelSettings
from tests.support.engines import build

CHECKPOINT = Path(__file__).parents[2] / "examples" / "demo_model" / "checkpoint"


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in 4 bits. Not to be changed."""
    return build(CHECKPOINT, tmp_path_factory.mktemp("built") / "engine", "kivi4", max_seq_len=512)


@pytest.fixture(scope="session")
def llm(engine: Path) -> Iterator[LLM]:
    """The same engine without Triton, one request at a time."""
    with LLM(engine, num_threads=1) as made:
        yield made


@pytest.fixture(scope="session")
def tritonserver_packages() -> Path:
    """Folder of packages the server's stub needs; skips where there is no server."""
    support = pytest.importorskip("tests.support.tritonserver", reason="tritonclient is not installed")
    problem = support.fetch_tritonserver()
    if problem is not None:
        pytest.skip(f"no tritonserver: {problem}")
    return support.PACKAGES


@pytest.fixture(scope="session")
def packages(tritonserver_packages: Path) -> tuple[Path, ...]:
    return (tritonserver_packages, *this_environment())


@pytest.fixture(scope="session")
def repository(engine: Path, packages: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one model ``demo``: two requests may wait."""
    directory = tmp_path_factory.mktemp("triton") / "repository"
    settings = ModelSettings("demo", InstanceSettings(max_queue_size=2, num_threads=1))
    deploy(engine, directory, settings, packages=packages)
    return directory
