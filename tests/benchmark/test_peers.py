"""The conversation with workers, and what is checked before one is started."""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from minicache_trt.benchmark.peers import Peer, PeerCommand, hugging_face, onnxruntime_genai
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError
from tests.support import fake_peer

MODEL = ModelConfig("llama", 2, 64, 96, 4, 2, 16, vocab_size=40, max_position_embeddings=512)
CONFIG = {
    "model": {
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": None,
        "context_length": 128,
        "vocab_size": 40,
        "decoder": {"num_hidden_layers": 2, "hidden_size": 64},
    }
}


def command(*arguments: str) -> PeerCommand:
    return PeerCommand("fake", (sys.executable, *arguments), remedy="mend it")


def fake() -> PeerCommand:
    assert fake_peer.__file__
    return command(fake_peer.__file__, "x")


def test_a_run() -> None:
    peer = Peer(fake())
    assert peer.about == {"name": "fake", "version": "1.2", "settings": {"arguments": ["x"]}}
    timings = peer.run([[1, 2], [3, 4]], 3)
    assert timings.first_tokens == (fake_peer.FIRST_TOKEN,) * 2 and timings.steps == (fake_peer.STEP,) * 2
    assert timings.tokens == ((3,) * 3, (7,) * 3)
    assert len(peer.run([[1]], 5).steps) == 4
    assert peer.cache_bytes() is None  # type: ignore[func-returns-value]
    peer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(peer.pid, signal.SIGTERM)


@pytest.mark.parametrize(("token", "cause"), [(fake_peer.CRASH, "it crashed"), (fake_peer.NOISE, "not JSON")])
def test_a_worker_that_fails(token: int, cause: str) -> None:
    peer = Peer(fake())
    with pytest.raises(UserError, match=cause):
        peer.run([[token]], 3)
    peer.close()


@pytest.mark.parametrize(
    ("program", "cause"),
    [
        ("raise SystemExit(3)", "fake failed: it ended with status 3"),
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("print('hello')", "expected to answer in JSON, got 'hello'"),
    ],
)
def test_a_worker_that_does_not_start(program: str, cause: str) -> None:
    with pytest.raises(UserError) as error:
        Peer(command("-c", program))
    assert cause in error.value.cause and "\n" not in error.value.cause


def test_a_program_that_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("")
    with pytest.raises(UserError, match="cannot be started: Permission denied"):
        Peer(PeerCommand("fake", (str(tmp_path / "python"),)))


def test_an_answer_without_a_field() -> None:
    peer = Peer(command("-c", "print({}, flush=True); input(); print({}, flush=True)"))
    with pytest.raises(UserError, match="without 'tokens'"):
        peer.run([[1]], 2)
    peer.close()


def test_command_of_transformers() -> None:
    arguments = hugging_face(Path("engine"), None, 512).arguments
    assert arguments[-3:] == (str(Path("engine", "checkpoint")), "0", "512")


def export(tmp_path: Path, **changes: Any) -> Path:
    data = json.loads(json.dumps(CONFIG))
    data["model"] |= changes
    (tmp_path / "genai_config.json").write_text(json.dumps(data))
    return tmp_path


def test_command_of_genai(tmp_path: Path) -> None:
    made = onnxruntime_genai(Path(sys.executable), export(tmp_path), MODEL, 128, 2)
    assert made.reserved_ids == {1, 2, 3}
    assert made.arguments[0] == sys.executable and made.arguments[-2:] == (str(tmp_path), "2")
    assert Path(made.arguments[-3]).is_file()


@pytest.mark.parametrize(
    ("changes", "length", "cause"),
    [
        ({"vocab_size": 41}, 10, "another model: vocab_size 41, the engine's is 40"),
        ({"decoder": {"num_hidden_layers": 3, "hidden_size": 64}}, 10, "another model: num_layers 3"),
        ({"decoder": {}}, 10, "is damaged: 'num_hidden_layers'"),
        ({"decoder": []}, 10, "is damaged"),
        ({}, 129, "holds 128 tokens, 129 are asked for"),
    ],
)
def test_exports_that_are_refused(tmp_path: Path, changes: dict[str, Any], length: int, cause: str) -> None:
    with pytest.raises(UserError) as error:
        onnxruntime_genai(Path(sys.executable), export(tmp_path, **changes), MODEL, length, None)
    assert cause in error.value.cause


def test_missing_export_and_environment(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no genai_config"):
        onnxruntime_genai(Path(sys.executable), tmp_path, MODEL, 10, None)
    with pytest.raises(UserError, match=r"no such file .*benchmarks/peers"):
        onnxruntime_genai(tmp_path / "python", export(tmp_path), MODEL, 10, None)


def test_worker_of_genai(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for the library that counts up from the sum of each prompt."""
    made: dict[str, Any] = {}

    class Generator:
        def __init__(self, model: object, params: Any) -> None:
            self.rows: list[list[int]] = []

        def append_tokens(self, ids: Any) -> None:
            self.rows = ids.tolist()

        def generate_next_token(self) -> None:
            for row in self.rows:
                row.append(sum(row) % 11)

        def get_sequence(self, index: int) -> list[int]:
            return self.rows[index]

    class Parameters:
        def __init__(self, model: object) -> None:
            pass

        def set_search_options(self, *, batch_size: int, max_length: int, min_length: int, do_sample: bool) -> None:
            made["options"] = (batch_size, max_length, min_length, do_sample)

    class Config:
        def __init__(self, directory: str) -> None:
            made["directory"] = directory

        def overlay(self, text: str) -> None:
            made["overlay"] = json.loads(text)

    library = types.ModuleType("onnxruntime_genai")
    library.__dict__.update(Generator=Generator, GeneratorParams=Parameters, Config=Config, Model=lambda config: config)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", library)
    monkeypatch.delitem(sys.modules, "minicache_trt.benchmark.genai", raising=False)
    from minicache_trt.benchmark import genai

    model = genai.load("export", 3)
    assert made["directory"] == "export"
    assert made["overlay"]["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 3
    answer = genai.run(model, [[1, 2], [4, 5]], 3)
    assert made["options"] == (2, 5, 5, False)
    assert answer["tokens"] == [[3, 6, 1], [9, 7, 3]]
    assert len(answer["first_tokens"]) == 2 and len(answer["steps"]) == 2 and min(answer["steps"]) >= 0
    monkeypatch.delitem(sys.modules, "minicache_trt.benchmark.genai")
