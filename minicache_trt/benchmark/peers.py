"""Other programs that generate from the same checkpoint, each a process of its own, so that its memory is its own.

A worker is spoken to in lines of JSON. It first says ``{"name", "version", "settings"}``; then each request
``{"prompts": [[int]], "new_tokens": int}`` is answered with the fields of `Timings`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicache_trt.benchmark.timings import Timings
from minicache_trt.checkpoint.source import INT4_MARK
from minicache_trt.checkpoint.weights import read_json_object
from minicache_trt.config import ModelConfig
from minicache_trt.engine_directory import CHECKPOINT
from minicache_trt.errors import UserError

PEERS = ("hf", "onnxruntime-genai", "tensorrt-llm")
GENAI_ENVIRONMENT = Path("build", "peers", "onnxruntime-genai")
"""Where ``benchmarks/peers.py`` puts onnxruntime-genai, relative to the repository."""
_SETUP = "set it up with python benchmarks/peers.py, or name another with"
_WORKER = Path(__file__).with_name("genai.py")
_TENSORRT_LLM_WORKER = Path(__file__).with_name("trtllm.py")


@dataclass(frozen=True)
class PeerCommand:
    """How a worker is started.

    Parameters
    ----------
    name : str
    arguments : tuple of str
        Program and arguments.
    reserved_ids : frozenset of int
        Tokens that mean something to it and must not be in prompts.
    remedy : str
        What to do when it fails.
    """

    name: str
    arguments: tuple[str, ...]
    reserved_ids: frozenset[int] = frozenset()
    remedy: str = ""


def hugging_face(engine: Path, threads: int | None, context: int) -> PeerCommand:
    """transformers on the checkpoint inside an engine directory.

    It completes a prompt of ``context`` tokens with either attention implementation first, and stays with the faster.
    """
    _check_float_weights(engine, "transformers")
    worker = (sys.executable, "-m", "minicache_trt.benchmark.huggingface")
    return PeerCommand("hf", (*worker, str(engine / CHECKPOINT), str(threads or 0), str(context)))


def tensorrt_llm(python: Path | None, engine: Path, batch: int, length: int) -> PeerCommand:
    """TensorRT-LLM on the checkpoint inside an engine directory, through its LLM API.

    Parameters
    ----------
    python : Path, optional
        Interpreter of an environment with tensorrt_llm. Default: this one.
    engine : Path
    batch : int
        Most prompts at a time.
    length : int
        Tokens of the longest sequence.

    Raises
    ------
    UserError
        There is no such interpreter, or the checkpoint's weights are 4-bit codes.
    """
    remedy = "install tensorrt-llm (it needs an NVIDIA GPU), or name the Python of its environment with --peer-python"
    if python is not None and not python.is_file():
        raise UserError(f"--peer-python: {python}: no such file", remedy)
    _check_float_weights(engine, "TensorRT-LLM")
    limits = (str(batch), str(length), str(batch * length))
    arguments = (str(python or sys.executable), "-I", str(_TENSORRT_LLM_WORKER), str(engine / CHECKPOINT), *limits)
    return PeerCommand("tensorrt-llm", arguments, remedy=remedy)


def _check_float_weights(engine: Path, program: str) -> None:
    """Refuse an engine whose checkpoint lacks the weights that are quantized."""
    config = engine / CHECKPOINT / "config.json"
    if config.is_file() and read_json_object(config).get(INT4_MARK):
        raise UserError(
            f"{engine}: its checkpoint holds 4-bit weights in a form that {program} does not read",
            "build an engine from the unquantized checkpoint to compare with",
        )


def onnxruntime_genai(
    python: Path, directory: Path, model: ModelConfig, length: int, threads: int | None
) -> PeerCommand:
    """onnxruntime-genai, run by the Python of its own environment on its own export of the checkpoint.

    Parameters
    ----------
    python : Path
        Interpreter of an environment with onnxruntime-genai.
    directory : Path
        Export of ``onnxruntime_genai.models.builder``.
    model : ModelConfig
        The engine's model; the export must have its shape.
    length : int
        Tokens of the longest sequence.
    threads : int, optional

    Raises
    ------
    UserError
        Environment or export are missing, or the export is of another model.
    """
    if not python.is_file():
        raise UserError(f"--peer-python: {python}: no such file", f"{_SETUP} --peer-python")
    file = directory / "genai_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))["model"]
        decoder = config["decoder"]
        theirs = {
            "vocab_size": config["vocab_size"],
            "num_layers": decoder["num_hidden_layers"],
            "hidden_size": decoder["hidden_size"],
        }
        limit = int(config["context_length"])
        reserved = [config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
    except OSError as error:
        raise UserError(
            f"--peer-model: {directory} is no export of onnxruntime-genai: it has no genai_config.json",
            f"{_SETUP} --peer-model",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--peer-model: {file} is damaged: {error}", "export the checkpoint again") from error
    for name, value in theirs.items():
        if value != getattr(model, name):
            raise UserError(
                f"--peer-model: {directory} is another model: {name} {value}, the engine's is {getattr(model, name)}",
                "export the engine's checkpoint with python benchmarks/peers.py",
            )
    if length > limit:
        raise UserError(f"--peer-model: {directory} holds {limit} tokens, {length} are asked for", "lower --contexts")
    ids = {token for value in reserved for token in (value if isinstance(value, list) else [value])} - {None}
    arguments = (str(python), "-I", str(_WORKER), str(directory), str(threads or 0))
    return PeerCommand("onnxruntime-genai", arguments, frozenset(ids), f"{_SETUP} --peer-python")


class Peer:
    """A running worker.

    Raises
    ------
    UserError
        It could not be started; so does `run` when it ends early. The message is its own last line.
    """

    def __init__(self, command: PeerCommand) -> None:
        self.name, self._remedy = command.name, command.remedy
        # A file, because nobody reads a pipe while the worker works.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
            )
        except OSError as error:
            self._errors.close()
            cause = f"{self.name} cannot be started: {error.strerror}: {command.arguments[0]}"
            raise UserError(cause, command.remedy) from error
        self.pid = self._process.pid
        try:
            self.about: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise

    def run(self, prompts: Sequence[list[int]], new_tokens: int) -> Timings:
        """Prefill ``prompts`` and generate ``new_tokens`` after each."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; why is in what it wrote
        answer = self._answer()
        try:
            tokens = tuple(map(tuple, answer["tokens"]))
            return Timings(tuple(answer["first_tokens"]), tuple(answer["steps"]), tokens)
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.name} gave an answer without {error}") from error

    def cache_bytes(self) -> None:
        """A peer does not tell."""

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if isinstance(answer, dict):
            return answer
        if line:
            raise UserError(f"{self.name} was expected to answer in JSON, got {line.strip()[:80]!r}")
        code = self._process.wait()
        self._errors.seek(0)
        lines = [text.strip() for text in self._errors if text.strip()]
        raise UserError(f"{self.name} failed: {lines[-1] if lines else f'it ended with status {code}'}", self._remedy)
