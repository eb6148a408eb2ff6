"""Activation-aware weight quantization: layer by layer, one in memory at a time, resumable after each.

Every layer's inputs are those of the unrounded model, as in AWQ's own code; so is the hidden state that is kept beside
the partial file for the next layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.checkpoint.streaming import Progress
from minicache_trt.checkpoint.weights import WeightView
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.quantization.folding import Folding, changed_names, fold, foldings, shared_scales
from minicache_trt.quantization.groups import refuse_damaged
from minicache_trt.quantization.head import search_head
from minicache_trt.quantization.hidden import HiddenStates
from minicache_trt.quantization.layer import InputStatistics, Layer
from minicache_trt.quantization.nearest import code_shapes
from minicache_trt.quantization.partial_file import PartialFile, Shapes
from minicache_trt.quantization.rounding import quantize_rows, row_chunks
from minicache_trt.quantization.search import AwqSettings, best_alpha, channel_scales, clip_factors, scaled_rounding
from minicache_trt.quantization.workers import torch_threads

UNCLIPPED = (".attention.q", ".attention.k")
"""Their product is sensitive to clipping; AWQ leaves them out too."""
_SHARED = {"k": "q", "v": "q", "up": "gate"}
EXACT = 1e-3
"""Folding moves a layer's outputs by less than this share of the largest."""


def awq_shapes(config: ModelConfig, views: Mapping[str, WeightView], linears: Mapping[str, WeightView],
               settings: AwqSettings) -> Shapes:  # fmt: skip
    """Tensors of the file: codes and scales, and the floats that scales are folded into."""
    floats = {name: ("F32", views[name].shape) for name in changed_names(config, views)}
    return {**code_shapes(linears, settings.bits, settings.block), **floats}


def quantize_awq(
    file: PartialFile,
    config: ModelConfig,
    views: Mapping[str, WeightView],
    linears: Mapping[str, WeightView],
    tokens: NDArray[Any],
    settings: AwqSettings,
    threads: int,
    progress: Progress,
) -> None:
    """Search and round what ``file`` lacks.

    Parameters
    ----------
    file : PartialFile
        Of `awq_shapes`.
    config : ModelConfig
    views : mapping
        All weights of the model by canonical name.
    linears : mapping
        Those to round, without ``.weight``; the output layer ``lm_head`` is among them.
    tokens : ndarray
        ``[S, T]`` calibration sequences.
    settings : AwqSettings
    threads : int
    progress : callable
        Called with searches done and searches in all.

    Raises
    ------
    UserError
        Weights are no numbers, or the model is not computed as folding expects.
    """
    steps = len(foldings(config, 0)) + 1
    total = config.num_layers * steps + 1
    with torch_threads(threads), torch.inference_mode():
        states = HiddenStates(file.directory, views["embed.weight"], tokens, config.embedding_scale)
        for index in range(config.num_layers):
            if any(name.startswith(f"layers.{index}.") and name not in file.finished for name in file.names):
                states.forward(config, views, index)
                search = _LayerSearch(Layer(config, index, views), states.hidden, settings)
                search.run(lambda done, index=index: progress(index * steps + done, total))  # type: ignore[misc]
                states.keep(search.outputs, index)
                names = [name for name in file.names if name.startswith(f"layers.{index}.")]
                file.write(names, search.tensors(names))
            progress((index + 1) * steps, total)
        if "norm.weight" not in file.finished:
            states.forward(config, views, config.num_layers)
            names = ["lm_head.codes", "lm_head.scales", "norm.weight"]
            head = search_head(config, views["norm.weight"], linears["lm_head"], states.hidden, settings)
            file.write(names, head)
        progress(total, total)


