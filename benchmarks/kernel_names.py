"""Names of kernels for people, as the report of ptxas gives them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import common

SCRIPTS = str(common.REPOSITORY / "build_scripts")


def kernel_names(symbols: Sequence[str]) -> list[str]:
    """``RestoreKernel<Half, 4, false>`` of mangled entry points; symbols as they are without ``c++filt``."""
    # The report is a script that runs where the package is not installed, so it is no part of the package.
    if SCRIPTS not in sys.path:
        sys.path.append(SCRIPTS)
    names: list[str] = import_module("ptxas_report").demangled(symbols)
    return names
