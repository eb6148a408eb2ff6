"""What an application of replicas is told, and what Ray reserves for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from minicache_trt.config import GPU_BACKENDS, BuildConfig
from minicache_trt.errors import UserError


@dataclass(frozen=True)
class RayConfig:
    """Arguments of `minicache_trt.serving.ray_app.app`.

    Parameters
    ----------
    engine : Path
        Engine directory, where every node finds it.
    replicas : int
    model_name : str, optional
        Default: the directory's.
    max_queue_size : int
        Requests that may wait in a replica beside its batch.
    kv_cache_memory : int, optional
        Bytes for each replica's cache.
    backend : str, optional
        Another one than the engine was built for.
    num_threads : int, optional
        Of each rank of a replica.
    num_cpus : float
        What Ray reserves for each rank of a replica.
    num_gpus : float, optional
        Likewise. Default: 1 for backends that compute on GPUs, otherwise 0.
    imbalance : int
        Requests a replica may have beyond the least loaded one before equal beginnings go elsewhere.
    """

    engine: Path
    replicas: int = 1
    model_name: str | None = None
    max_queue_size: int = 64
    kv_cache_memory: int | None = None
    backend: str | None = None
    num_threads: int | None = None
    num_cpus: float = 1
    num_gpus: float | None = None
    imbalance: int = 8

    def __post_init__(self) -> None:
        for name, least in (("replicas", 1), ("max_queue_size", 0), ("imbalance", 0), ("num_cpus", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected a number of at least {least}, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        return self.model_name or self.engine.resolve().name

    def resources(self, build: BuildConfig) -> dict[str, float]:
        """What Ray reserves for a replica: the shares of all its ranks, which Ray finds on one node for one actor.

        Raises
        ------
        UserError
            A rank has no GPU of its own.
        """
        backend, ranks = self.backend or build.backend, build.tp_size
        gpus = float(backend in GPU_BACKENDS) if self.num_gpus is None else self.num_gpus
        if backend in GPU_BACKENDS and (gpus < 1 if ranks > 1 else gpus <= 0):
            each = "each rank" if ranks > 1 else "a replica"
            raise UserError(f"num_gpus: backend {backend} needs one for {each}, got {gpus:g}", "leave num_gpus out")
        return {"num_cpus": ranks * self.num_cpus, "num_gpus": ranks * gpus}


def read_config(arguments: Mapping[str, Any]) -> RayConfig:
    """Fields of a `RayConfig`; text, as the command line gives it, is converted.

    Raises
    ------
    UserError
        Naming the argument that cannot be used.
    """
    names = [field.name for field in fields(RayConfig)]
    unknown = sorted(arguments.keys() - set(names))
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}", f"there are: {', '.join(names)}")
    try:
        return TypeAdapter(RayConfig).validate_python(dict(arguments))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(": ".join([*map(str, first["loc"]), first["msg"]])) from error
