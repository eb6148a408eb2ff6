"""A stand-in for TensorRT's runtime on the CPU: its "engine file" names an ONNX graph, which ONNX Runtime runs.

It holds callers to what TensorRT does: shapes outside the active profile are refused, every tensor has an address, and
outputs are written where they are bound, after all inputs were read (no aliasing within a run).
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from minicache_trt.backends.tensorrt.profiles import Profile

TYPES = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.INT8: np.int8,
    onnx.TensorProto.INT32: np.int32,
}


class ILogger:
    """Base of loggers."""

    class Severity:
        ERROR = 1


class TensorIOMode:
    INPUT, OUTPUT = "input", "output"


class ExecutionContextAllocationStrategy:
    USER_MANAGED = "user"


class RuntimeCache:
    """Kernels by name; takes only what this fake wrote."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def serialize(self) -> bytes:
        return json.dumps({"kernels": sorted(self.kernels)}).encode() if self.kernels else b""

    def deserialize(self, blob: bytes) -> bool:
        try:
            self.kernels |= set(json.loads(blob)["kernels"])
        except (ValueError, KeyError):
            return False
        return True


class RuntimeConfig:
    """Of TensorRT-RTX's contexts."""

    def __init__(self) -> None:
        self.cache, self.strategy = RuntimeCache(), ""

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


class Context:
    """One execution context."""

    def __init__(self, engine: Engine, cache: RuntimeCache) -> None:
        self.engine, self.profile, self.cache = engine, -1, cache
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return 0 <= profile < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.engine.get_tensor_profile_shape(name, self.profile)
        fits = len(shape) == len(smallest) and all(
            a <= n <= b for a, n, b in zip(smallest, shape, largest, strict=True)
        )
        self.shapes[name] = shape
        return fits

    def update_device_memory_size_for_shapes(self) -> int:
        return 16 * self.shapes["source_blocks" if "source_blocks" in self.shapes else "input_ids"][0]

    def set_device_memory(self, address: int, size: int) -> None:
        assert address and size >= self.update_device_memory_size_for_shapes()
        self.memory = address

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address != 0

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory
        self.engine.compile(self.shapes, self.cache)
        inputs = {
            name: _array(self.addresses[name], self.shapes[name], dtype).copy()
            for name, dtype in self.engine.inputs.items()
        }
        used = {value.name for value in self.engine.session.get_inputs()}
        names = list(self.engine.outputs)
        results = self.engine.session.run(names, {name: x for name, x in inputs.items() if name in used})
        for name, result in zip(names, results, strict=True):
            _array(self.addresses[name], result.shape, self.engine.outputs[name])[...] = result
        self.engine.runs.append(dict(self.shapes))
        return True


class Engine:
    """A deserialized engine; ``runs``: input shapes of every execution, ``compiled``: kernels that were in no cache."""

    def __init__(self, graph: Path, profiles: tuple[Profile, ...], shapes: dict[str, Any]) -> None:
        model = onnx.load(graph, load_external_data=False)
        self.session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: TYPES[value.type.tensor_type.elem_type] for value in model.graph.input}
        self.outputs = {value.name: TYPES[value.type.tensor_type.elem_type] for value in model.graph.output}
        self.profiles, self.shapes = profiles, shapes
        self.runs: list[dict[str, tuple[int, ...]]] = []
        self.compiled: list[str] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> str:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self.profiles[profile].shapes(self.shapes[name])

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig) -> Context:
        assert config.strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self, config.cache)

    def compile(self, shapes: dict[str, tuple[int, ...]], cache: RuntimeCache) -> None:
        """One kernel for each number of tokens or blocks."""
        kernel = str(next(iter(shapes.values())))
        if kernel not in cache.kernels:
            cache.kernels.add(kernel)
            self.compiled.append(kernel)


class FakeTensorRt:
    """The module. ``profiles``: from the kind of engine, ``decoder`` or ``compressor``, to its profiles and shapes."""

    ILogger = ILogger
    TensorIOMode = TensorIOMode
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy

    def __init__(self, profiles: Callable[[str], tuple[tuple[Profile, ...], dict[str, Any]]]) -> None:
        self.engines: dict[str, Engine] = {}
        module = self

        class Runtime:
            def __init__(self, logger: ILogger) -> None:
                pass

            def deserialize_cuda_engine(self, data: bytes) -> Engine:
                graph = Path(json.loads(data)["graph"])
                module.engines[graph.stem] = Engine(graph, *profiles(graph.stem))
                return module.engines[graph.stem]

        self.Runtime = Runtime


def _array(address: int, shape: tuple[int, ...], dtype: Any) -> Any:
    count = int(np.prod(shape))
    buffer = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(buffer, dtype, count).reshape(shape)
