"""Building the plugins: headers that are missing or too old, every release's headers, and where they come from."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.plugin_build import ROOT, SCRIPT

HEADERS_SCRIPT = ROOT / "build_scripts" / "tensorrt_headers.sh"


def run(script: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TENSORRT_INCLUDE_DIR"} | variables
    return subprocess.run([script, *arguments], capture_output=True, text=True, check=False, env=environment)


def test_missing_headers_are_named_with_a_way_to_get_them(tmp_path: Path) -> None:
    for folder, arguments, variables in (
        (tmp_path / "a", ["--include", tmp_path / "a"], {}),
        (tmp_path / "b", [], {"TENSORRT_INCLUDE_DIR": str(tmp_path / "b")}),
    ):
        output = tmp_path / "out"
        result = run(SCRIPT, "--host", "--tensorrt", *arguments, "--output", output, **variables)
        assert result.returncode == 2
        error, hint = result.stderr.splitlines()
        assert error == f"error: TensorRT's headers are missing: no NvInferRuntime.h in {folder}"
        assert hint.startswith("hint: build_scripts/tensorrt_headers.sh fetches them")
        assert "TENSORRT_INCLUDE_DIR" in hint and not output.exists()


def test_old_headers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "NvInferRuntime.h").write_text("class IPluginV3OneBuild;\n")
    result = run(SCRIPT, "--host", "--tensorrt", "--include", tmp_path, "--output", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: TensorRT's headers in {tmp_path} are too old")


def git(*arguments: str | Path) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_headers_are_fetched_from_a_release_and_replaced_whole(tmp_path: Path) -> None:
    repository, output = tmp_path / "repository", tmp_path / "headers"
    git("init", "--quiet", repository)
    for release in ("v1", "v2"):
        for name in ("include/NvInferRuntime.h", f"include/only_{release}.h", "parsers/large.cpp"):
            (repository / name).parent.mkdir(exist_ok=True)
            (repository / name).write_text(release)
        git("-C", repository, "add", ".")
        git("-C", repository, "commit", "--quiet", "-m", release)
        git("-C", repository, "tag", release)
        git("-C", repository, "rm", "--quiet", f"include/only_{release}.h")
    for release in ("v1", "v2"):
        result = run(HEADERS_SCRIPT, "--release", release, "--output", output, TENSORRT_REPOSITORY=repository.as_uri())
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == str(output / "include")
        assert sorted(path.name for path in (output / "include").iterdir()) == [
            "NvInferRuntime.h",
            f"only_{release}.h",
        ]
    result = run(HEADERS_SCRIPT, "--release", "v3", "--output", output, TENSORRT_REPOSITORY=repository.as_uri())
    assert result.returncode == 2 and "has no release v3" in result.stderr
    assert (output / "include" / "only_v2.h").exists(), "what was there stays"
    assert [path.name for path in output.iterdir()] == ["include"]
