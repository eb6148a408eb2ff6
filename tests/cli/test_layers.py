"""``compare --layers`` and ``inspect --plot``: what they print and write, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minicache_trt.build import build_engine
from minicache_trt.compression.methods import make_plan
from minicache_trt.config import BuildConfig
from tests.cli.command import Invoke, assert_refused, run_process, snapshot
from tests.cli.conftest import CONFIG, MAX_SEQ_LEN

Refused = Callable[..., None]
PROMPT = "the cat sat on the mat"
FLAGS = ["--layers", "-p", PROMPT, "--threads", "1"]
POINTS = 3 * CONFIG["num_hidden_layers"] + 2  # type: ignore[operator]


def _build(source: Path, output: Path, method: str, max_seq_len: int = MAX_SEQ_LEN) -> Path:
    limits = BuildConfig(max_batch_size=2, max_seq_len=max_seq_len, max_num_tokens=64)
    build_engine(str(source), output, lambda config: (make_plan(config, method), limits))
    return output


@pytest.fixture(scope="module")
def uncompressed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another plan and float32 weights; not to be changed."""
    return _build(checkpoint, tmp_path_factory.mktemp("built") / "full", "full")


def _layers(invoke: Invoke, *arguments: object) -> dict[str, Any]:
    result = invoke("compare", *FLAGS, *arguments, "--json")
    assert result.code == 0 and result.err == "", result
    data: dict[str, Any] = json.loads(result.out)
    assert len(data["points"]) == POINTS
    return data


