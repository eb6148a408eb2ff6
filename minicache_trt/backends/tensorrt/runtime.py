"""An engine file on the GPU: deserialized once, with a context for every shape that is captured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minicache_trt.backends.tensorrt.collectives import connect
from minicache_trt.backends.tensorrt.module import Messages, start
from minicache_trt.backends.tensorrt.runtime_cache import RuntimeCache, cache_path
from minicache_trt.errors import UserError

_REBUILD = "build the engine again on this machine, with this version of TensorRT"


class Execution:
    """One execution context with its own shapes, on the memory it was given.

    Parameters
    ----------
    session : EngineSession
    profile : int
        Optimization profile it is for.
    """

    def __init__(self, session: EngineSession, profile: int) -> None:
        self._session = session
        self._profile = profile
        self._context = session.new_context()
        if self._context is None:
            raise UserError(f"TensorRT cannot run {session.path.name}: {session.messages.first('out of memory')}")
        if session.communicator is not None:
            connect(self._context, session.communicator)
        if not self._context.set_optimization_profile_async(profile, session.stream):
            raise UserError(f"{session.path.name} has no optimization profile {profile}", _REBUILD)
        self._memory: Tensor | None = None

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        """Enqueue on the current stream.

        Parameters
        ----------
        tensors : mapping
            Every input and output of the engine, on its device. A pool's input and output are one tensor.

        Raises
        ------
        UserError
            A tensor's shape is outside the profile's range, or the GPU has too little memory.
        """
        context = self._context
        for name in self._session.inputs:
            shape = tuple(tensors[name].shape)
            if not context.set_input_shape(name, shape):
                raise self._session.unfit(name, shape, self._profile)
        self._provide_memory()
        for name in (*self._session.inputs, *self._session.outputs):
            tensor = tensors[name]
            # An empty tensor has no address, and TensorRT takes none that is null.
            address = tensor.data_ptr() or self._session.somewhere.data_ptr()
            if not context.set_tensor_address(name, address):
                raise RuntimeError(f"TensorRT refuses the address of {name} {list(tensor.shape)}")
        if not context.execute_async_v3(self._session.stream):
            raise RuntimeError(f"TensorRT failed: {self._session.messages.first('no reason given')}")

    def _provide_memory(self) -> None:
        """What activations of the current shapes need; a captured graph keeps the memory it was captured with."""
        size = max(1, int(self._context.update_device_memory_size_for_shapes()))
        if self._memory is None or len(self._memory) < size:
            self._memory = self._session.scratch(size)
        self._context.set_device_memory(self._memory.data_ptr(), len(self._memory))


class EngineSession:
    """An engine file, deserialized.

    Parameters
    ----------
    trt : module
        ``tensorrt`` or ``tensorrt_rtx``.
    path : Path
    device : torch.device

    Raises
    ------
    UserError
        TensorRT cannot load it here: another GPU or version.
    """

    def __init__(self, trt: Any, path: Path, device: torch.device) -> None:
        self.trt, self.path, self.messages = trt, path, Messages()
        self.somewhere = torch.zeros(1, dtype=torch.int32, device=device)
        self._device = device
        self._runtime = start(trt, "Runtime", self.messages)
        if hasattr(self._runtime, "engine_host_code_allowed"):
            # Version-compatible engines carry the runtime that built them; the directory's hashes vouch for it.
            self._runtime.engine_host_code_allowed = True
        self.engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise UserError(f"TensorRT cannot load {path}: {self.messages.first('no reason given')}", _REBUILD)
        if getattr(self.engine, "streamable_weights_size", 0):
            self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        is_input = {name: self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = [name for name in names if is_input[name]]
        self.outputs = [name for name in names if not is_input[name]]
        self._scratch: Tensor | None = None
        self.communicator: Any = None  # of the ranks that run it together
        self.cache = RuntimeCache(self.engine, cache_path(path, device))

    def new_context(self) -> Any:
        """An execution context that is given its memory; None if there cannot be another."""
        strategy, config = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED, self.cache.config
        if config is None:
            return self.engine.create_execution_context(strategy)
        config.set_execution_context_allocation_strategy(strategy)
        return self.engine.create_execution_context(config)

    @property
    def profiles(self) -> int:
        """Optimization profiles there are."""
        return int(self.engine.num_optimization_profiles)

    @property
    def stream(self) -> int:
        """PyTorch's current stream, on which its tensors are ready; the only one of a device that has none."""
        if self._device.type != "cuda":
            return 0
        handle: int = torch.cuda.current_stream(self._device).cuda_stream
        return handle

    def profile_shapes(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Smallest, usual and largest shape of an input."""
        smallest, usual, largest = (tuple(dims) for dims in self.engine.get_tensor_profile_shape(name, profile))
        return smallest, usual, largest

    def unfit(self, name: str, shape: tuple[int, ...], profile: int) -> UserError:
        """The error for a shape outside a profile."""
        smallest, _, largest = self.profile_shapes(name, profile)
        return UserError(
            f"{name}: expected a shape from {list(smallest)} to {list(largest)}, got {list(shape)}",
            "lower --kv-cache-memory for pools, or build with larger limits",
        )

    def scratch(self, size: int) -> Tensor:
        """At least ``size`` bytes that contexts share: they run one after the other."""
        if self._scratch is None or len(self._scratch) < size:
            self._scratch = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._scratch
