"""The default backend: ONNX Runtime on the CPU, fp32 compute, pools updated in place."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

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
from minicache_trt.functions.support import unsupported
from minicache_trt.runtime.batch import Batch, Int32

_POOL_TYPES = {"model": np.float32, "int8": np.int8, "float16": np.float16}


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

    Raises
    ------
    UserError
        The engine's plan is one the ONNX functions cannot compute, so it has no graphs.
    """

    element_bytes = 4

    def __init__(self, directory: Path, info: EngineInfo, num_threads: int | None = None) -> None:
        reason = unsupported(info.plan)
        if reason is not None:
            raise UserError(f"the onnxruntime backend cannot compute {reason} yet", "use --backend torch")
        self.directory = directory
        self.model, self.plan, self.build = info.model, info.plan, info.build
        self._decoder = _session(directory / DECODER, num_threads)
        self._compressor = _session(directory / COMPRESSOR, num_threads) if self.plan.compresses else None
        self._pools: dict[str, NDArray[np.generic]] = {}
        self._decoder_binding = self._decoder.io_binding()
        self._compressor_binding = self._compressor.io_binding() if self._compressor else None
        self._logits = np.empty((0, self.model.vocab_size), np.float32)

    def allocate(self, full_blocks: int, compressed_blocks: int) -> int:
        full, compressed = full_pools(self.model), compressed_pools(self.plan, self.model)
        try:
            self._pools = {
                pool.name: np.zeros((blocks, *pool.shape), _POOL_TYPES[pool.dtype])
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
        _bind_buffer(self._decoder_binding.bind_output, LOGITS, logits)
        self._decoder.run_with_iobinding(self._decoder_binding)
        return logits

    def compress(self, source_blocks: Int32, target_blocks: Int32, block_index: Int32) -> None:
        if self._compressor is None or self._compressor_binding is None:
            raise RuntimeError("this engine's plan has no compressed tier")
        steps = dict(zip(COMPRESSOR_INPUTS, (source_blocks, target_blocks, block_index), strict=True))
        _bind_steps(self._compressor_binding, steps)
        self._compressor.run_with_iobinding(self._compressor_binding)

    def pool(self, name: str) -> NDArray[np.generic]:
        """A pool by its contract name, for inspection."""
        return self._pools[name]

    def _bind(self, binding: ort.IOBinding, inputs: Iterable[PoolSpec], outputs: Iterable[PoolSpec]) -> None:
        for pool in inputs:
            _bind_buffer(binding.bind_input, pool.name, self._pools[pool.name])
        for pool in outputs:
            _bind_buffer(binding.bind_output, pool.output_name, self._pools[pool.name])


def _session(path: Path, num_threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads or 0
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        reason = str(error).strip().splitlines()[0][:300]
        raise UserError(f"ONNX Runtime cannot load {path}: {reason}", "build the engine again") from error


def _bind_steps(binding: ort.IOBinding, steps: dict[str, Int32]) -> None:
    for name, array in steps.items():
        _bind_buffer(binding.bind_input, name, array)


def _bind_buffer(bind: object, name: str, array: NDArray[np.generic]) -> None:
    """Bind memory the caller keeps alive until the run is over."""
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)  # type: ignore[operator]
