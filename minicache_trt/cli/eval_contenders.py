"""Which engines ``minicache-trt eval`` compares: the one that is there, and those it builds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minicache_trt.compression.methods import CALIBRATED_METHODS, MERGING_METHODS, MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.plan_json import load_plan
from minicache_trt.config import CALIBRATED_WEIGHTS, WEIGHT_BITS, BuildConfig, ModelConfig
from minicache_trt.engine_directory import CHECKPOINT, EngineInfo, read_engine
from minicache_trt.errors import UserError
from minicache_trt.quantization.store import WeightOptions, codes_of

if TYPE_CHECKING:
    from minicache_trt.evaluation.contenders import Contender
    from minicache_trt.evaluation.tasks import Settings


@dataclass(frozen=True)
class Chosen:
    """The flags that say which engines are built."""

    methods: tuple[str, ...]
    plans: tuple[Path, ...]
    merge_start: int | None
    formats: tuple[str, ...] | None
    groups: tuple[int, ...] | None
    weights: WeightOptions
    batch_size: int
    backend: str | None

    def sizes(self, build: BuildConfig) -> tuple[int, ...]:
        """Group sizes of a weight format."""
        return (build.group_size,) if self.groups is None or build.weights not in WEIGHT_BITS else self.groups

    def plan(self, method: str, config: ModelConfig, checkpoint: Path) -> CompressionPlan:
        """A named method's plan, calibrated where it must be."""
        merging = MethodOptions(merge_start=self.merge_start if method in MERGING_METHODS else None)
        found = make_plan(config, method, merging)
        if method not in CALIBRATED_METHODS:
            return found
        if self.weights.text is None:
            raise UserError(f"method {method!r} needs text to calibrate on", "give --calibration-text FILE")
        from minicache_trt.compression.smoothquant import key_scales, with_scales

        return with_scales(found, key_scales(checkpoint, config, self.weights.text, lambda done, total: None))


def contenders_of(
    engine: Path | None, model: str | None, revision: str | None, chosen: Chosen, settings: Settings
) -> list[Contender]:
    """Full first, then the engine as it is, the methods and the plans."""
    from minicache_trt.checkpoint.resolve import load_checkpoint
    from minicache_trt.evaluation.contenders import FULL, Contender, build_for

    if (engine is None) == (model is None):
        raise UserError("expected --engine or --model, and not both")
    info = None if engine is None else read_engine(engine)
    like = info.build if info else BuildConfig()
    like = replace(like, backend=chosen.backend or like.backend)
    try:
        formats = [replace(like, weights=weights) for weights in chosen.formats or (like.weights,)]
        formats = [replace(build, group_size=size) for build in formats for size in chosen.sizes(build)]
        builds = [build_for(settings.longest, chosen.batch_size, build) for build in formats]
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from error
    rows: list[Contender] = []
    if engine is not None and info is not None:
        _check_engine(engine, info, settings)
        checkpoint, config = engine / CHECKPOINT, info.model
        rows.append(Contender(engine.resolve().name, engine, info.plan, None))
    else:
        loaded = load_checkpoint(str(model), revision=revision)
        checkpoint, config = loaded.directory, loaded.config
    if settings.longest > config.max_position_embeddings:
        raise UserError(
            f"sequences of {settings.longest} tokens are beyond the model's {config.max_position_embeddings} positions",
            "lower --length and --lengths",
        )
    named = [name for name in chosen.methods if name != FULL]
    plans = [(name, chosen.plan(name, config, checkpoint)) for name in (FULL, *named)]
    plans += [(path.stem, load_plan(path).validate(config)) for path in chosen.plans]
    built = [
        Contender(_row(name, build, builds), checkpoint, found, build, _weights(engine, info, build, chosen))
        for build in builds
        for name, found in plans
    ]
    return [built[0], *rows, *built[1:]]


def _row(name: str, build: BuildConfig, builds: list[BuildConfig]) -> str:
    """What a row is called: its method, and its weights where they differ."""
    if len(builds) == 1:
        return name
    sizes = {other.group_size for other in builds if other.weights == build.weights}
    weights = f"{build.weights}-g{build.group_size}" if len(sizes) > 1 else build.weights
    return weights if name == "full" else f"{name}, {weights}"


def _weights(engine: Path | None, info: EngineInfo | None, build: BuildConfig, chosen: Chosen) -> WeightOptions:
    """The codes of the engine that is there, where it has those of the build."""
    same = info is not None and (info.build.weights, info.build.group_size) == (build.weights, build.group_size)
    if engine is not None and same:
        return codes_of(engine)
    if build.weights == CALIBRATED_WEIGHTS and chosen.weights.text is None:
        raise UserError(f"weights {build.weights} need text to calibrate on", "give --calibration-text FILE")
    return chosen.weights


def _check_engine(engine: Path, info: EngineInfo, settings: Settings) -> None:
    if info.source.get("dummy"):
        raise UserError(f"{engine} has dummy weights, so its quality means nothing", "build it from a checkpoint")
    if settings.longest > info.build.max_seq_len:
        raise UserError(
            f"{engine} was built for sequences of {info.build.max_seq_len} tokens, expected {settings.longest}",
            "lower --length and --lengths, or build it with a larger --max-seq-len",
        )
