"""The bundled checkpoint and texts to calibrate on."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from minicache_trt.calibration.settings import CalibrationSettings

ROOT = Path(__file__).parents[2]

SMALL = CalibrationSettings(
    length=192, moment_sequences=8, gradient_sequences=4, search_sequences=2, verify_sequences=2, rounds=2
)
"""Few, short sequences: what is tested is that everything is computed as defined, not that plans are good."""


@pytest.fixture(scope="session")
def demo() -> Path:
    return ROOT / "examples" / "demo_model" / "checkpoint"


@pytest.fixture(scope="session")
def code_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of this package as they once were: text of the kind the demo model was trained on, always the same."""
    path = tmp_path_factory.mktemp("text") / "code.txt"
    path.write_bytes(gzip.decompress((Path(__file__).parent / "sources.txt.gz").read_bytes()))
    return path


def random_tokens(count: int, length: int, vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, vocab, (count, length))
