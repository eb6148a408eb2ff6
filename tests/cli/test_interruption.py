"""Builds that end before their time: what they leave behind, and what becomes of the engine they were to replace."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import minicache_trt.build
import minicache_trt.engine_writer
from minicache_trt.engine_directory import read_engine
from tests.cli.command import Invoke, assert_refused, snapshot

Refused = Callable[..., None]

STAGES = {
    "linking": "link_or_copy",
    "copying": "shutil.copyfile",
    "quantizing": "write_codes",
    "decoder": "build_decoder",
    "compressor": "build_compressor",
    "saving": "ir.save",
    "config": "write_config",
}
"""Functions that `minicache_trt.build` and its writer call, by what they do."""


def _raise_in(monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException, *, late: bool = False) -> None:
    """Make a stage fail: at its start, or when it has done its work."""
    owner = minicache_trt.build if stage == "config" else minicache_trt.engine_writer
    name = STAGES[stage]
    if "." in name:
        module, _, name = name.partition(".")
        owner = getattr(owner, module)
    original = getattr(owner, name)

    def fail(*arguments: Any, **options: Any) -> Any:
        if late:
            original(*arguments, **options)
        raise error

    monkeypatch.setattr(owner, name, fail)


def _no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_disk_full(
    monkeypatch: pytest.MonkeyPatch, refused: Refused, checkpoint: Path, own_engine: Path, stage: str, late: bool
) -> None:
    _raise_in(monkeypatch, stage, _no_space(), late=late)
    flags = ["-m", checkpoint, "--method", "minicache4", "--weights", "int4"]
    refused(["build", *flags, "-o", "new/engine"], "no space left", "free some space")
    refused(["build", *flags, "-o", own_engine, "--force"], "no space left")
    read_engine(own_engine)


@pytest.mark.parametrize("stage", STAGES)
def test_interrupt(
    monkeypatch: pytest.MonkeyPatch, invoke: Invoke, checkpoint: Path, own_engine: Path, workspace: Path, stage: str
) -> None:
    before = snapshot(workspace)
    for output in ("new/engine", own_engine):
        flags = ["-m", checkpoint, "--method", "minicache4", "--weights", "int4", "-o", output, "--force"]
        with monkeypatch.context() as patched:
            _raise_in(patched, stage, KeyboardInterrupt())
            result = invoke("build", *flags)
        assert result.code == 130 and result.out == "" and "Traceback" not in result.err
        assert {name: file for name, file in snapshot(workspace).items() if not _kept(name)} == before
        assert invoke("build", *flags).code == 0
        shutil.rmtree("new", ignore_errors=True)
        assert snapshot(workspace).keys() == before.keys()
        before = snapshot(workspace)


def _kept(name: str) -> bool:
    """Finished weights stay for the next build of the same engine."""
    return name in ("new", "new/.engine.partial", ".engine.partial") or "/.engine.partial/" in f"/{name}"


def test_disk_that_is_really_full(invoke: Invoke, checkpoint: Path, small_disk: Callable[[str], Path]) -> None:
    """On a disk that grows until the build fits: first the weights do not, in the end config.json does not."""
    disk = small_disk("size=64k")
    flags = ["-m", checkpoint, "-o", disk / "new/engine", "--weights", "int8"]
    size, refusals = (checkpoint / "model.safetensors").stat().st_size // 1024 - 8, 0
    while (result := invoke("build", *flags)).code:
        assert_refused(result, f"no space left on the disk of {disk}/new")
        assert not any(disk.iterdir())
        subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
        size, refusals = size + 20, refusals + 1
    assert refusals > 8
    read_engine(disk / "new/engine")


def test_copy_on_another_disk(invoke: Invoke, checkpoint: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=4m")
    result = invoke("build", "-m", checkpoint, "-o", disk / "engine")
    assert result.code == 0 and "the weights were copied" in result.err
    assert (disk / "engine/checkpoint/model.safetensors").stat().st_nlink == 1
    assert invoke("inspect", "-e", disk / "engine").code == 0


def test_stdout_that_is_full() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [sys.executable, "-c", "from minicache_trt.cli import main; main()", "plan", "-m", "llama2-7b"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.returncode == 2 and process.stderr == "error: No space left on device\n"


def test_rename_that_fails(
    monkeypatch: pytest.MonkeyPatch, refused: Refused, checkpoint: Path, own_engine: Path
) -> None:
    """The old engine is already out of the way when the new one cannot take its place."""
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "engine" and path != own_engine:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    refused(["build", "-m", checkpoint, "-o", own_engine, "--force"], "cannot build", "Input/output error")
    read_engine(own_engine)


def test_old_engine_is_usable_until_the_new_one_is_complete(
    monkeypatch: pytest.MonkeyPatch, invoke: Invoke, checkpoint: Path, own_engine: Path
) -> None:
    write_config, before, seen = minicache_trt.build.write_config, snapshot(own_engine), []

    def check(*arguments: Any) -> None:
        write_config(*arguments)
        read_engine(own_engine)
        seen.append(snapshot(own_engine))

    monkeypatch.setattr(minicache_trt.build, "write_config", check)
    assert invoke("build", "-m", checkpoint, "-o", own_engine, "--force", "--method", "full").code == 0
    assert seen == [before]
    assert read_engine(own_engine).plan.method == "full"
    assert [path.name for path in own_engine.parent.iterdir()] == ["engine"]


def test_engine_that_appears_meanwhile(
    monkeypatch: pytest.MonkeyPatch, invoke: Invoke, engine: Path, checkpoint: Path, workspace: Path
) -> None:
    """Another build was faster: its engine stays."""
    write_config = minicache_trt.build.write_config

    def copy_engine(*arguments: Any) -> None:
        write_config(*arguments)
        shutil.copytree(engine, workspace / "engine")

    monkeypatch.setattr(minicache_trt.build, "write_config", copy_engine)
    assert_refused(invoke("build", "-m", checkpoint, "-o", "engine"), "an engine is already there")
    assert snapshot(workspace / "engine") == snapshot(engine)
    assert [path.name for path in workspace.iterdir()] == ["engine"]


def test_output_that_is_a_link(invoke: Invoke, checkpoint: Path, own_engine: Path, workspace: Path) -> None:
    (workspace / "latest").symlink_to("engine")
    (workspace / "next").symlink_to("not-yet-there")
    assert invoke("build", "-m", checkpoint, "-o", "latest", "--force", "--method", "full").code == 0
    assert (workspace / "latest").is_symlink() and read_engine(own_engine).plan.method == "full"
    assert invoke("build", "-m", checkpoint, "-o", "next").code == 0
    assert (workspace / "next").is_symlink() and read_engine(workspace / "not-yet-there")


_BUILDS_THAT_STOP = r"""
import os, signal, sys, time
import minicache_trt.build
import minicache_trt.engine_writer
from minicache_trt.cli import main

