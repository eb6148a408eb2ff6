"""Checkpoints: where a model is, what shape it has, and which bytes of which file hold each weight."""

from minicache_trt.checkpoint.binding import weight_shapes
from minicache_trt.checkpoint.families import FAMILIES, Family
from minicache_trt.checkpoint.hf_config import parse_config
from minicache_trt.checkpoint.presets import PRESETS, Preset, list_presets
from minicache_trt.checkpoint.resolve import Checkpoint, load_checkpoint, resolve_config
from minicache_trt.checkpoint.weights import WeightView, read_safetensors_index

__all__ = [
    "FAMILIES",
    "PRESETS",
    "Checkpoint",
    "Family",
    "Preset",
    "WeightView",
    "list_presets",
    "load_checkpoint",
    "parse_config",
    "read_safetensors_index",
    "resolve_config",
    "weight_shapes",
]
