"""Options that docs/migration.md names as ours exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from minicache_trt.cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
SECTIONS = {"trtllm-build": ("build",), "vLLM": ("build", "run"), "onnxruntime-genai": ("build",)}
"""Section to the verbs whose options its tables may name."""


def options_of(*verbs: str) -> set[str]:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {name for verb in verbs for option in commands[verb].params for name in option.opts}


def rows_of(section: str) -> list[list[str]]:
    """Cells of a section's tables, without their heads."""
    text = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert text is not None
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text[1].splitlines() if line.startswith("|")]
    return [row for row in rows[2:] if len(row) == 3]


def flags(cell: str) -> set[str]:
    return {flag.replace("_", "-") for flag in re.findall(r"--[a-z][\w-]*", cell)}


@pytest.mark.parametrize("section", SECTIONS)
def test_options_exist(section: str) -> None:
    known, rows = options_of(*SECTIONS[section]), rows_of(section)
    assert len(rows) > 3
    for theirs, ours, note in rows:
        named = flags(ours) | (flags(theirs) if ours.startswith("the same") else set())
        assert named <= known, (section, theirs, named - known)
        assert ours or note
