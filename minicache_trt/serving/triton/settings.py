"""What a model's ``config.pbtxt`` says beside its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from minicache_trt.config import KvCacheConfig
from minicache_trt.errors import UserError


@dataclass(frozen=True)
class InstanceSettings:
    """How each instance runs: the ``parameters`` of ``config.pbtxt``, by TensorRT-LLM's names where it has them.

    Parameters
    ----------
    max_queue_size : int
        Requests that may wait for a place in the batch; more are refused. 0: any number.
    kv_cache : KvCacheConfig
        Memory for the cache of one instance.
    backend : str, optional
        Run on another backend than the engine was built for.
    num_threads : int, optional
        CPU threads.
    exclude_input_in_output : bool
        Whether ``text_output`` leaves out the prompt, unless a request says.
    accumulate_tokens : bool
        Whether every streamed ``text_output`` holds all text so far, for requests with ``stream`` too.
    execution_env : str, optional
        Triton's own ``EXECUTION_ENV_PATH``: an archive of conda-pack, or a folder, with the Python to run in.
    """

    max_queue_size: int = 0
    kv_cache: KvCacheConfig = field(default_factory=KvCacheConfig)
    backend: str | None = None
    num_threads: int | None = None
    exclude_input_in_output: bool = True
    accumulate_tokens: bool = False
    execution_env: str | None = None

    def __post_init__(self) -> None:
        if self.max_queue_size < 0:
            raise ValueError(f"max_queue_size: expected a number of at least 0, got {self.max_queue_size}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads: expected a positive number, got {self.num_threads}")

    def to_parameters(self) -> dict[str, str]:
        """As text; what has no value is left out."""
        values = {
            "max_queue_size": str(self.max_queue_size),
            "kv_cache_memory": "" if self.kv_cache.max_bytes is None else str(self.kv_cache.max_bytes),
            "kv_cache_free_gpu_mem_fraction": str(self.kv_cache.free_gpu_memory_fraction),
            "enable_kv_cache_reuse": _bool_text(self.kv_cache.enable_block_reuse),
            "exclude_input_in_output": _bool_text(self.exclude_input_in_output),
            "accumulate_tokens": _bool_text(self.accumulate_tokens),
            "backend": self.backend or "",
            "num_threads": "" if self.num_threads is None else str(self.num_threads),
            "EXECUTION_ENV_PATH": self.execution_env or "",
        }
        return {name: value for name, value in values.items() if value}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> InstanceSettings:
        """The reverse; parameters of other names are none of ours.

        Raises
        ------
        UserError
            Naming the parameter that cannot be used.
        """
        reader = _Reader(parameters)
        try:
            return cls(
                max_queue_size=reader.integer("max_queue_size") or 0,
                kv_cache=KvCacheConfig(
                    max_bytes=reader.integer("kv_cache_memory"),
                    free_gpu_memory_fraction=reader.number("kv_cache_free_gpu_mem_fraction", 0.9),
                    enable_block_reuse=reader.boolean("enable_kv_cache_reuse", True),
                ),
                backend=parameters.get("backend") or None,
                num_threads=reader.integer("num_threads"),
                exclude_input_in_output=reader.boolean("exclude_input_in_output", True),
                accumulate_tokens=reader.boolean("accumulate_tokens", False),
                execution_env=parameters.get("EXECUTION_ENV_PATH") or None,
            )
        except ValueError as error:
            raise UserError(f"config.pbtxt: parameter {error}", "change it, and load the model again") from error


@dataclass(frozen=True)
class ModelSettings:
    """One model of a repository.

    Parameters
    ----------
    name : str
        Letters, digits, ``_``, ``-`` and ``.``; the folder's name too.
    instance : InstanceSettings
        Of each instance.
    instance_count : int
        Instances on the CPU, or on each GPU; every one loads the engine and has a cache of its own.
    gpus : tuple of int, optional
        Devices; None for the CPU (``KIND_CPU``).
    max_batch_size : int
        0: tensors have no batch dimension (``llmapi``). Otherwise ``[rows, ...]`` with so many rows at most
        (``tensorrt_llm_bls``). Neither limits how many requests run together: the engine's limit does.
    decoupled : bool
        Any number of responses per request: streaming. Without it, Triton's ``infer`` endpoint works over HTTP too.
    """

    name: str
    instance: InstanceSettings = field(default_factory=InstanceSettings)
    instance_count: int = 1
    gpus: tuple[int, ...] | None = None
    max_batch_size: int = 0
    decoupled: bool = True

    def __post_init__(self) -> None:
        usable = self.name and not self.name.startswith(".") and all(c.isalnum() or c in "_-." for c in self.name)
        if not (usable and self.name.isascii()):
            raise ValueError(f"name: expected letters, digits, '_', '-' and '.', got {self.name!r}")
        if self.instance_count < 1:
            raise ValueError(f"instance_count: expected a positive number, got {self.instance_count}")
        if self.max_batch_size < 0:
            raise ValueError(f"max_batch_size: expected a number of at least 0, got {self.max_batch_size}")
        if self.gpus is not None and (not self.gpus or any(gpu < 0 for gpu in self.gpus)):
            raise ValueError(f"gpus: expected device numbers, got {self.gpus}")


class _Reader:
    """Typed values of textual parameters; empty ones are as good as missing."""

    def __init__(self, parameters: Mapping[str, str]) -> None:
        self._parameters = parameters

    def integer(self, name: str) -> int | None:
        text = self._parameters.get(name, "")
        try:
            return int(text) if text else None
        except ValueError:
            raise ValueError(f"{name}: expected a whole number, got {text!r}") from None

    def number(self, name: str, default: float) -> float:
        text = self._parameters.get(name, "")
        try:
            return float(text) if text else default
        except ValueError:
            raise ValueError(f"{name}: expected a number, got {text!r}") from None

    def boolean(self, name: str, default: bool) -> bool:
        text = self._parameters.get(name, "").lower()
        if text not in ("", "true", "false", "1", "0"):
            raise ValueError(f"{name}: expected true or false, got {text!r}")
        return text in ("true", "1") if text else default


def _bool_text(value: bool) -> str:
    return "true" if value else "false"