# A test run in the background of a shell inherits an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

def stop(*_):
    print(f"{name} {os.getpid()}\n", end="", flush=True)
    time.sleep(100)

minicache_trt.build.write_config = stop
model, *outputs = sys.argv[1:]
children = {}
for name in outputs:
    child = os.fork()
    if not child:
        sys.argv = ["minicache-trt", "build", "-m", model, "-o", name + "/engine"]
        main()
    children[child] = name
while children:
    child, status = os.wait()
    print(children.pop(child), os.waitstatus_to_exitcode(status), flush=True)
"""
"""Builds, each a process, that say who they are and wait just before they are complete; then, how they ended."""

SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}
"""Exit codes of the builds that get them."""


@pytest.fixture
def stopped_builds(workspace: Path, checkpoint: Path) -> Iterator[subprocess.Popen[str]]:
    builds = subprocess.Popen(
        [sys.executable, "-c", _BUILDS_THAT_STOP, str(checkpoint), *SIGNALS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield builds
    with suppress(ProcessLookupError):
        os.killpg(builds.pid, signal.SIGKILL)
    builds.communicate()


def _read_lines(process: subprocess.Popen[str]) -> dict[str, int]:
    assert process.stdout is not None
    lines = [process.stdout.readline().split() for _ in SIGNALS]
    return {name: int(number) for name, number in lines}


def test_signals(stopped_builds: subprocess.Popen[str], workspace: Path, invoke: Invoke, checkpoint: Path) -> None:
    processes = _read_lines(stopped_builds)
    # While it runs, a build's directory is its own: a second build in the same place leaves it alone.
    (running,) = (workspace / "SIGKILL").iterdir()
    assert invoke("build", "-m", checkpoint, "-o", "SIGKILL/other").code == 0
    assert {path.name for path in (workspace / "SIGKILL").iterdir()} == {running.name, "other"}

    for name, process in processes.items():
        os.kill(process, signal.Signals[name])
    assert _read_lines(stopped_builds) == SIGNALS
    assert stopped_builds.communicate()[1] == ""
    assert not (workspace / "SIGINT").exists() and not (workspace / "SIGTERM").exists()
    # Nobody can clean up after SIGKILL but the next build.
    assert running.is_dir() and not (workspace / "SIGKILL/engine").exists()
    assert invoke("build", "-m", checkpoint, "-o", "SIGKILL/engine").code == 0
    assert {path.name for path in (workspace / "SIGKILL").iterdir()} == {"engine", "other"}
