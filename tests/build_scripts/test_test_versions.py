"""The script that runs the tests with other versions: what it installs."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from tests.support.scripts import load_script

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(ROOT / "build_scripts" / "test_versions.py")


@pytest.fixture(scope="module")
def bounds(script: ModuleType) -> dict[str, Requirement]:
    """Of every package that the package, its extras and its tests name."""
    texts = [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
    return {script.package_name(text): Requirement(text) for text in texts}


def test_names(script: ModuleType) -> None:
    assert script.package_name("ray[serve]>=2.50") == "ray" and script.package_name("ml_dtypes==1") == "ml-dtypes"
    runtime = script.declared(ROOT / "pyproject.toml") | script.declared(ROOT / "pyproject.toml", script.RUNTIME_EXTRAS)
    assert {"torch", "huggingface-hub", "fastapi", "llguidance", "lm-eval"} <= runtime
    assert "pytest" not in runtime and "minicache-trt" not in runtime


def test_tested_versions_are_admitted(script: ModuleType, bounds: dict[str, Requirement]) -> None:
    """Those of constraints.txt, and every one of them is pinned."""
    pins = [Requirement(line) for line in script.pins_of(bounds, ROOT / "constraints.txt")]
    assert len(pins) > 20
    for pin in pins:
        (version,) = [part.version for part in pin.specifier]
        assert bounds[script.package_name(pin.name)].specifier.contains(version), pin


def test_tensorrt_llm_goes_with_the_package(script: ModuleType, bounds: dict[str, Requirement]) -> None:
    """What it pins exactly is admitted; of its ranges an end is."""
    names = [script.package_name(line) for line in script.TENSORRT_LLM]
    assert {"numpy", "onnx", "transformers"} <= set(names)
    for name, line in zip(names, script.TENSORRT_LLM, strict=True):
        if name not in bounds:
            continue
        ours, theirs = bounds[name].specifier, Requirement(line).specifier
        ends = [part.version for part in theirs if part.operator in ("==", "<=", ">=")]
        ends += [part.version for part in ours if theirs.contains(part.version)]
        assert any(ours.contains(end) and theirs.contains(end) for end in ends), line


def test_environment_that_cannot_be_made(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "ENVIRONMENTS", tmp_path)
    for interpreter in ("/bin/false", "/no/such/python"):
        assert script.main(["lowest", "--python", interpreter]) == 2
        cause, remedy = capsys.readouterr().err.splitlines()
        assert cause.startswith("error: ") and interpreter in cause and remedy.startswith("hint: ")
