"""One process's place among those that compute an engine's steps together."""

from __future__ import annotations

from dataclasses import dataclass

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig
from minicache_trt.engine_directory import EngineInfo
from minicache_trt.parallel.collectives import ALONE, Collectives
from minicache_trt.parallel.shard import WHOLE, Shard, shard_model, shard_plan


@dataclass(frozen=True)
class Rank:
    """A share of the model and the way to the other ranks."""

    shard: Shard
    collectives: Collectives

    def model(self, whole: ModelConfig) -> ModelConfig:
        """This rank's share of a model's shape."""
        return shard_model(whole, self.shard)

    def plan(self, info: EngineInfo) -> CompressionPlan:
        """The plan for this rank's heads."""
        return shard_plan(info.plan, info.model, self.shard)


ONE_RANK = Rank(WHOLE, ALONE)
