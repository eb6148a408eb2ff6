"""Hidden states of calibration sequences between the layers, kept for a run that goes on where one was killed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.checkpoint.weights import WeightView
from minicache_trt.config import ModelConfig
from minicache_trt.quantization.layer import Layer


class HiddenStates:
    """Before the first layer, or before the last one that an earlier run kept them for.

    Parameters
    ----------
    directory : Path
        Where they are kept, ``hidden.<layers>.npy``.
    embedding : WeightView
        ``[vocab, hidden]``.
    tokens : ndarray
        ``[S, T]``.
    scale : float
        Factor of the embeddings.
    """

    def __init__(self, directory: Path, embedding: WeightView, tokens: NDArray[Any], scale: float = 1.0) -> None:
        self._directory = directory
        self.layers, kept = self._load(tokens.shape)
        if kept is None:
            kept = torch.from_numpy(embedding.numpy()[tokens].astype(np.float32)) * scale
        self.hidden = list(kept)

    def _load(self, shape: tuple[int, ...]) -> tuple[int, Tensor | None]:
        found = sorted((int(path.name.split(".")[1]), path) for path in self._directory.glob("hidden.*.npy"))
        for layers, path in reversed(found):
            try:
                array = np.load(path)
            except (OSError, ValueError, EOFError):
                continue
            if array.shape[:2] == shape and array.dtype == np.float32:
                return layers, torch.from_numpy(array)
        return 0, None

    def forward(self, config: ModelConfig, views: Mapping[str, WeightView], layers: int) -> None:
        """Go on to the states after so many layers."""
        for index in range(self.layers, layers):
            layer = Layer(config, index, views)
            self.hidden = [layer.output(x) for x in self.hidden]
        self.layers = max(self.layers, layers)

    def keep(self, outputs: list[Tensor], layer: int) -> None:
        """The states after a layer; those two layers back are not needed any more, whatever happens now."""
        path = self._directory / f"hidden.{layer + 1}.npy"
        temporary = path.with_suffix(".new")
        with temporary.open("wb") as file:
            np.save(file, torch.stack(outputs).numpy())
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        self.hidden, self.layers = outputs, layer + 1
        (self._directory / f"hidden.{layer - 1}.npy").unlink(missing_ok=True)
