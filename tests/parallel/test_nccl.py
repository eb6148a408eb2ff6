"""The binding of NCCL, on a library with its names that does nothing but take notes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from minicache_trt.errors import UserError
from minicache_trt.parallel.nccl import NcclCommunicator

SOURCE = """
#include <string.h>
typedef struct { char internal[128]; } ncclUniqueId;
int destroyed, status;
static int communicator[4];
int ncclGetUniqueId(ncclUniqueId* id) { memset(id, 7, sizeof *id); id->internal[3] = 0; return status; }
const char* ncclGetErrorString(int s) { return s == 5 ? "invalid usage" : "other"; }
int ncclCommInitRank(void** handle, int size, ncclUniqueId id, int rank) {
  communicator[0] = size; communicator[1] = rank; communicator[2] = id.internal[127]; communicator[3] = id.internal[3];
  *handle = communicator;
  return 0;
}
int ncclCommDestroy(void* handle) { destroyed = handle == communicator; return 0; }
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "nccl.c").write_text(SOURCE)
    target = tmp_path / "libnccl.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", target, tmp_path / "nccl.c"], check=True)
    return target


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_ranks_connect_with_the_first_ones_id(library: Path) -> None:
    """All 128 bytes of it, zeros within them included; TensorRT gets the communicator's address."""
    communicator = NcclCommunicator(0, 1, str(library))
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = get(communicator.capsule, b"ncclComm_t")
    assert list((ctypes.c_int * 4).from_address(address)) == [1, 0, 7, 0]
    communicator.close()
    assert ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "destroyed").value == 1


@pytest.mark.usefixtures("group")
def test_what_nccl_refuses_is_said(library: Path) -> None:
    ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "status").value = 5
    with pytest.raises(UserError, match="NCCL failed: invalid usage"):
        NcclCommunicator(0, 1, str(library))


def test_a_library_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"libnowhere\.so cannot be loaded: .*PyTorch for CUDA"):
        NcclCommunicator(0, 1, "libnowhere.so")