class _LayerSearch:
    """Scales and clips of one layer; ``outputs`` are the hidden states after it."""

    def __init__(self, layer: Layer, hidden: list[Tensor], settings: AwqSettings) -> None:
        self._layer, self._settings = layer, settings
        self._damaged(layer.weights)
        self._statistics: dict[str, InputStatistics] = {}
        self._inputs: dict[str, list[Tensor]] = {}
        self._hidden = hidden[: settings.search_sequences]
        self.outputs = []
        for index, x in enumerate(hidden):
            self.outputs.append(layer.output(x, self._observer(index < settings.search_sequences)))

    def _damaged(self, weights: Mapping[str, Tensor]) -> None:
        refuse_damaged([self._layer.views[name] for name, weight in weights.items() if not weight.isfinite().all()])

    def _observer(self, search: bool) -> Callable[[str, Tensor], None]:
        def observe(name: str, x: Tensor) -> None:
            if name != _source(name) or not len(x):
                return
            if name not in self._statistics:
                self._statistics[name] = InputStatistics.empty(x.shape[1], self._settings.block)
            self._statistics[name].add(x)
            if search:
                self._inputs.setdefault(name, []).append(x)

        return observe

    def run(self, progress: Callable[[int], None]) -> None:
        """Fold the best scales of every group into the layer's weights."""
        for done, folding in enumerate(foldings(self._layer.config, 0)):
            progress(done)
            self._fold(folding)
        difference = (self._layer.output(self._hidden[0]) - self.outputs[0]).abs().max()
        if difference > EXACT * self.outputs[0].abs().max():
            raise UserError(
                f"int4_awq: scales cannot be folded into a model of family {self._layer.config.family} "
                f"(layer {self._layer.index} would change)",
                "use --weights int4",
            )

    def _fold(self, folding: Folding) -> None:
        # A router sees all tokens, an expert some of them.
        source = _source((folding.floats or folding.linears)[0])
        if source not in self._inputs:  # an expert no token was sent to
            return
        statistics, config = self._statistics[source], self._layer.config

        def scales(alpha: float) -> tuple[Tensor, Tensor]:
            return shared_scales(folding, channel_scales(statistics.magnitude, alpha), config)

        error = self._error(folding, self._hidden if folding.block == "attention" else self._inputs[source])
        alpha, _ = best_alpha(lambda alpha: error(scales(alpha)[1]))
        own, chosen = scales(alpha)
        fold(folding, own, chosen, self._layer.weights, config)
        for name in {_source(name) for name in (*folding.linears, *folding.floats)} & self._statistics.keys():
            self._statistics[name].divide(chosen)

    def _error(self, folding: Folding, inputs: list[Tensor]) -> Callable[[Tensor], float]:
        """Mean squared error of the block's output with a folding's layers rounded, for scales of their inputs."""
        layer, bits, block = self._layer, self._settings.bits, self._settings.block
        names = [f"{name}.weight" for name in folding.linears]

        def output(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
            if folding.block == "linear":
                return x @ weights[names[0]].T
            return (layer.attention if folding.block == "attention" else layer.mlp)(x, weights)

        exact = [output(x, {name: layer.weights[name] for name in names}) for x in inputs]

        def error(scales: Tensor) -> float:
            weights = {name: scaled_rounding(layer.weights[name], scales, bits, block) for name in names}
            return sum(float((output(x, weights) - y).square().sum()) for x, y in zip(inputs, exact, strict=True))

        return error

    def tensors(self, names: list[str]) -> Iterator[tuple[str, NDArray[Any]]]:
        """Pieces of the layer's tensors in the file."""
        bits, block = self._settings.bits, self._settings.block
        for name in names:
            linear, _, kind = self._layer.local(name).rpartition(".")
            if kind == "codes":
                weight, statistics = self._layer.weights[f"{linear}.weight"], self._statistics.get(_source(linear))
                clip = None
                if statistics is not None and not linear.endswith(UNCLIPPED):
                    clip = clip_factors(weight, statistics.moments, bits, block)
                for rows in row_chunks(*weight.shape):
                    codes, scales = quantize_rows(weight[rows], bits, block, None if clip is None else clip[rows])
                    yield name, codes.numpy()
                    yield name.replace(".codes", ".scales"), scales.numpy()
            elif kind != "scales":
                yield name, self._layer.weights[self._layer.local(name)].numpy()


def _source(name: str) -> str:
    """The linear layer whose inputs ``name`` shares and that is observed for both."""
    module, _, part = name.rpartition(".")
    return f"{module}.{_SHARED.get(part, part)}"
