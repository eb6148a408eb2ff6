"""``minicache-trt doctor``: what this machine has."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import typer
from rich.text import Text

from minicache_trt.backends.tensorrt.module import PRODUCTS, load_module
from minicache_trt.backends.tensorrt.plugins import find_plugins, supports_plugins
from minicache_trt.cli import options
from minicache_trt.cli.console import print_json, stdout, table
from minicache_trt.engine_directory import tool_versions
from minicache_trt.errors import UserError
from minicache_trt.units import format_bytes


@dataclass(frozen=True)
class Check:
    """One finding. ``needed`` is False for what only other backends need; ``remedy`` is empty when all is well."""

    name: str
    ok: bool
    found: str
    needed: bool = True
    remedy: str = ""


def doctor(json: options.Json = False) -> None:
    """Check this machine: versions, cores, memory, disk, a small graph in ONNX Runtime, GPU, kernels and TensorRT.

    The exit code is 1 when something the default backend needs is missing.

    [bold]Example[/]

      minicache-trt doctor
    """
    checks = run_checks()
    if json:
        print_json([asdict(check) for check in checks])
    else:
        rows = table("This machine", "check", "", "found", left=3)
        for check in checks:
            word, style = ("ok", "green") if check.ok else ("missing", "red") if check.needed else ("absent", "yellow")
            rows.add_row(check.name, Text(word, style), check.found + (f" ({check.remedy})" if check.remedy else ""))
        stdout.print(rows)
    if any(check.needed and not check.ok for check in checks):
        raise typer.Exit(1)


def run_checks() -> list[Check]:
    """Every finding, in the order of the table."""
    versions = tool_versions()
    checks = [
        Check("Python", sys.version_info >= (3, 11), platform.python_version(), remedy=""),
        Check("packages", True, ", ".join(f"{name} {version}" for name, version in versions.items())),
        Check("CPU", True, f"{len(os.sched_getaffinity(0))} cores, {_cpu_features()}"),
        _memory(),
        Check("disk here", True, f"{format_bytes(shutil.disk_usage(Path.cwd()).free)} free"),
        _onnxruntime(),
        _cpu_kernels(),
        _gpu(),
        _nvcc(),
        _kernels("cuda"),
        _kernels("host"),
    ]
    checks += [_tensorrt(backend) for backend in PRODUCTS]
    checks += [_tensorrt_llm()]
    token = bool(os.environ.get("HF_TOKEN"))
    checks.append(
        Check(
            "HF_TOKEN",
            token,
            "set" if token else "not set",
            needed=False,
            remedy="" if token else "gated models need it",
        )
    )
    return checks


def _cpu_features() -> str:
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "features unknown"
    return (
        ", ".join(name for name in ("avx2", "avx512f", "avx512_vnni", "amx_int8", "asimd") if name in flags) or "none"
    )


def _memory() -> Check:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Check("memory", True, format_bytes(total))


def _onnxruntime() -> Check:
    """Whether a model-local function with the operators the engines rely on runs."""
    import numpy as np
    import onnx_ir as ir
    import onnxruntime as ort

    from minicache_trt.functions.tape import OPSETS, Emitter

    g = Emitter("doctor")
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["T", 16])
    scale = g.floats([1.0] * 16)
    y = g.op("RMSNormalization", x, scale, attrs={"axis": -1, "epsilon": 1e-6})
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    model = ir.Model(ir.Graph([x], [y], nodes=g.nodes, opset_imports=dict(OPSETS), name="doctor"), ir_version=10)
    try:
        session = ort.InferenceSession(
            ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        (result,) = session.run(None, {"x": np.full((1, 16), 2.0, np.float32)})
        ok = bool(np.allclose(result, 1.0, atol=1e-5))
    except Exception as error:  # whatever it is, it is the finding
        return Check("ONNX Runtime", False, str(error).splitlines()[0], remedy="reinstall onnxruntime")
    return Check("ONNX Runtime", ok, "runs a test graph" if ok else "computes wrong numbers")


def _cpu_kernels() -> Check:
    """Whether engines attend with the compiled kernels; without them they run the same operator as ONNX functions."""
    from minicache_trt.backends.cpu_kernels import SWITCH, instruction_set

    name = "CPU kernels"
    if os.environ.get(SWITCH) == "0":
        return Check(name, False, f"switched off by {SWITCH}=0", needed=False)
    try:
        found = instruction_set()
    except UserError as error:
        return Check(name, False, error.cause, remedy=error.remedy)
    if found is None:
        remedy = "slower decoding; to have them: install a C++ compiler, then this package again"
        return Check(name, False, "not built", needed=False, remedy=remedy)
    return Check(name, True, found, needed=False)


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("GPU", False, "none that PyTorch can use", needed=False)
    properties = torch.cuda.get_device_properties(0)
    found = f"{properties.name}, SM {properties.major}.{properties.minor}, {format_bytes(properties.total_memory)}"
    return Check("GPU", True, found, needed=False)


def _nvcc() -> Check:
    """The compiler `build_scripts/build_plugins.sh` would use."""
    path = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if path is None:
        return Check("nvcc", False, "not installed", needed=False, remedy="the CUDA kernels are built with it")
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release [\d.]+, V([\d.]+)", output)
    return Check("nvcc", release is not None, release[1] if release else f"{path} gives no version", needed=False)


def _tensorrt(backend: str) -> Check:
    """Whether the backend's module can be loaded, and our plugins where it takes any."""
    product = PRODUCTS[backend]
    try:
        module = load_module(backend)
        library = find_plugins() if supports_plugins(module) else None
    except UserError as error:
        return Check(product.module, False, error.cause, needed=False, remedy=error.remedy)
    plugins = "takes no plugins" if not supports_plugins(module) else f"plugins {library or 'not built'}"
    return Check(product.module, True, f"{module.__version__}, {plugins}", needed=False)


def _tensorrt_llm() -> Check:
    found = importlib.util.find_spec("tensorrt_llm") is not None
    return Check("tensorrt_llm", found, importlib.metadata.version("tensorrt-llm") if found else "not installed", False)


def _kernels(kind: str) -> Check:
    """The library of kernels the cuda backend, or its double on the CPU, would load."""
    from minicache_trt.kernels.locate import open_library

    try:
        library = open_library(kind)
    except UserError as error:
        return Check(f"{kind} kernels", False, error.cause, needed=False, remedy=error.remedy)
    return Check(f"{kind} kernels", True, f"{library.version}, {library.path}", needed=False)
