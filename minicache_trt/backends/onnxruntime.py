"""The default backend: ONNX Runtime on the CPU, pools updated in place; fp32, or fp16 where the engine's graphs are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from minicache_trt.backends.cpu_kernels import cpu_kernels, with_kernels
from minicache_trt.backends.huge_pages import HugePages
from minicache_trt.config import BACKEND_DTYPES
from minicache_trt.contract import (
    COMPRESSOR_INPUTS,
    LOGITS,
    PoolSpec,
    compressed_pools,
    decoder_inputs,
    full_pools,
)
from minicache_trt.engine_directory import COMPRESSOR, DECODER, EngineInfo
from minicache_trt.errors import UserError
from minicache_trt.runtime.batch import Batch, Int32

LARGE_WEIGHTS = 64 << 20
"""Bytes of weights from which on moving them to large pages is worth the time it takes."""

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxRuntimeEngine:
    """Implements `minicache_trt.backends.base.Engine`.

    Every pool is one buffer bound both as input and as output of a graph, so an update costs what it writes, whatever
    the pool's size. Pools keep their buffers for the engine's lifetime; `allocate` replaces them.

    Parameters
    ----------
    directory : Path
    info : EngineInfo
    num_threads : int, optional
        Default: all cores.
    """

    def __init__(self, directory: Path, info: EngineInfo, num_threads: int | None = None) -> None:
        self.directory = directory
        self.model, self.plan, self.build = info.model, info.plan, info.build
        if self.build.graph_dtype not in BACKEND_DTYPES["onnxruntime"]:
            raise UserError(
                f"{directory}: its graphs compute in {self.build.graph_dtype}, which ONNX Runtime cannot on the CPU",
                "use the engine's own --backend, or torch, or build with --dtype float16",
            )
        compute = np.dtype(self.build.graph_dtype)
        self.element_bytes = compute.itemsize
        self._pool_types = {"model": compute, "int8": np.dtype(np.int8), "float16": np.dtype(np.float16)}
        weights = sum(entry["bytes"] for name, entry in info.files.items() if name.endswith(".safetensors"))
        self._pages = HugePages() if weights >= LARGE_WEIGHTS else None
        self._decoder = self._open_decoder(num_threads)
        self._compressor = open_session(directory / COMPRESSOR, num_threads) if self.plan.compresses else None
        self._pools: dict[str, NDArray[np.generic]] = {}
        self._decoder_binding = self._decoder.io_binding()
        self._compressor_binding = self._compressor.io_binding() if self._compressor else None
        self._logits = np.empty((0, self.model.vocab_size), np.float32)
        if self._pages is not None:
            self._pages.collapse_new()

    def allocate(self, full_blocks: int, compressed_blocks: int) -> int:
        full, compressed = full_pools(self.model), compressed_pools(self.plan, self.model)
        try:
            self._pools = {
                pool.name: np.zeros((blocks, *pool.shape), self._pool_types[pool.dtype])
                for pools, blocks in ((full, full_blocks), (compressed, compressed_blocks))
                for pool in pools
            }
        except MemoryError as error:
            raise UserError("the machine has too little memory for the cache", "lower --kv-cache-memory") from error
        self._bind(self._decoder_binding, inputs=(*full, *compressed), outputs=full)
        if self._compressor_binding is not None:
            self._bind(self._compressor_binding, inputs=(*full, *compressed), outputs=compressed)
        return sum(pool.nbytes for pool in self._pools.values())

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        rows = len(batch.logit_index)
        if len(self._logits) < rows:
            self._logits = np.empty((rows, self.model.vocab_size), np.float32)
        logits = self._logits[:rows]
        steps = {name: getattr(batch, name) for name in decoder_inputs(self.plan)}
        _bind_steps(self._decoder_binding, steps)
        bind_buffer(self._decoder_binding.bind_output, LOGITS, logits)
        self._decoder.run_with_iobinding(self._decoder_binding)
        if self._pages is not None:
            # The working memory of the first step serves all others.
            self._pages.collapse_new()
            self._pages = None
        return logits

    def compress(self, source_blocks: Int32, target_blocks: Int32, block_index: Int32) -> None:
        if self._compressor is None or self._compressor_binding is None:
            raise RuntimeError("this engine's plan has no compressed tier")
        steps = dict(zip(COMPRESSOR_INPUTS, (source_blocks, target_blocks, block_index), strict=True))
        _bind_steps(self._compressor_binding, steps)
        self._compressor.run_with_iobinding(self._compressor_binding)

    def free_memory(self) -> int | None:
        return None

    def pool(self, name: str) -> NDArray[np.generic]:
        """A pool by its contract name, for inspection."""
        return self._pools[name]

    def _open_decoder(self, num_threads: int | None) -> ort.InferenceSession:
        """The session of the decoder; a tracing engine opens one with more outputs."""
        return open_session(self.directory / DECODER, num_threads)

    def _bind(self, binding: ort.IOBinding, inputs: Iterable[PoolSpec], outputs: Iterable[PoolSpec]) -> None:
        for pool in inputs:
            bind_buffer(binding.bind_input, pool.name, self._pools[pool.name])
        for pool in outputs:
            bind_buffer(binding.bind_output, pool.output_name, self._pools[pool.name])


def open_session(path: Path, num_threads: int | None, graph: bytes | None = None) -> ort.InferenceSession:
    """Load a graph of an engine directory.

    Parameters
    ----------
    path : Path
        The graph's file; external weights are found relative to its directory.
    num_threads : int, optional
        Default: all cores.
    graph : bytes, optional
        Serialized model to load in place of the file.

    Raises
    ------
    UserError
        ONNX Runtime refuses it, or the environment names kernels that cannot be used.
    """
    library = cpu_kernels()
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads or 0
    options.log_severity_level = 3
    try:
        if library is not None:
            model = onnx.load(path, load_external_data=False) if graph is None else onnx.load_from_string(graph)
            if with_kernels(model):
                options.register_custom_ops_library(str(library))
                graph = model.SerializeToString()
        if graph is not None:
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent))
        return ort.InferenceSession(path if graph is None else graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        reason = str(error).strip().splitlines()[0][:300]
        raise UserError(f"ONNX Runtime cannot load {path}: {reason}", "build the engine again") from error


def _bind_steps(binding: ort.IOBinding, steps: dict[str, Int32]) -> None:
    for name, array in steps.items():
        bind_buffer(binding.bind_input, name, array)


def bind_buffer(bind: object, name: str, array: NDArray[np.generic]) -> None:
    """Bind memory the caller keeps alive until the run is over."""
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)  # type: ignore[operator]
