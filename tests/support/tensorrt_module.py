"""The Python module ``tensorrt`` without its libraries: NVIDIA's own bindings, on libraries that find no GPU.

The bindings are a package of their own (``tensorrt-cu13-bindings``). All they want of TensorRT's libraries are
functions that create its objects; those here return null pointers, as TensorRT's do on a machine without a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minicache_trt.backends.tensorrt.plugins import PLUGINS_VARIABLE

ROOT = Path(__file__).parents[2]
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


@dataclass(frozen=True)
class TensorRtModule:
    """What a process needs to import ``tensorrt``."""

    libraries: Path
    packages: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "LD_LIBRARY_PATH": str(self.libraries),
            "PYTHONPATH": os.pathsep.join([str(self.packages), str(ROOT)]),
            PLUGINS_VARIABLE: "0",
        }

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Python with arguments."""
        line = [sys.executable, *map(str, command)]
        return subprocess.run(line, env=self.environment, capture_output=True, text=True, check=False)

    def told(self, script: str) -> Any:
        """What a script prints as JSON; it finds the module as ``trt``."""
        result = self.run("-c", f"import json\nimport tensorrt as trt\n{script}")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)


def classes_of(module: ModuleType) -> list[type]:
    return [value for value in vars(module).values() if isinstance(value, type)]


def names_of(module: ModuleType) -> set[str]:
    """Of what a module holds, and of what its classes hold."""
    return {*vars(module), *(name for kind in classes_of(module) for name in dir(kind))}


def make_tensorrt_module(directory: Path) -> TensorRtModule:
    """Skips where the bindings or a C compiler are missing, and where TensorRT itself is installed."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("NVIDIA's bindings are not installed: pip install tensorrt-cu13-bindings")
    if importlib.util.find_spec("tensorrt_libs") is not None:
        pytest.skip("TensorRT is installed")
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    major = importlib.metadata.version("tensorrt-cu13-bindings").split(".")[0]
    source = directory / "null.c"
    source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for name in LIBRARIES:
        target = f"lib{name}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{target}", "-o", target, source.name]
        subprocess.run(command, cwd=directory, check=True)
    package = directory / "packages" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n")
    return TensorRtModule(directory, package.parent)
