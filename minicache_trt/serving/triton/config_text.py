"""``config.pbtxt``."""

from __future__ import annotations

import json
from collections.abc import Iterable

from minicache_trt.serving.triton.settings import ModelSettings
from minicache_trt.serving.triton.tensors import INPUTS, OUTPUTS, Tensor


def config_text(settings: ModelSettings) -> str:
    """The model configuration in protobuf's text format."""
    kind = "KIND_CPU" if settings.gpus is None else "KIND_GPU"
    gpus = "" if settings.gpus is None else f" gpus: {list(settings.gpus)}"
    blocks = [
        f"name: {_quoted(settings.name)}\n"
        'backend: "python"\n'
        f"max_batch_size: {settings.max_batch_size}\n"
        f"model_transaction_policy {{ decoupled: {str(settings.decoupled).lower()} }}\n"
        f"instance_group [ {{ count: {settings.instance_count} kind: {kind}{gpus} }} ]",
        _tensors("input", INPUTS, " optional: true"),
        _tensors("output", OUTPUTS, ""),
        *(
            f"parameters {{ key: {_quoted(name)} value {{ string_value: {_quoted(value)} }} }}"
            for name, value in settings.instance.to_parameters().items()
        ),
    ]
    return "\n".join(blocks) + "\n"


def _tensors(field: str, tensors: Iterable[Tensor], end: str) -> str:
    lines = (
        f"  {{ name: {_quoted(tensor.name)} data_type: {tensor.data_type} dims: {list(tensor.dims)}{end} }}"
        for tensor in tensors
    )
    return f"{field} [\n" + ",\n".join(lines) + "\n]"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
