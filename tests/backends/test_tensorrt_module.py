"""The module ``tensorrt`` has what the backend uses of it, and is refused politely where there is no GPU."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import minicache_trt.backends.tensorrt as backend
from tests.support.tensorrt_module import TensorRtModule, make_tensorrt_module, names_of

rtx = pytest.importorskip("tensorrt_rtx")

DEMO = Path(__file__).parents[2] / "examples" / "demo_model" / "checkpoint"
RTX_ONLY = {"create_runtime_cache", "set_runtime_cache", "deserialize"}
"""Of TensorRT-RTX's runtime cache, which is asked for only where there is one."""
TENSORRT_ONLY = {"add_plugin_v3"}

NAMES = """
from tests.support.tensorrt_module import classes_of, names_of
members = {name: member for kind in classes_of(trt) for name, member in vars(kind).items()}
print(json.dumps([sorted(names_of(trt)), {name: str(member.__doc__) for name, member in members.items()}]))
"""

OBJECTS = """
import io
from threading import Event
from minicache_trt.backends.tensorrt.builder import _make_writer
from minicache_trt.backends.tensorrt.module import Messages, make_logger
from minicache_trt.backends.tensorrt.progress import make_progress_monitor
messages, stages, file = Messages(), [], io.BytesIO()
logger = make_logger(trt, messages)
logger.log(trt.ILogger.Severity.ERROR, "wrong")
logger.log(trt.ILogger.Severity.WARNING, "strange")
monitor = make_progress_monitor(trt, lambda *stage: stages.append(stage), "decoder", lambda: None, Event())
monitor.phase_start("Building", None, 3)
went_on = monitor.step_complete("Building", 0)
monitor.phase_finish("Building")
writer = _make_writer(trt, file, lambda: None)
written = writer.write(b"plan")
print(json.dumps([list(messages.errors), stages, went_on, written, file.getvalue().decode()]))
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> TensorRtModule:
    return make_tensorrt_module(tmp_path_factory.mktemp("tensorrt"))


def trees() -> Iterator[ast.AST]:
    for path in Path(backend.__path__[0]).glob("*.py"):
        yield from ast.walk(ast.parse(path.read_text()))


def used_names() -> set[str]:
    """Attributes that the backend asks for, by ``.name``, ``getattr`` or ``hasattr``."""
    names = set()
    for node in trees():
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            names |= {str(part.value) for part in node.args[1:2] if isinstance(part, ast.Constant)}
    return names


def test_every_name_is_there(module: TensorRtModule) -> None:
    """A name that either module knows is in both, but for what only one of them can do."""
    names, _ = module.told(NAMES)
    rtx_names = names_of(rtx)
    known = used_names() & (rtx_names | set(names))
    assert len(known) > 60
    assert known - set(names) == RTX_ONLY
    assert known - rtx_names == TENSORRT_ONLY


def test_keywords_are_those_of_the_module(module: TensorRtModule) -> None:
    """Those that are given to its methods."""
    _, documents = module.told(NAMES)
    checked = 0
    for node in trees():
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in documents):
            continue
        for keyword in node.keywords:
            if keyword.arg is not None and "self: tensorrt_bindings" in documents[node.func.attr]:
                checked += 1
                assert f"{keyword.arg}: " in documents[node.func.attr], (node.func.attr, keyword.arg)
    assert checked


def test_objects_of_its_classes(module: TensorRtModule) -> None:
    """The logger, monitor and writer given to TensorRT, through their own methods."""
    errors, stages, went_on, written, text = module.told(OBJECTS)
    assert errors == ["wrong"] and went_on and (written, text) == (4, "plan")
    assert stages == [["decoder: building", 0, 3], ["decoder: building", 1, 3], ["decoder: building", 3, 3]]


def test_no_gpu_is_said(module: TensorRtModule, tmp_path: Path) -> None:
    """A build ends in one line, and leaves nothing."""
    flags = ["--backend", "tensorrt", "--dtype", "float16", "--max-seq-len", "256", "--output", tmp_path / "engine"]
    result = module.run("-m", "minicache_trt", "build", "--model", DEMO, *flags)
    assert result.returncode == 2 and not list(tmp_path.iterdir())
    cause, remedy = result.stderr.splitlines()
    assert cause == "error: TensorRT cannot start here: it found no NVIDIA GPU that it supports"
    assert remedy == "hint: check the GPU and its driver with nvidia-smi"
