"""An NCCL communicator of the engine's ranks, for libraries that take its handle.

PyTorch keeps the communicators of its process groups to itself, so the library it has loaded is asked for another one.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch.distributed as dist

from minicache_trt.errors import UserError

LIBRARY = "libnccl.so.2"
_CAPSULE = b"ncclComm_t"  # PyCapsule keeps the pointer to its name


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * 128),)


class NcclCommunicator:
    """The default process group's ranks, one GPU each; every rank makes one at the same time.

    Parameters
    ----------
    rank, size : int
    library : str
        The shared library to load.

    Raises
    ------
    UserError
        NCCL cannot be loaded, or cannot connect the ranks.
    """

    def __init__(self, rank: int, size: int, library: str = LIBRARY) -> None:
        try:
            self._nccl = ctypes.CDLL(library)
        except OSError as error:
            raise UserError(
                f"{library} cannot be loaded: {error}", "install PyTorch for CUDA, which brings it"
            ) from error
        self._nccl.ncclGetErrorString.restype = ctypes.c_char_p
        self._nccl.ncclCommInitRank.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, _UniqueId, ctypes.c_int]
        self._nccl.ncclCommDestroy.argtypes = [ctypes.c_void_p]
        unique = _UniqueId()
        if rank == 0:
            self._check(self._nccl.ncclGetUniqueId(ctypes.byref(unique)))
        told: list[Any] = [bytes(unique)]
        dist.broadcast_object_list(told, src=0)
        self._handle = ctypes.c_void_p()
        unique = _UniqueId.from_buffer_copy(told[0])
        self._check(self._nccl.ncclCommInitRank(ctypes.byref(self._handle), size, unique, rank))

    @property
    def capsule(self) -> Any:
        """The handle as TensorRT's Python module takes it."""
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(self._handle, _CAPSULE, None)

    def close(self) -> None:
        """Leave the other ranks; whoever was given the handle must be gone by then."""
        self._check(self._nccl.ncclCommDestroy(self._handle))

    def _check(self, status: int) -> None:
        if status:
            raise UserError(f"NCCL failed: {self._nccl.ncclGetErrorString(status).decode()}", "set NCCL_DEBUG=INFO")
