"""Run the tests with other versions of what the package depends on than those of constraints.txt.

Usage: test_versions.py SET [PYTEST_ARGUMENT ...]

SET is one of

  lowest        of every dependency of the package and its extras the lowest version that pyproject.toml admits
  newest        the newest version of everything
  tensorrt-llm  what TensorRT-LLM pins, which the extra of that name shares an environment with

With the first and the last, the test tools are those of constraints.txt. The environment is kept in build/versions/SET;
--python chooses its interpreter. PyTorch is the build that the package index has (on Linux of x86-64 one for CUDA, some
gigabytes). Exit code: pytest's, or 2 where an environment cannot be made. Standard library only; it installs uv.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "build" / "versions"
RUNTIME_EXTRAS = ("eval", "gguf", "guided", "load", "serve")
"""Extras that are the product's, and whose packages the tests need."""

OLD_NUMPY = ("pyarrow<22",)
"""What goes with NumPy 1 and does not say so."""

TENSORRT_LLM = (
    *OLD_NUMPY,
    "datasets==3.1.0",
    "fastapi>=0.120.1,<=0.121.3",
    "numpy<2",
    "onnx>=1.18,<1.20",
    "setuptools<80",
    "torch==2.9.0",
    "transformers==4.57.1",
)
"""From its requirements, of release 1.2: what both it and this package or its tests need."""


def package_name(requirement: str) -> str:
    """Normalized name of the package that a requirement asks for."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise ValueError(f"requirement: expected a package's name first, got {requirement!r}")
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def declared(project: Path, extras: Iterable[str] = ()) -> set[str]:
    """Packages that pyproject.toml names as dependencies of some extras, or without them of the package."""
    table = tomllib.loads(project.read_text())["project"]
    requirements = [part for extra in extras for part in table["optional-dependencies"][extra]]
    return {package_name(part) for part in requirements or table["dependencies"]} - {table["name"]}


def pins_of(names: Iterable[str], file: Path) -> list[str]:
    """Lines of a constraints file about packages of ``names``."""
    chosen = set(names)
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return [line for line in lines if package_name(line) in chosen]


class Environment:
    """A virtual environment that uv fills."""

    def __init__(self, directory: Path, interpreter: str) -> None:
        self.directory = directory
        self.python = directory / "bin" / "python"
        if not self.python.exists():
            _call(interpreter, "-m", "venv", directory)
            _call(self.python, "-m", "pip", "install", "--quiet", "uv", "setuptools>=77", "wheel")

    def uv(self, *arguments: str | Path) -> None:
        """Run ``uv pip`` for this environment."""
        _call(self.python, "-m", "uv", "pip", *arguments, "--python", self.python, "--quiet")

    def lowest(self, names: Iterable[str], tools: Sequence[str]) -> list[str]:
        """The lowest versions of ``names`` that pyproject.toml admits and that go together, and with the test tools."""
        pins = self.directory / "lowest.txt"
        constraints = self._constraints(tools)
        options = ("--resolution", "lowest-direct", "--no-annotate", "--no-header", "--output-file", pins)
        self.uv("compile", ROOT / "pyproject.toml", "--extra", "test", "--constraint", constraints, *options)
        return pins_of(names, pins)

    def install(self, constraints: Sequence[str]) -> None:
        """The package with its tests' dependencies."""
        upgrade = () if constraints else ("--upgrade",)
        self.uv("install", "--constraint", self._constraints(constraints), *upgrade, "--editable", f"{ROOT}[test]")

    def _constraints(self, lines: Sequence[str]) -> Path:
        file = self.directory / "constraints.txt"
        file.write_text("".join(f"{line}\n" for line in lines))
        return file


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("set", choices=("lowest", "newest", "tensorrt-llm"))
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment")
    options, pytest = parser.parse_known_args(arguments)
    project = ROOT / "pyproject.toml"
    runtime = declared(project) | declared(project, RUNTIME_EXTRAS)
    tools = pins_of(declared(project, ["test"]) - runtime, ROOT / "constraints.txt")
    try:
        environment = Environment(ENVIRONMENTS / options.set, options.python)
        if options.set == "lowest":
            environment.install([*environment.lowest(runtime, tools), *tools, *OLD_NUMPY])
        elif options.set == "newest":
            environment.install([])
        else:
            environment.install([*TENSORRT_LLM, *tools])
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        print(f"hint: what went wrong is above; build/versions/{options.set} may be removed", file=sys.stderr)
        return 2
    parallel = ("-n", "auto", "--dist", "loadfile")
    return subprocess.run([environment.python, "-m", "pytest", *parallel, *pytest], cwd=ROOT, check=False).returncode


def _call(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
