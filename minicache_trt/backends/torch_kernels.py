"""PyTorch with our kernels: the backend for a GPU without TensorRT, and its double on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.backends.torch_weights import load_weights
from minicache_trt.engine_directory import EngineInfo
from minicache_trt.errors import UserError
from minicache_trt.kernels.cache import KernelCache
from minicache_trt.kernels.device_memory import allocating_cache, free_memory, one_line_errors, pool_array
from minicache_trt.kernels.graphs import CompressGraphs, CudaRecorder, DecodeGraphs, GraphLimits, Recorder, run_again
from minicache_trt.kernels.host_logits import HostLogits
from minicache_trt.kernels.library import KernelError, KernelLibrary
from minicache_trt.kernels.locate import open_library, runs_on
from minicache_trt.kernels.steps import StepInputs, StepShape
from minicache_trt.model.decoder import decoder
from minicache_trt.model.kernel_ops import KernelOps
from minicache_trt.parallel.rank import ONE_RANK, Rank
from minicache_trt.runtime.batch import Batch, Int32

HEAD_DIMS = (64, 80, 96, 128, 256)
"""Sizes of heads the attention kernels are made for."""


class KernelEngine:
    """Implements `minicache_trt.backends.base.Engine` with the kernels of a library.

    The decoder is the one the reference runs. Steps of decodes are padded to buckets and replayed (`DecodeGraphs`);
    steps with prefill chunks run as they are. Weight-only formats are dequantized when loaded.

    Parameters
    ----------
    directory : Path
    info : EngineInfo
    library : KernelLibrary
    device : torch.device
    dtype : torch.dtype
        Compute type, of weights, activations and pools: float16 or bfloat16; float32 with the host library alone.
    record : Recorder
        How decode steps are captured.
    rank : Rank
        Which of the engine's ranks this process is.

    Raises
    ------
    UserError
        The kernels do not take this model's heads, or the device has too little memory for its weights.
    """

    def __init__(
        self,
        directory: Path,
        info: EngineInfo,
        library: KernelLibrary,
        device: torch.device,
        dtype: torch.dtype,
        record: Recorder,
        rank: Rank = ONE_RANK,
    ) -> None:
        self.directory = directory
        self.model, self.plan, self.build = rank.model(info.model), rank.plan(info), info.build
        self._ranks = rank.collectives
        self.device, self.dtype, self.element_bytes = device, dtype, dtype.itemsize
        if self.model.head_dim not in HEAD_DIMS:
            names = f"{', '.join(map(str, HEAD_DIMS[:-1]))} or {HEAD_DIMS[-1]}"
            raise UserError(f"head_dim: expected {names}, got {self.model.head_dim}", "use --backend onnxruntime")
        with self._one_line_errors("loading the model"), torch.inference_mode():
            self.weights = load_weights(directory, device, dtype, rank.shard)
            self.cache = KernelCache(library, self.model, self.plan, device, dtype)
        self._record = record
        self._host_logits = HostLogits(self.model.vocab_size, device)
        self._new_graphs()

    def free_memory(self) -> int | None:
        return free_memory(self.device, self.cache.tensors.values())

    def allocate(self, full_blocks: int, compressed_blocks: int) -> int:
        self._new_graphs()  # they hold the addresses of the pools there were
        with allocating_cache(self.device):
            num_bytes = self.cache.allocate(full_blocks, compressed_blocks)
        with self._one_line_errors("the first launch of its kernels"), torch.inference_mode():
            self.cache.warm_up()
        return num_bytes

    @torch.inference_mode()
    def decode(self, batch: Batch) -> NDArray[np.float32]:
        with self._one_line_errors("a step"):
            if len(batch.decode_rows) == len(batch.context_len):
                logits = self._host_logits.take(self._decode_graphs(batch))
                every = len(batch.logit_index) == len(logits)
                return logits if every else logits[batch.logit_index]
            step = StepInputs(StepShape.of(batch), self.device)
            step.load(batch)
            return self._host_logits.take(self._compute(step))

    @torch.inference_mode()
    def compress(self, source_blocks: Int32, target_blocks: Int32, block_index: Int32) -> None:
        with self._one_line_errors("compressing blocks"):
            self._compress_graphs(source_blocks, target_blocks, block_index)

    def pool(self, name: str) -> NDArray[np.generic]:
        """A copy of a pool by its contract name, for inspection; bfloat16 as float32."""
        return pool_array(self.cache.tensors[name])

    def _compute(self, step: StepInputs) -> Tensor:
        """Logits ``[rows, vocab]`` of a loaded step, compute type."""

        def attention(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            return self.cache.attend(step, q, k, v, layer)

        ops = KernelOps(self.model, self.weights, attention, self._ranks, self.cache.frequencies)
        inputs = step.tensors
        return decoder(self.model, ops, inputs["input_ids"], inputs["positions"], inputs["logit_index"])

    def _new_graphs(self) -> None:
        limits = GraphLimits.of(self.build, self.plan.compresses)
        self._decode_graphs = DecodeGraphs(limits, self._compute, self._record, self.device)
        self._compress_graphs = CompressGraphs(self.cache.compress, self._record, self.device)

    @contextmanager
    def _one_line_errors(self, what: str) -> Iterator[None]:
        try:
            with one_line_errors(what):
                yield
        except KernelError as error:
            raise UserError(f"the kernels cannot run this model: {error}", "use --backend onnxruntime") from error


class CudaEngine(KernelEngine):
    """`KernelEngine` on a GPU, decode steps as CUDA graphs; bfloat16 for such checkpoints, float16 for all others.

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
        No GPU, one that is too old, or no library for it.
    """

    def __init__(
        self, directory: Path, info: EngineInfo, num_threads: int | None = None, rank: Rank = ONE_RANK
    ) -> None:
        library = cuda_library()
        dtype = getattr(torch, info.model.half_dtype)
        device = torch.device("cuda", torch.cuda.current_device())
        # Which experts run is read back from the GPU, which no captured step can do.
        record = run_again if info.model.num_experts else CudaRecorder()
        super().__init__(directory, info, library, device, dtype, record, rank)


class HostKernelEngine(KernelEngine):
    """`KernelEngine` on the CPU in float32, to test kernels and engine where there is no GPU; slow.

    Parameters
    ----------
    directory : Path
    info : EngineInfo
    num_threads : int, optional
        Default: PyTorch's own choice; the kernels themselves use one.
    rank : Rank
        Which of the engine's ranks this process is.

    Raises
    ------
    UserError
        No library.
    """

    def __init__(
        self, directory: Path, info: EngineInfo, num_threads: int | None = None, rank: Rank = ONE_RANK
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        library = open_library("host")
        super().__init__(directory, info, library, torch.device("cpu"), torch.float32, run_again, rank)


def cuda_library() -> KernelLibrary:
    """The CUDA library, if this machine can run it.

    Raises
    ------
    UserError
        PyTorch finds no GPU, or there is no library for it.
    """
    other = "use another --backend, such as onnxruntime"
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ": this PyTorch is built without CUDA"
        raise UserError(f"backend cuda needs an NVIDIA GPU, and PyTorch finds none{built}", other)
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise UserError(
            f"backend cuda needs a GPU of compute capability 8.0 or later, got {capability[0]}.{capability[1]}",
            other,
        )
    library = open_library("cuda")
    if not runs_on(library.version, capability):
        raise UserError(
            f"{library.path} ({library.version}) has no code for this GPU, sm_{capability[0]}{capability[1]}",
            "build it again: build_scripts/build_plugins.sh --cuda --arch native",
        )
    return library
