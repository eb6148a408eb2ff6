"""A minicache-trt engine as a model of Triton's Python backend. Everything is in minicache_trt.serving.triton."""

import sys
from pathlib import Path
from typing import Any

# Before anything, Triton's own helpers included, imports NumPy: folders of packages, one in each line.
_PACKAGES = Path(__file__).with_name("packages.pth")
if _PACKAGES.is_file():
    _folders = _PACKAGES.read_text(encoding="utf-8").splitlines()
    sys.path[:0] = [folder for folder in _folders if folder and Path(folder).is_dir()]


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the engine."""
        import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

        try:
            from minicache_trt.serving.triton.model import TritonModel
        except ImportError as error:
            raise pb_utils.TritonModelException(
                f"minicache-trt cannot be imported: {error} (install it in the Python of this server, or name the "
                f"folder of its packages in {_PACKAGES})"
            ) from error
        self._model = TritonModel(args, pb_utils)

    def execute(self, requests: list[Any]) -> None:
        """Take requests; they are answered when there is something to say."""
        self._model.execute(requests)

    def is_ready(self) -> bool:
        """Whether the engine takes requests; asked by servers of 2026 and later when their readiness is."""
        return self._model.is_ready()

    def finalize(self) -> None:
        """Let running requests end."""
        self._model.finalize()
