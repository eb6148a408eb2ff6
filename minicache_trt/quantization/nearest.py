"""Weight-only quantization of linear layers by rounding to nearest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from numpy.typing import NDArray

from minicache_trt.checkpoint.weights import WeightView
from minicache_trt.quantization.groups import Group, NotFinite
from minicache_trt.quantization.partial_file import Shapes
from minicache_trt.quantization.reading import read_rows
from minicache_trt.quantization.rounding import quantize_rows


def code_shapes(linears: Mapping[str, WeightView], bits: int, block: int) -> Shapes:
    """Tensors of a file of codes: ``<linear>.codes`` and ``<linear>.scales``.

    Parameters
    ----------
    linears : mapping
        Name of a linear layer to its weight ``[out, in]``.
    bits, block : int
        Of a code, and inputs that share a scale.
    """
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, view in linears.items():
        rows, blocks = view.shape[0], -(-view.shape[1] // block)
        shapes[f"{name}.codes"] = "U8", (rows, blocks, block * bits // 8)
        shapes[f"{name}.scales"] = "F32", (rows, blocks)
    return shapes


def rounded_groups(linears: Mapping[str, WeightView], bits: int, block: int) -> list[Group]:
    """The layers of `code_shapes`; computing one takes a few megabytes."""
    return [
        Group((f"{name}.codes", f"{name}.scales"), view, partial(_rounded, name, view, bits, block))
        for name, view in linears.items()
    ]


def _rounded(name: str, view: WeightView, bits: int, block: int) -> Iterator[tuple[str, NDArray[Any]]]:
    for _, rows in read_rows(view):
        codes, scales = quantize_rows(rows, bits, block)
        if not scales.isfinite().all():
            raise NotFinite(name)
        yield f"{name}.codes", codes.numpy()
        yield f"{name}.scales", scales.numpy()
