"""The emulated GPU itself: what instructions compute, and that it reports each kind of defect it looks for."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from minicache_trt.kernels.emulated import EmulatedRuntime
from tests.support.emulator import only_tensors
from tests.support.plugin_build import EMULATED_OUTPUT, NVCC, build_plugins

pytestmark = pytest.mark.skipif(
    NVCC is None, reason="needs nvcc: install the CUDA toolkit (12.8 or later) and put it on PATH"
)
COUNT = 2000


class Cases:
    """Kernels of ``plugins/emulator/cases``; each call returns what went wrong, or nothing."""

    def __init__(self, library: Path) -> None:
        self.runtime = EmulatedRuntime(library)
        self._functions = ctypes.CDLL(str(library))

    def __call__(self, name: str, *arguments: np.ndarray | int) -> str:
        function = getattr(self._functions, f"cases_{name}")
        function.restype = ctypes.c_char_p
        error = function(*(ctypes.c_void_p(x.ctypes.data) if isinstance(x, np.ndarray) else x for x in arguments))
        return "" if error is None else str(error.decode())


@pytest.fixture(scope="module")
def cases() -> Cases:
    build_plugins("--emulated", output=EMULATED_OUTPUT)
    return Cases(EMULATED_OUTPUT / "libminicache_emulator_cases.so")


def signed(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int32).astype(np.int64)


def selected(x: int, y: int, z: int) -> int:
    """What ``prmt`` makes of two words and a selector."""
    data = x.to_bytes(4, "little") + y.to_bytes(4, "little")
    result = []
    for n in range(4):
        pick = z >> 4 * n & 15
        byte = data[pick & 7]
        result.append((255 if byte & 128 else 0) if pick & 8 else byte)
    return int.from_bytes(bytes(result), "little")


def field(x: int, z: int, sign: bool) -> int:
    """What ``bfe`` makes of a word: bits of it, extended by the last of them or zero."""
    start, length = z % 32, z // 32 % 33
    if length == 0:
        return 0
    bits = [x >> i & 1 for i in range(32)]
    last = bits[min(start + length - 1, 31)] if sign else 0
    taken = [bits[start + i] if i < length and start + i < 32 else last for i in range(32)]
    return sum(bit << i for i, bit in enumerate(taken))


def inserted(x: int, y: int, z: int) -> int:
    """What ``bfi`` makes of a word: the lowest bits of x in y."""
    start, length = z % 32, z // 32 % 33
    mask = ((1 << length) - 1) << start & 0xFFFFFFFF
    return y & ~mask | x << start & mask


def test_integers(cases: Cases) -> None:
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, 1 << 32, (3, COUNT), dtype=np.uint32)
    b[::3] >>= 20
    a[:4], b[:8] = (0, 1, 0x80000000, 0xFFFFFFFF), (0, 0xFFFFFFFF, 1, 0x80000000, 31, 32, 39, 40)
    out = np.zeros((24, COUNT), np.uint32)
    assert cases("integers", a, b, c, out, COUNT) == ""
    x, y, z, sx, sy = a.astype(object), b.astype(object), c.astype(object), signed(a), signed(b)
    shift = [int(v) % 40 for v in y]
    safe, some = np.where((sy == 0) | (sy == -1), 1, sy), (sy != 0) & (sy != -1)
    quotient = np.sign(sx) * np.sign(safe) * (np.abs(sx) // np.abs(safe))
    triples = [(int(i), int(j), int(k)) for i, j, k in zip(a, b, c, strict=True)]
    expected = [
        x + y,
        x - y,
        x * y + z,
        x * y // (1 << 32),
        [int(i) * int(j) >> 32 for i, j in zip(sx, sy, strict=True)],
        np.where(b == 0, 0, a // np.maximum(b, 1)),
        np.where(b == 0, 0, a % np.maximum(b, 1)),
        np.where(some, quotient, 0),
        np.where(some, sx - quotient * safe, 0),
        np.minimum(sx, sy),
        np.maximum(a, b),
        [int(v) << n if n < 32 else 0 for v, n in zip(x, shift, strict=True)],
        [int(v) >> n if n < 32 else 0 for v, n in zip(x, shift, strict=True)],
        [int(v) >> min(n, 31) for v, n in zip(sx, shift, strict=True)],
        [i & j | ~i & k for i, j, k in triples],
        [selected(*t) for t in triples],
        [inserted(*t) for t in triples],
        [field(i, k, False) for i, _, k in triples],
        [field(i, k, True) for i, _, k in triples],
        [32 - i.bit_length() for i, _, _ in triples],
        [i.bit_count() for i, _, _ in triples],
        x * y + z,
        (x * y + z) // (1 << 32),
        a.astype(np.int8).astype(np.int64) + b.astype(np.int16),
    ]
    for n, row in enumerate(expected):
        wanted = np.array([int(v) & 0xFFFFFFFF for v in row], np.uint32)
        np.testing.assert_array_equal(out[n], wanted, err_msg=f"row {n}")


def test_floats(cases: Cases) -> None:
    rng = np.random.default_rng(1)
    a, b, c = (rng.standard_normal((3, COUNT)) * 2.0 ** rng.integers(-20, 20, (3, COUNT))).astype(np.float32)
    a[:6], b[:6] = (np.nan, 1, 0.5, 2.5, -1.5, 70000), (1, np.nan, 0.5, 3, 1e-8, 2)
    out = np.zeros((25, COUNT), np.float32)
    assert cases("floats", a, b, c, out, COUNT) == ""
    x, y, z = (v.astype(np.float64) for v in (a, b, c))
    with np.errstate(all="ignore"):
        whole = np.where(np.isnan(a), 0, np.trunc(x))
        natural = np.where(np.isnan(a), 0, np.clip(np.rint(x), 0, 2**32 - 1))
        half = [v.astype(np.float16).astype(np.float64) for v in (a, b, c)]
        expected = [
            x + y, x * y, None, x / y, np.sqrt(np.abs(x)), 1 / y, 1 / y, np.fmin(a, b), np.fmax(a, b),
            np.copysign(a, b),
            None, np.rint(a), np.clip(whole, -(2**31), 2**31 - 1), natural, a.astype(np.float16),
            torch.from_numpy(a).bfloat16().float().numpy(), (half[0] * half[1] + half[2]).astype(np.float16),
            (half[1] * half[2] + half[0]).astype(np.float16), -half[0], -half[1], x * y, a < b, ~(a >= b), a == b,
            (a != b),
        ]  # fmt: skip
    for n, row in enumerate(expected):
        if row is not None:
            np.testing.assert_array_equal(out[n], np.asarray(row).astype(np.float32), err_msg=f"row {n}")
    product = x * y + z
    np.testing.assert_allclose(out[2], product, rtol=2**-23)
    np.testing.assert_allclose(out[10], np.exp2(np.fmin(np.fmax(x, -100), 100)), rtol=2**-21)


def test_sines_and_cosines_of_long_contexts(cases: Cases) -> None:
    angles = (np.random.default_rng(4).uniform(-1, 1, COUNT) * 2.0 ** np.linspace(-10, 23, COUNT)).astype(np.float32)
    angles[:3] = 0.0, 1e-30, 131071.0
    out = np.zeros((2, COUNT), np.float32)
    assert cases("angles", angles, out, COUNT) == ""
    exact = angles.astype(np.float64)
    np.testing.assert_allclose(out, [np.sin(exact), np.cos(exact)], atol=1e-6)


def test_shuffles(cases: Cases) -> None:
    out = np.zeros((4, 32), np.uint32)
    assert cases("shuffles", out) == ""
    lane = np.arange(32)
    sources = [lane ^ 5, lane // 8 * 8 + 3, np.where(lane == 31, 31, lane + 1), np.where(lane < 2, lane, lane - 2)]
    np.testing.assert_array_equal(out, 10 * np.stack(sources))


def test_diverging_threads_meet_again(cases: Cases) -> None:
    numbers = np.random.default_rng(2).integers(1, 1000, 32, dtype=np.uint32)
    steps, neighbours = np.zeros((2, 32), np.uint32)
    assert cases("diverging", numbers, steps, neighbours) == ""

    def collatz(x: int) -> int:
        return 0 if x == 1 else 1 + collatz(x // 2 if x % 2 == 0 else 3 * x + 1)

    np.testing.assert_array_equal(steps, [collatz(int(x)) for x in numbers])
    np.testing.assert_array_equal(neighbours, steps[np.arange(32) ^ 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_cores(cases: Cases, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((16, 16), (16, 8)))
    c = torch.randn(16, 8, generator=generator)
    d = np.zeros((16, 8), np.float32)
    bits = [x.view(torch.int16).numpy() for x in (a, b)]
    assert cases("product", int(dtype == torch.bfloat16), *bits, c.numpy(), d) == ""
    np.testing.assert_allclose(d, (a.double() @ b.double() + c).numpy(), rtol=1e-5, atol=1e-5)


DEFECTS = [
    "reads what another thread wrote, with no barrier between",
    "with no barrier between",
    "reads what another thread wrote, with no barrier between",
    "reads shared memory that nobody has written",
    "reads what an asynchronous copy has not been waited for",
    "a thread ends before an asynchronous copy it began",
    "of shared memory; cases.cu:",
    "uses an address that is not aligned to 16 bytes",
    "outside of every tensor; cases.cu:",
    "threads wait for one another for ever",
    "threads wait for one another for ever",
]


@pytest.mark.parametrize("defect", range(len(DEFECTS)), ids=lambda n: f"{n} {DEFECTS[n][:40]}")
def test_defects_are_reported(cases: Cases, monkeypatch: pytest.MonkeyPatch, defect: int) -> None:
    inputs, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    with only_tensors(cases.runtime, monkeypatch):
        inputs.data_ptr(), out.data_ptr()
        mended = cases("defect", defect, 1, inputs.numpy(), out.numpy())
        fault = cases("defect", defect, 0, inputs.numpy(), out.numpy())
    assert mended == ""
    assert DEFECTS[defect] in fault and "with_defect" in fault


@pytest.mark.parametrize(
    ("blocks", "threads", "shared", "error"),
    [
        (0, 32, 0, "invalid configuration argument"),
        (65536, 32, 0, "invalid configuration argument"),
        (1, 1025, 0, "invalid configuration argument"),
        (1, 32, 49153, "invalid argument"),
    ],
)
def test_launches_a_gpu_refuses(cases: Cases, blocks: int, threads: int, shared: int, error: str) -> None:
    assert cases("launch", blocks, threads, shared) == error


def test_what_a_kernel_did_is_counted(cases: Cases) -> None:
    cases.runtime.reset()
    out = torch.zeros(4, 32, dtype=torch.int32).numpy()  # PyTorch's memory begins at a sector
    assert cases("shuffles", out) == ""
    ((name, counts),) = cases.runtime.statistics().items()
    assert "shuffles" in name and (counts["launches"], counts["blocks"]) == (1, 1)
    assert counts["instructions"]["shuffle"] == 4
    assert (counts["global_accesses"], counts["global_bytes"], counts["global_sectors"]) == (4, 4 * 128, 4 * 4)
    assert sum(counts["instructions"].values()) == sum(counts["places"].values())


def test_blocks_in_reverse(cases: Cases) -> None:
    """The result is the same: blocks here do not depend on one another."""
    rng = np.random.default_rng(5)
    a, b, c = rng.integers(0, 1 << 32, (3, COUNT), dtype=np.uint32)
    made = []
    for reverse in (False, True):
        cases.runtime.run_blocks_in_reverse(reverse)
        made.append(np.zeros((24, COUNT), np.uint32))
        assert cases("integers", a, b, c, made[-1], COUNT) == ""
    cases.runtime.run_blocks_in_reverse(False)
    np.testing.assert_array_equal(*made)
