"""From a network to an engine file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

from minicache_trt.backends.tensorrt.network import Network
from minicache_trt.backends.tensorrt.options import TensorRtOptions
from minicache_trt.backends.tensorrt.profiles import Profile
from minicache_trt.backends.tensorrt.progress import make_progress_monitor
from minicache_trt.engine_writer import Report
from minicache_trt.errors import UserError

Shapes = Mapping[str, Sequence[str | int]]


def build_engine_file(
    network: Network,
    path: Path,
    profiles: Sequence[Profile],
    shapes: Shapes,
    options: TensorRtOptions,
    plugins: Path | None,
    report: Report,
    stop: Event,
) -> None:
    """Build an engine and write it, piece by piece where the module can.

    Parameters
    ----------
    network : Network
    path : Path
    profiles : sequence of Profile
        Becomes optimization profiles 0, 1, ...
    shapes : mapping
        Symbolic shape of every input.
    options : TensorRtOptions
    plugins : Path, optional
        Library to put into the engine.
    report : callable
    stop : Event
        Ends the build, with an error, once another thread sets it.

    Raises
    ------
    UserError
        TensorRT cannot build it, and why.
    """
    config = network.builder.create_builder_config()
    for profile in profiles:
        config.add_optimization_profile(_optimization_profile(network, profile, shapes))
    _set_flags(network.trt, config, options)
    if plugins is not None:
        config.plugins_to_serialize = [str(plugins)]
    # The builder calls it as long as it builds.
    monitor = make_progress_monitor(network.trt, report, path.stem, network.weights.release, stop)
    config.progress_monitor = monitor
    cache = _load_timing_cache(config, options.timing_cache)
    try:
        written = _write(network, config, path)
    except (RuntimeError, MemoryError) as error:
        raise _cannot_build(network, path, str(error)) from error
    if not written or not path.stat().st_size:
        raise _cannot_build(network, path, "no reason given")
    if cache is not None and options.timing_cache is not None:
        options.timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))


def _write(network: Network, config: Any, path: Path) -> bool:
    """Through a stream where there is one: the engine is then never in memory as a whole."""
    trt, builder = network.trt, network.builder
    with path.open("wb") as file:
        if not hasattr(builder, "build_serialized_network_to_stream"):
            plan = builder.build_serialized_network(network.definition, config)
            if plan is not None:
                file.write(plan)
            return plan is not None
        writer = _make_writer(trt, file, network.weights.release)
        done = builder.build_serialized_network_to_stream(network.definition, config, writer)
        if writer.failure is not None:
            raise writer.failure
        return bool(done)


def _make_writer(trt: Any, file: BinaryIO, written: Callable[[], None]) -> Any:
    """A stream of the module that writes to a file; its ``failure`` is what the file refused.

    ``written``: called after each piece.
    """

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.failure: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                file.write(data)
            except OSError as error:  # must not cross the library's frames
                self.failure = error
                return 0
            written()
            return len(data)

    return Writer()


def _optimization_profile(network: Network, profile: Profile, shapes: Shapes) -> Any:
    result = network.builder.create_optimization_profile()
    for tensor in network.inputs():
        smallest, usual, largest = profile.shapes(shapes[tensor.name])
        result.set_shape(tensor.name, smallest, usual, largest)
    return result


def _set_flags(trt: Any, config: Any, options: TensorRtOptions) -> None:
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    wanted = {"VERSION_COMPATIBLE": options.version_compatible, "WEIGHT_STREAMING": options.weight_streaming}
    for name, value in wanted.items():
        if value:
            config.set_flag(getattr(trt.BuilderFlag, name))
    tf32 = getattr(trt.BuilderFlag, "TF32", None)
    if tf32 is not None:
        # Attention computes in float32 so that no precision is lost there.
        config.clear_flag(tf32)


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"--timing-cache: {path}: {error.strerror}") from error
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise UserError(
            f"--timing-cache: {path} is of another TensorRT or GPU", "name another file, or remove this one"
        )
    return cache


def _cannot_build(network: Network, path: Path, otherwise: str) -> UserError:
    return UserError(
        f"TensorRT cannot build {path.name}: {network.messages.first(otherwise)}",
        "build with smaller limits, or for another --backend",
    )
