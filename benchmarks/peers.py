"""Sets up onnxruntime-genai in an environment of its own and exports a checkpoint with it, beside our own build.

Prints what ``minicache-trt bench --against onnxruntime-genai`` is to be given. The environment is made once and then
reused; the exports are made anew.
"""

from __future__ import annotations

import dataclasses
import json as json_module
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from common import CACHE_DIR, REPOSITORY, CacheDir, Shape, random_llama, run
from costs import Cost, build_cost, cost_of
from reporting import JsonFile, write_report
from tokenizers import Tokenizer, models

from minicache_trt.benchmark.peers import GENAI_ENVIRONMENT
from minicache_trt.cli.console import stderr
from minicache_trt.errors import UserError
from minicache_trt.units import format_bytes

GENAI_VERSION = "0.18.0"
REQUIREMENTS = (f"onnxruntime-genai=={GENAI_VERSION}", "onnx", "onnx-ir", "torch==2.13.0", "transformers", "numpy")
OPTIONS = {"fp32": [], "int4": ["--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]}
"""By weight format: what the builder is told beyond its precision; int4 as ours."""

ENVIRONMENT = REPOSITORY / GENAI_ENVIRONMENT
EXPORTS = ENVIRONMENT.parent / "models"

EnvironmentDir = Annotated[Path, typer.Option("--environment", help="Virtual environment of onnxruntime-genai.")]
ExportDir = Annotated[Path, typer.Option("--exports", help="Folder for its exports.")]
PipArgs = Annotated[str, typer.Option(help="Further arguments of pip install, such as an index of CPU-only wheels.")]


def environment(directory: Path, pip_args: str = "") -> Path:
    """The Python of an environment with onnxruntime-genai and what its builder needs; made when it is not there.

    Raises
    ------
    UserError
        It cannot be installed.
    """
    python = directory / "bin" / "python"
    probe = "import onnxruntime_genai as og, torch, onnx_ir, transformers; print(og.__version__)"
    if python.exists():
        found = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.strip() == GENAI_VERSION:
            return python
    stderr.print(f"installing {', '.join(REQUIREMENTS)} in {directory}")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    command = [python, "-m", "pip", "install", "--quiet", *REQUIREMENTS, *pip_args.split()]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"cannot install onnxruntime-genai in {directory}", "see what pip said")
    return python


def export(python: Path, checkpoint: Path, output: Path, weights: str) -> Cost:
    """Export a checkpoint with the builder of onnxruntime-genai, replacing an earlier export, and measure it."""
    shutil.rmtree(output, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        source = checkpoint
        if not (checkpoint / "tokenizer.json").exists() and not (checkpoint / "tokenizer.model").exists():
            source = _with_tokenizer(checkpoint, Path(temporary))
        builder = [str(python), "-m", "onnxruntime_genai.models.builder"]
        places = ["-i", str(source), "-o", str(output), "-c", temporary]
        return cost_of([*builder, *places, "-p", weights, "-e", "cpu", *OPTIONS[weights]], output, None)


def _with_tokenizer(checkpoint: Path, directory: Path) -> Path:
    """Links to a checkpoint beside a tokenizer of special tokens alone: the builder demands one with an end token."""
    for file in checkpoint.iterdir():
        os.symlink(file.resolve(), directory / file.name)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    words = models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")
    Tokenizer(words).save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (directory / "tokenizer_config.json").write_text(json_module.dumps(settings))
    return directory


def costs(python: Path, checkpoint: Path, exports: Path, weights: str) -> tuple[Path, dict[str, Cost]]:
    """Where the export is, and what it took, beside our build of the same checkpoint."""
    stderr.print(f"exporting {checkpoint.name}, {weights}")
    output = exports / f"{checkpoint.name}-{weights}"
    theirs = export(python, checkpoint, output, weights)
    with tempfile.TemporaryDirectory(dir=exports) as temporary:
        arguments = ["--model", str(checkpoint), "--method", "full", "--weights", weights]
        ours = build_cost(arguments, Path(temporary, "engine"), checkpoint)
    return output, {"minicache-trt": ours, "onnxruntime-genai": theirs}


def cost_row(name: str, weights: str, cost: Cost) -> list[object]:
    return [name, weights, f"{cost.seconds:.2f} s", format_bytes(cost.peak_bytes), format_bytes(cost.added_bytes)]


COST_COLUMNS = ("contender", "weights", "time", "peak memory", "added on disk")


def main(
    checkpoint: Annotated[Path | None, typer.Option(help="Default: a random Llama.")] = None,
    weights: Annotated[str, typer.Option(help="Comma-separated: fp32, int4.")] = "fp32,int4",
    environment_dir: EnvironmentDir = ENVIRONMENT,
    exports: ExportDir = EXPORTS,
    pip_args: PipArgs = "",
    cache_dir: CacheDir = CACHE_DIR,
    json: JsonFile = None,
) -> None:
    """Set up onnxruntime-genai, export a checkpoint, and print what that and our own build took."""
    formats = weights.split(",")
    if unknown := [name for name in formats if name not in OPTIONS]:
        raise UserError(f"--weights: unknown format {unknown[0]!r}", f"formats: {', '.join(OPTIONS)}")
    python = environment(environment_dir, pip_args)
    source = checkpoint or random_llama(cache_dir, Shape())
    exports.mkdir(parents=True, exist_ok=True)
    rows, results = [], []
    for name in formats:
        output, taken = costs(python, source, exports, name)
        for contender, cost in taken.items():
            rows.append(cost_row(contender, name, cost))
            results.append({"contender": contender, "weights": name, **dataclasses.asdict(cost)})
        stderr.print(f"--peer-python {python} --peer-model {output}")
    write_report(f"Building {source.resolve().name}", COST_COLUMNS, rows, results, json)


if __name__ == "__main__":
    run(main)
