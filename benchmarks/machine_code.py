"""What do the loops of the kernels' machine code consist of?

`instructions.py` counts instructions of PTX as they are run; ptxas makes machine code of them, which may hold more
(moves of registers, divisions with their rare cases) or less. Compiles a source for one GPU and disassembles it:
nothing is run, and no GPU is needed. Of nested loops, the outer ones include the inner ones.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import common
import typer
from kernel_names import kernel_names
from reporting import JsonFile, write_report

from minicache_trt.errors import UserError

SOURCES = ("append_kv", "compress_blocks", "restore_blocks", "decode_attention", "prefill_attention")
KINDS = {
    "tensor": re.compile(r"[HIQD]?MMA|[HI]GMMA"),
    "moves": re.compile(r"U?MOV|IMAD\.MOV|CS2R|S2U?R|R2UR|SHFL"),
    "shared": re.compile(r"LDSM?\b|STSM?\b|LDGSTS"),
    "memory": re.compile(r"LDG?\b|STG?\b|LDL|STL|ULDC|LDC|ATOM|RED"),
    "special": re.compile(r"MUFU|F2I|I2F\b|FRND|F2F\b"),
    "float": re.compile(r"[FH](ADD|MUL|FMA|MNMX|SEL|SET|CHK|SWZADD)|H(ADD2|MUL2|FMA2)|F2FP|I2FP"),
    "control": re.compile(r"BRA|BRX|BSSY|BSYNC|BAR|CALL|RET|EXIT|WARPSYNC|NOP|DEPBAR|LDGDEPBAR"),
}
"""Kinds of instructions by how their names begin, the first that fits; what fits none is integer."""
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
LABEL = re.compile(r"(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass
class Loop:
    """Instructions ``first`` to ``last`` of a kernel, by kind."""

    kernel: str
    first: int
    last: int
    kinds: dict[str, int] = field(default_factory=dict)

    def cells(self) -> list[object]:
        size = self.last - self.first + 1
        return [self.kernel, self.first, size, *(self.kinds.get(kind, 0) for kind in (*KINDS, "integer"))]


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if pattern.match(name)), "integer")


def loops_of(kernel: str, code: str) -> Iterator[Loop]:
    """Loops of a kernel's disassembly: from the target of a backward branch to the branch."""
    names: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in code.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label.group(1)] = len(names)
        elif instruction := INSTRUCTION.search(line):
            target = TARGET.search(instruction.group(2))
            if instruction.group(1).startswith("BRA") and target:
                branches.append((len(names), target.group(1)))
            names.append(instruction.group(1))
    for last, target in branches:
        first = labels.get(target, len(names))
        if first < last:  # a branch to itself ends the code
            yield Loop(kernel, first, last, dict(Counter(map(kind_of, names[first : last + 1]))))


def kernels_of(disassembly: str) -> Iterator[tuple[str, str]]:
    """Name and code of every kernel."""
    for section in re.split(r"\n(?=\s*\.section\s+\.text\.)", disassembly):
        if name := re.match(r'\s*\.section\s+\.text\.([^,\s"]+)', section):
            yield name.group(1), section


def nvdisasm() -> Path:
    """NVIDIA's disassembler, of the toolkit or of its package on PyPI."""
    if found := shutil.which("nvdisasm"):
        return Path(found)
    package = find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        for path in Path(folder).glob("cu*/bin/nvdisasm"):
            if not os.access(path, os.X_OK):  # as some installers leave it
                path.chmod(path.stat().st_mode | 0o111)
            return path
    raise UserError("nvdisasm is missing", "pip install nvidia-cuda-nvdisasm, or install the CUDA toolkit")


def disassemble(source: str, arch: str) -> str:
    plugins = common.REPOSITORY / "plugins"
    with tempfile.TemporaryDirectory(prefix="minicache-trt-") as folder:
        cubin = Path(folder) / f"{source}.cubin"
        compiler = shutil.which("nvcc") or f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"
        include = [f"-I{plugins / name}" for name in ("include", "src")]
        command = [compiler, "-std=c++17", f"-arch={arch}", "-cubin", "-O3", *include, "-o", cubin]
        try:
            compiled = subprocess.run(
                [*command, plugins / "src" / f"{source}.cu"], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise UserError("nvcc is missing", "install the CUDA toolkit and put nvcc on PATH") from error
        if compiled.returncode != 0:
            raise UserError(f"nvcc cannot compile {source} for {arch}", compiled.stderr.strip().rpartition("\n")[2])
        return subprocess.run([nvdisasm(), "-c", cubin], capture_output=True, text=True, check=True).stdout


def main(
    source: Annotated[str, typer.Argument(help=f"One of {', '.join(SOURCES)}.")] = "compress_blocks",
    kernel: Annotated[str, typer.Option(help="Only kernels with this in their names.")] = "Half",
    arch: Annotated[str, typer.Option(help="Of the GPU, as nvcc names it.")] = "sm_90a",
    least: Annotated[int, typer.Option(min=1, help="Instructions of the smallest loop that is shown.")] = 32,
    json_file: JsonFile = None,
) -> None:
    """Loops of the kernels' machine code, instructions by kind."""
    if source not in SOURCES:
        raise UserError(f"unknown source {source!r}", f"sources: {', '.join(SOURCES)}")
    kernels = dict(kernels_of(disassemble(source, arch)))
    loops = [
        loop
        for name, code in zip(kernel_names([*kernels]), kernels.values(), strict=True)
        if kernel in name
        for loop in loops_of(name, code)
        if loop.last - loop.first + 1 >= least
    ]
    columns = ("kernel", "from", "instructions", *KINDS, "integer")
    title = f"Loops of {source}'s machine code, {arch}"
    write_report(title, columns, [loop.cells() for loop in loops], [asdict(loop) for loop in loops], json_file)


if __name__ == "__main__":
    common.run(main)
