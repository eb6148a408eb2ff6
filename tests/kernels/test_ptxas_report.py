"""The report on a build's kernels."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.support.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "build_scripts" / "ptxas_report.py"

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9minicache5enterINS_6DecodeIiLi64EEEPiEEvT0_' for 'sm_80'
ptxas info    : Function properties for _ZN9minicache5enterINS_6DecodeIiLi64EEEPiEEvT0_
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 400 bytes cmem[0], 24 bytes smem
ptxas info    : Compile time = 12.000 ms
ptxas info    : Compiling entry function '_ZN9minicache5enterINS_6DecodeIiLi128EEEPiEEvT0_' for 'sm_80'
ptxas info    : Function properties for helper
    96 bytes stack frame, 40 bytes spill stores, 40 bytes spill loads
ptxas info    : Function properties for _ZN9minicache5enterINS_6DecodeIiLi128EEEPiEEvT0_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 0 barriers, 352 bytes cmem[0]
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT)


def write(folder: Path, stack: int, stores: int, loads: int) -> Path:
    (folder / "a.cu.o.ptxas").write_text(REPORT.format(stack=stack, stores=stores, loads=loads), encoding="utf-8")
    return folder


def test_every_number_is_read(script: ModuleType) -> None:
    first, second = script.parse(REPORT.format(stack=32, stores=8, loads=16))
    assert (first.target, first.registers, first.shared) == ("sm_80", 128, 24)
    assert (first.stack, first.spill_stores, first.spill_loads) == (32, 8, 16)
    assert (second.registers, second.shared, second.stack, second.spills) == (168, 0, 0, 0)


def test_names_are_those_of_the_sources(script: ModuleType) -> None:
    name = "void minicache::enter<minicache::Decode<minicache::Half, 64>, minicache::Arguments>(minicache::Arguments)"
    assert script._short(name) == "Decode<Half, 64>"
    assert script._short("void other<int>(int)") == "void other<int>(int)"
    names = script.demangled([usage.symbol for usage in script.parse(REPORT)])
    assert names[0] in ("Decode<int, 64>", script.parse(REPORT)[0].symbol)


def test_table_shows_the_worst_instantiation(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(write(tmp_path, 0, 0, 0))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].split()[-5:] == ["2", "168", "0", "0", "24"]
    assert script.main([str(tmp_path), "--each"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_spills_of_hot_kernels_fail(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 32, 8, 16)
    assert script.main([str(tmp_path)]) == 1
    assert "spills 24 bytes on sm_80" in capsys.readouterr().err
    assert script.main([str(tmp_path), "--hot", "restore"]) == 0


def test_a_folder_without_reports_is_an_error(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(tmp_path)]) == 2
    assert "build_plugins.sh" in capsys.readouterr().err
