"""The TensorRT backends: an engine directory's plans, run with the cache in tensors of PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.backends.tensorrt.module import PRODUCTS, load_module
from minicache_trt.backends.tensorrt.plugins import find_plugins, load_plugins, supports_plugins
from minicache_trt.backends.tensorrt.profiles import COMPRESSED_AT_ONCE
from minicache_trt.backends.tensorrt.runtime import EngineSession, Execution
from minicache_trt.backends.tensorrt.steps import count_shapes, split_step
from minicache_trt.contract import COMPRESSOR_INPUTS, LOGITS, compressed_pools, decoder_inputs, full_pools
from minicache_trt.engine_directory import COMPRESSOR_ENGINE, DECODER_ENGINE, EngineInfo, rank_folder
from minicache_trt.errors import UserError
from minicache_trt.kernels.device_memory import (
    allocating_cache,
    free_memory,
    one_line_errors,
    pool_array,
    zeroed_pools,
)
from minicache_trt.kernels.graphs import CompressGraphs, CudaRecorder, DecodeGraphs, GraphLimits, Recorder
from minicache_trt.kernels.host_logits import HostLogits
from minicache_trt.kernels.steps import StepInputs, StepShape
from minicache_trt.parallel.nccl import NcclCommunicator
from minicache_trt.parallel.rank import ONE_RANK, Rank
from minicache_trt.runtime.batch import Batch, Int32
from minicache_trt.tracing.points import trace_points

DECODE = 0
"""The decoder's optimization profile of decodes; the last one, which may be the same, is that of prefill chunks."""


