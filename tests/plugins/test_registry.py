"""Both builds of the library in the plugin registry of TensorRT-RTX, and the CUDA build where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minicache_trt.kernels.library import KernelLibrary
from tests.gpu.cases import model
from tests.support.plugin_build import ROOT, built_plugins
from tests.support.plugin_cache import Bounds, largest_inputs
from tests.support.plugin_harness import Harness, PluginError, described
from tests.support.plugin_nodes import nodes_named, plans_of

PROBE = Path(__file__).parent / "registry_probe.py"
CONFIG = model()
PLAN = plans_of(CONFIG)["minicache4"]
NODES = nodes_named(CONFIG, "minicache4")


@pytest.fixture(scope="session")
def cuda_plugins() -> Path:
    """The real library, for one architecture and few instantiations."""
    if (shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")) is None:
        pytest.skip("needs nvcc: install the CUDA toolkit (12.8 or later) and put it on PATH")
    return built_plugins("--cuda", "--reduced", "--jobs", "2", output=ROOT / "build" / "plugins-check")


@pytest.fixture(params=["host", "cuda"])
def library(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{request.param}_plugins")
    return folder / f"libminicache_trt_plugins{'_host' if request.param == 'host' else ''}.so"


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs a plugin registry: pip install tensorrt-rtx"
)
def test_registry(library: Path) -> None:
    """Creators and their fields are listed, every node makes a plugin, and refusals reach TensorRT's own logger."""
    nodes = [*NODES.attention, *NODES.compression]
    bad = ["PagedAttention", NODES.attention[0].fields | {"num_heads": 3}]
    given = json.dumps([*([node.op, node.fields] for node in nodes), bad])
    command = [sys.executable, PROBE, library]
    result = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    found: dict[str, list[Any]] = json.loads(result.stdout)
    listed = ((NODES.attention[0], {"logit_numbers"}), (NODES.compression[0], set[str]()))
    for (node, optional), (*identity, names) in zip(listed, found["creators"], strict=True):
        assert identity == [node.op, "minicache", "1"]
        assert len(set(names)) == len(names) and set(names) - optional == node.fields.keys() - optional
    *plugins, refused = found["plugins"]
    for node, (*identity, metadata) in zip(nodes, plugins, strict=True):
        assert identity == [node.op, "minicache", "1", len(node.outputs)]
        assert all(f"; {name}: {value}" in metadata for name, value in node.fields.items())
    assert refused is None
    message = "minicache: PagedAttention: num_heads: expected a multiple of num_kv_heads (2), got 3"
    assert found["errors"] == [message]


def test_cuda_build_needs_no_gpu_to_be_configured(cuda_plugins: Path, harness: Harness) -> None:
    """Formats, checks and workspace sizes are those of the host variant; types are what its kernels take."""
    library = cuda_plugins / "libminicache_trt_plugins.so"
    assert KernelLibrary(library).version.startswith("0.1.0 cuda sm_90a")
    cuda = Harness(cuda_plugins / "libminicache_trt_harness.so", library)
    for node in NODES.attention:
        inputs = largest_inputs(NODES, node, PLAN, CONFIG, Bounds(), torch.float16)
        outputs = [inputs[0], inputs[3]]
        plugins = [each.create(node.op, node.fields) for each in (harness, cuda)]
        for plugin in plugins:
            assert all(plugin.supports(place, inputs, outputs) for place in range(len(inputs) + 2))
            plugin.configure(inputs, outputs)
        host, device = (plugin.workspace(inputs, outputs) for plugin in plugins)
        assert device == host > 0
        single = [described(torch.empty(0, dtype=torch.float32), (512, 256)), *inputs[1:]]
        assert plugins[0].supports(0, single, outputs) and not plugins[1].supports(0, single, outputs)
        with pytest.raises(PluginError, match="q: type 0 is not one this library computes in"):
            plugins[1].configure(single, outputs)
