"""An engine of two ranks behind a real tritonserver."""

from __future__ import annotations

from pathlib import Path

import pytest

from minicache_trt.build import build_engine
from minicache_trt.compression.methods import make_plan
from minicache_trt.config import BuildConfig
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.sampling_params import SamplingParams
from minicache_trt.serving.triton.repository import deploy
from minicache_trt.serving.triton.settings import InstanceSettings, ModelSettings
from tests.triton.conftest import CHECKPOINT

PROMPT = "def main(argv):"


@pytest.mark.long
def test_two_ranks(packages: tuple[Path, ...], llm: LLM, tmp_path: Path) -> None:
    """The stub starts the ranks; they generate what one rank of the same plan does."""
    from tests.support.tritonserver import TritonServer

    limits = BuildConfig(max_batch_size=4, max_seq_len=512, backend="torch", tp_size=2)
    engine = tmp_path / "engine"
    build_engine(str(CHECKPOINT), engine, lambda config: (make_plan(config, "kivi4"), limits))
    settings = ModelSettings("ranks", InstanceSettings(num_threads=1))
    deploy(engine, tmp_path / "repository", settings, packages=packages)
    with TritonServer(tmp_path / "repository", tmp_path / "server.log") as server:
        server.wait_until_ready()
        answer = server.generate("ranks", text_input=PROMPT, max_tokens=20).json()
    output = llm.generate([PROMPT], SamplingParams(max_tokens=20, temperature=0.0))[0].outputs[0]
    assert answer["text_output"] == output.text