class TensorRtEngine:
    """Implements `minicache_trt.backends.base.Engine` with TensorRT's plans.

    Decodes are padded to buckets and replayed as CUDA graphs, each with an execution context of its own. Without
    plugins each prefill chunk is a call of its own. A pool is one tensor, bound as input and as output.

    Parameters
    ----------
    directory : Path
    info : EngineInfo
    num_threads : int, optional
        Not used: the GPU computes.
    rank : Rank
        Which of the engine's ranks this process is.

    Raises
    ------
    UserError
        TensorRT is missing, there is no GPU, or the engine is not for this machine.
    """

    backend = "tensorrt"

    def __init__(
        self, directory: Path, info: EngineInfo, num_threads: int | None = None, rank: Rank = ONE_RANK
    ) -> None:
        trt = load_module(self.backend)
        shard = rank.shard
        folder = directory if shard.size == 1 else rank_folder(directory, shard.rank)
        if not (folder / DECODER_ENGINE).exists() or info.build.backend != self.backend:
            name = PRODUCTS[self.backend].name
            raise UserError(
                f"{folder} was built for backend {info.build.backend}, it has no {name} engine",
                f"build it with --backend {self.backend}",
            )
        if not torch.cuda.is_available():
            raise UserError(
                f"backend {self.backend} needs an NVIDIA GPU to run engines, and PyTorch finds none",
                "use another --backend, such as onnxruntime for engines in float32 or float16",
            )
        library = find_plugins() if supports_plugins(trt) else None
        if library is not None:
            load_plugins(trt, library)
        device = torch.device("cuda", torch.cuda.current_device())
        own = replace(info, model=rank.model(info.model), plan=rank.plan(info))
        self._start(trt, folder, own, device, CudaRecorder())
        if shard.size > 1:
            self._communicator = NcclCommunicator(shard.rank, shard.size)
            self._decoder.communicator = self._communicator.capsule

    def _start(self, trt: Any, directory: Path, info: EngineInfo, device: torch.device, record: Recorder) -> None:
        self.directory = directory
        self.model, self.plan, self.build = info.model, info.plan, info.build
        self.device, self.dtype = device, getattr(torch, info.build.dtype)
        self.element_bytes = self.dtype.itemsize
        self._record = record
        with one_line_errors("loading the engine"):
            self._decoder = EngineSession(trt, directory / DECODER_ENGINE, device)
            self._compressor = None
            if self.plan.compresses:
                self._compressor = EngineSession(trt, directory / COMPRESSOR_ENGINE, device)
        # A profile that takes no chunk at all in a step of decodes is one for plugins.
        self._plugins = self._decoder.profile_shapes("prefill_rows", DECODE)[2][0] == 0
        self._debug_outputs = {
            name: width for name, width in trace_points(self.model).items() if name in self._decoder.outputs
        }
        self._host_logits = HostLogits(self.model.vocab_size, device)
        self._pools: dict[str, Tensor] = {}
        self._prefill: Execution | None = None
        self._new_graphs()

    def free_memory(self) -> int | None:
        return free_memory(self.device, self._pools.values())

    def allocate(self, full_blocks: int, compressed_blocks: int) -> int:
        self._new_graphs()  # they hold the addresses of the pools there were
        self._pools = {}
        full, compressed = full_pools(self.model), compressed_pools(self.plan, self.model)
        for pools, count in ((full, full_blocks), (compressed, compressed_blocks)):
            for pool in pools:
                if count > self._decoder.profile_shapes(pool.name, DECODE)[2][0]:
                    raise self._decoder.unfit(pool.name, (count, *pool.shape), DECODE)
        with allocating_cache(self.device):
            blocks = full_blocks, compressed_blocks
            self._pools = zeroed_pools(self.model, self.plan, blocks, self.dtype, self.device)
        return sum(pool.nbytes for pool in self._pools.values())

    @torch.inference_mode()
    def decode(self, batch: Batch) -> NDArray[np.float32]:
        with one_line_errors("a step"):
            parts = [batch] if self._plugins else split_step(batch)
            return self._host_logits.gather([self._logits(part) for part in parts])

    @torch.inference_mode()
    def compress(self, source_blocks: Int32, target_blocks: Int32, block_index: Int32) -> None:
        with one_line_errors("compressing blocks"):
            self._compress_graphs(source_blocks, target_blocks, block_index)

    def pool(self, name: str) -> NDArray[np.generic]:
        """A copy of a pool by its contract name, for inspection; bfloat16 as float32."""
        return pool_array(self._pools[name])

    def _logits(self, batch: Batch) -> Tensor:
        """Wanted rows of one call's logits."""
        wanted = torch.from_numpy(batch.logit_index.astype(np.int64)).to(self.device)
        if len(batch.decode_rows) == len(batch.context_len):
            return self._decode_graphs(batch)[wanted]
        shape = StepShape.of(batch)
        step = StepInputs(shape, self.device)
        step.load(batch)
        if self._prefill is None:
            self._prefill = Execution(self._decoder, self._decoder.profiles - 1)
        return self._run_decoder(self._prefill, step)[: shape.rows]

    def _compute(self, step: StepInputs) -> Tensor:
        """Logits of a loaded step of decodes; its context lives as long as the step."""
        if step.shape not in self._decodes:
            self._decodes[step.shape] = Execution(self._decoder, DECODE)
        return self._run_decoder(self._decodes[step.shape], step)

    def _run_decoder(self, execution: Execution, step: StepInputs) -> Tensor:
        tensors = {name: step.tensors[name] for name in decoder_inputs(self.plan) if name in step.tensors}
        if step.shape.rows == 0:  # a chunk in the middle of a prompt: one row that nobody reads
            tensors["logit_index"] = self._zeros((1,))
        for name, shape in count_shapes(step.shape, self._plugins).items():
            if name in decoder_inputs(self.plan):
                tensors[name] = self._zeros(shape)
        rows = len(tensors["logit_index"])
        logits = torch.empty(rows, self.model.vocab_size, device=self.device)
        full = {pool.output_name: self._pools[pool.name] for pool in full_pools(self.model)}
        debug = self._debug_tensors(len(tensors["input_ids"]))
        execution.run({**tensors, **self._pools, **full, **debug, LOGITS: logits})
        self._observe(debug)
        return logits

    def _debug_tensors(self, tokens: int) -> dict[str, Tensor]:
        """Where a debugging build writes its trace points."""
        widths = self._debug_outputs
        return {name: torch.empty(tokens, width, device=self.device) for name, width in widths.items()}

    def _observe(self, outputs: Mapping[str, Tensor]) -> None:
        """What an engine that is traced does with the trace points of a call."""

    def _compute_blocks(self, source: Tensor, target: Tensor, block_index: Tensor) -> None:
        assert self._compressor is not None
        count = len(source)
        if count not in self._compresses:
            self._compresses[count] = Execution(self._compressor, 0)
        steps = dict(zip(COMPRESSOR_INPUTS, (source, target, block_index), strict=True))
        outputs = {pool.output_name: self._pools[pool.name] for pool in compressed_pools(self.plan, self.model)}
        self._compresses[count].run({**steps, **self._pools, **outputs})

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        """At one address for each shape, as captured steps need."""
        if shape not in self._constants:
            self._constants[shape] = torch.zeros(shape, dtype=torch.int32, device=self.device)
        return self._constants[shape]

    def _new_graphs(self) -> None:
        limits = GraphLimits.of(self.build, self.plan.compresses)
        self._prefill = None
        self._decodes: dict[StepShape, Execution] = {}
        self._compresses: dict[int, Execution] = {}
        self._constants: dict[tuple[int, ...], Tensor] = {}
        self._decode_graphs = DecodeGraphs(limits, self._compute, self._record, self.device)
        self._compress_graphs = CompressGraphs(
            self._compute_blocks, self._record, self.device, limit=COMPRESSED_AT_ONCE
        )


class TensorRtRtxEngine(TensorRtEngine):
    """The same with TensorRT-RTX."""

    backend = "tensorrt-rtx"