def assert_png(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width >= 1000
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50


def test_against_torch(invoke: Invoke, uncompressed: Path) -> None:
    data = _layers(invoke, "-e", uncompressed, "--max-tokens", "8")
    assert data["first"] is None and data["first_token"] is None and data["tolerance"] == 1e-3
    assert data["a"].endswith("(full, fp32 weights) on onnxruntime")
    assert data["b"].endswith("(full, fp32 weights) on torch")
    assert data["prompts"][0]["generated_tokens"] == 8
    assert all(point["relative_error"] < 1e-5 for point in data["points"])


def test_weight_only_engine_against_torch(invoke: Invoke, engine: Path) -> None:
    data = _layers(invoke, "-e", engine, "--max-tokens", "150", "--against", "torch")
    assert data["tolerance"] == 0.1 and data["first"] is None


def test_against_uncompressed_with_plot(invoke: Invoke, engine: Path, workspace: Path) -> None:
    """The plan keeps layers 0 and 1 in 4 bits: they part first, where the first block is read compressed."""
    before = snapshot(engine)
    flags = ["--against", "uncompressed", "--backend", "torch", "--tolerance", "1e-5", "--max-tokens", "150"]
    data = _layers(invoke, "-e", engine, *flags, "--plot", "layers.png")
    assert data["first"]["point"] == "layers.0.attention" and data["plot"] == "layers.png"
    assert data["first_token"] == {"prompt": 0, "position": 128}
    assert_png(workspace / "layers.png")
    assert snapshot(engine) == before and [path.name for path in workspace.iterdir()] == ["layers.png"]


def test_table(invoke: Invoke, engine: Path, uncompressed: Path) -> None:
    result = invoke("compare", "-e", uncompressed, *FLAGS, "--max-tokens", "4")
    assert result.code == 0 and "The sides agree: no relative error exceeds 0.001." in result.out
    result = invoke("compare", "-e", engine, *FLAGS, "--against", uncompressed, "--tolerance", "1e-4")
    assert result.code == 0 and result.err == ""
    assert "The sides part at layers.0.attention, first at token 0 of prompt 0" in result.out
    assert "q, k or v projection" in result.out and "beyond" in result.out


@pytest.mark.long
def test_libraries_are_quiet(engine: Path, workspace: Path) -> None:
    result = run_process("compare", "-e", engine, *FLAGS, "--max-tokens", "4", "--plot", "x.svg", "--json")
    assert result.code == 0 and result.err == ""
    json.loads(result.out)
    result = run_process("inspect", "-e", engine, "-p", PROMPT, "--plot", "plots", "--threads", "1", "--json")
    assert result.code == 0 and result.err == ""
    json.loads(result.out)


def test_stream_plots(invoke: Invoke, engine: Path, workspace: Path) -> None:
    flags = ["inspect", "-e", engine, "-p", PROMPT, "-p", "the dog", "--plot", "new/plots", "--threads", "1"]
    result = invoke(*flags)
    assert result.code == 0 and "merged" in result.out and "Norms" in result.out
    assert result.err.startswith("wrote new/plots/similarity.png")
    data = json.loads(invoke(*flags, "--json").out)
    assert data["method"] == "minicache4"
    for part in ("key", "value"):
        pairs = [pair for pair in data["pairs"] if pair["part"] == part]
        assert [(pair["layers"], pair["merged"]) for pair in pairs] == [
            ([0, 1], False),
            ([1, 2], False),
            ([2, 3], True),
        ]
        heads = CONFIG["num_key_value_heads"]
        assert all(sum(pair["histogram"]) == data["tokens"] * heads for pair in pairs)  # type: ignore[operator]
    assert len(data["norms"]) == 2 * CONFIG["num_hidden_layers"]  # type: ignore[operator]
    assert data["plots"] == [f"new/plots/{name}.png" for name in ("similarity", "norms", "angles")]
    for path in data["plots"]:
        assert_png(workspace / path)


def test_prompt_as_long_as_the_engine(invoke: Invoke, engine: Path, workspace: Path) -> None:
    flags = ["-p", "\u00e9" * (MAX_SEQ_LEN // 2), "--plot", "plots", "--threads", "1", "--json"]
    assert json.loads(invoke("inspect", "-e", engine, *flags).out)["tokens"] == MAX_SEQ_LEN


@pytest.mark.parametrize("name", ["a$b$c", "[red]", "\u6c34", "x\ny"])
def test_any_directory_name(invoke: Invoke, uncompressed: Path, workspace: Path, name: str) -> None:
    """Titles are not formulas, markup or anything the font must have."""
    (workspace / name).symlink_to(uncompressed)
    result = invoke("compare", "-e", name, *FLAGS, "--max-tokens", "2", "--plot", "x.png", "--json")
    assert result.code == 0 and result.err == ""
    assert_png(workspace / "x.png")
    flags = ["-p", PROMPT, "--plot", f"{name}-plots", "--threads", "1"]
    assert invoke("inspect", "-e", name, *flags).code == 0


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--against", "torhc"], ["--against: 'torhc' is no engine directory", "torch, uncompressed or another"]),
        (["--against", ""], ["--against: '' is no engine directory"]),
        (["--against", "empty"], ["empty is not an engine directory"]),
        (["--against", "file"], ["file: no such directory"]),
        (["--tolerance", "-1"], ["--tolerance: expected a finite number of at least 0, got -1.0"]),
        (["--tolerance", "nan"], ["--tolerance", "nan"]),
        (["--plot", "layers.bmp"], ["--plot: layers.bmp has no known suffix", ".png, .svg, .pdf"]),
        (["--plot", "no/such/layers.png"], ["--plot: cannot write no/such/layers.png", "no such directory no/such"]),
        (["--plot", "empty.png"], ["--plot: cannot write empty.png: Is a directory"]),
        (["--backend", "pytorch"], ["unknown backend 'pytorch'", "torch"]),
        (["--kv-cache-memory", "0"], ["--kv-cache-memory: expected 1 byte to"]),
        (["-p", ""], ["prompts[1]: expected at least one token"]),
        (["-p", "\u00e9" * (MAX_SEQ_LEN // 2 + 5)], [f"prompts[1] has {MAX_SEQ_LEN + 10} tokens", str(MAX_SEQ_LEN)]),
        (["-p", "\u00e9" * (MAX_SEQ_LEN // 2)], [f"prompts[1] has {MAX_SEQ_LEN} tokens", "nothing to compare"]),
    ],
)
def test_layers_refuses(refused: Refused, workspace: Path, engine: Path, flags: list[object], parts: list[str]) -> None:
    (workspace / "empty").mkdir()
    (workspace / "empty.png").mkdir()
    (workspace / "file").write_text("x")
    refused(["compare", "-e", engine, *FLAGS, *flags], *parts)


@pytest.mark.parametrize("flag", [["--against", "torch"], ["--tolerance", "1"], ["--plot", "x.png"]])
def test_flags_of_layers_alone(refused: Refused, engine: Path, flag: list[str]) -> None:
    refused(["compare", "-e", engine, "-p", PROMPT, *flag], f"{flag[0]} only goes with --layers", "add --layers")


def test_engine_of_another_model(refused: Refused, engine: Path, own_checkpoint: Path, workspace: Path) -> None:
    config = json.loads((own_checkpoint / "config.json").read_text())
    (own_checkpoint / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    _build(own_checkpoint, workspace / "other", "full")
    parts = ["--against: other is of another model", "rms_norm_eps 0.001, not"]
    refused(["compare", "-e", engine, *FLAGS, "--against", "other"], *parts)


def test_other_engine_is_damaged(refused: Refused, engine: Path, own_engine: Path) -> None:
    path = own_engine / "decoder.onnx"
    path.write_bytes(path.read_bytes()[:-10])
    refused(["compare", "-e", engine, *FLAGS, "--against", "engine"], "engine: decoder.onnx was changed")
    refused(["compare", "-e", "engine", *FLAGS], "engine: decoder.onnx was changed")
    shutil.rmtree(own_engine)


def test_other_engine_is_too_short(refused: Refused, engine: Path, checkpoint: Path, workspace: Path) -> None:
    _build(checkpoint, workspace / "short", "full", max_seq_len=64)
    parts = ["short was built for max_seq_len 64, prompt and continuation have", "--max-tokens"]
    refused(["compare", "-e", engine, *FLAGS, "--against", "short", "--max-tokens", "80"], *parts)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--prompt", "x"], ["--prompt and --prompts only go with --plot", "add --plot"]),
        (["--prompts", "missing.txt"], ["only go with --plot"]),
        (["--plot", "plots"], ["no prompt was given"]),
        (["--plot", "plots", "--prompts", "missing.txt"], ["--prompts: cannot read missing.txt"]),
        (["--plot", "file", "-p", PROMPT], ["--plot: file is a file, expected a directory"]),
        (["--plot", "file/plots", "-p", PROMPT], ["file is a file, expected a directory"]),
        (["--plot", "plots", "-p", ""], ["prompts[0]: expected at least one token"]),
        (["--plot", "plots", "-p", "\u00e9" * MAX_SEQ_LEN], [f"prompts[0] has {2 * MAX_SEQ_LEN} tokens"]),
    ],
)
def test_inspect_refuses(refused: Refused, workspace: Path, engine: Path, flags: list[str], parts: list[str]) -> None:
    (workspace / "file").write_text("x")
    refused(["inspect", "-e", engine, "--threads", "1", *flags], *parts)


def test_disk_that_cannot_be_written(invoke: Invoke, uncompressed: Path, small_disk: Callable[[str], Path]) -> None:
    for options, reason in (("ro,size=64k", "Read-only file system"), ("size=8k", "No space left on device")):
        disk = small_disk(options)
        flags = [*FLAGS, "--max-tokens", "2", "--plot", disk / "x.png"]
        assert_refused(invoke("compare", "-e", uncompressed, *flags), "--plot: cannot write", "x.png", reason)
        plots = ["inspect", "-e", uncompressed, "-p", PROMPT, "--threads", "1", "--plot", disk / "plots"]
        assert_refused(invoke(*plots), "--plot: cannot write", reason)


def test_engine_without_tokenizer(invoke: Invoke, refused: Refused, own_checkpoint: Path) -> None:
    for file in own_checkpoint.glob("tokenizer*"):
        file.unlink()
    assert invoke("build", "-m", own_checkpoint, "-o", "engine").code == 0
    for arguments in (["compare", "--layers"], ["inspect", "--plot", "plots"]):
        refused([*arguments, "-e", "engine", "-p", PROMPT, "--threads", "1"], "engine has no tokenizer")
