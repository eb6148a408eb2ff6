"""Finding a kernel library, and what is said when it is not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minicache_trt.errors import UserError
from minicache_trt.kernels import locate
from minicache_trt.kernels.library import KernelLibrary
from minicache_trt.kernels.locate import LIBRARIES, LIBRARY_VARIABLE, find_library, open_library, runs_on


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(locate, "_BUILD", tmp_path / "build")
    monkeypatch.setattr(locate, "_PACKAGE", tmp_path / "package")
    (tmp_path / "build").mkdir()
    (tmp_path / "package").mkdir()
    return tmp_path


def test_variable_then_build_then_package(
    nothing_built: Path, host_library: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_library("host") is None
    for folder in ("package", "build", "named"):
        (nothing_built / folder).mkdir(exist_ok=True)
        path = shutil.copy(host_library.path, nothing_built / folder / LIBRARIES["host"])
        if folder == "named":
            monkeypatch.setenv(LIBRARY_VARIABLE, str(nothing_built / folder))
            assert find_library("host") == path
            monkeypatch.setenv(LIBRARY_VARIABLE, str(path))
        assert find_library("host") == path
        assert open_library("host").path == path
    assert find_library("cuda") is None


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_missing_library_is_one_line_and_a_command(nothing_built: Path, kind: str) -> None:
    with pytest.raises(UserError) as error:
        open_library(kind)
    assert LIBRARIES[kind] in error.value.cause and "build_plugins.sh" in error.value.remedy


def test_wrong_libraries_are_refused(
    nothing_built: Path, host_library: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(host_library.path, nothing_built / "build" / LIBRARIES["cuda"])
    with pytest.raises(UserError, match="holds the host kernels, expected the cuda kernels"):
        open_library("cuda")
    (nothing_built / "package" / LIBRARIES["host"]).write_bytes(b"no library")
    with pytest.raises(UserError, match="cannot be loaded"):
        open_library("host")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(nothing_built / "absent.so"))
    with pytest.raises(UserError, match=LIBRARY_VARIABLE):
        open_library("host")


def test_another_version_is_refused(
    nothing_built: Path, host_library: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(host_library.path, nothing_built / "build" / LIBRARIES["host"])
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9.9")
    with pytest.raises(UserError, match=r"is of version 0\.1\.0, this package of 9\.9\.9"):
        open_library("host")


@pytest.mark.parametrize(
    ("targets", "capability", "expected"),
    [
        ("sm_80 sm_86 sm_89 sm_90a sm_100 sm_120", (8, 0), True),
        ("sm_80 sm_86 sm_89 sm_90a sm_100 sm_120", (8, 7), True),
        ("sm_80 sm_86 sm_89 sm_90a sm_100 sm_120", (9, 0), True),
        ("sm_80 sm_86 sm_89 sm_90a sm_100 sm_120", (10, 3), True),
        ("sm_80 sm_86 sm_89 sm_90a sm_100 sm_120", (11, 0), False),
        ("sm_80 sm_86 sm_89 sm_90a sm_100 sm_120", (13, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (10, 0), False),
        ("sm_90a", (8, 0), False),
        ("sm_86", (8, 0), False),
        ("", (8, 0), False),
    ],
)
def test_which_gpus_a_library_has_code_for(targets: str, capability: tuple[int, int], expected: bool) -> None:
    assert runs_on(f"0.1.0 cuda {targets}", capability) == expected
