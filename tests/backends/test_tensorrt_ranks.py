"""Several ranks with TensorRT: what their graphs compute together, and the engines RTX builds of them without a GPU."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import NodeProto, helper

from minicache_trt.backends.tensorrt import engine as engine_module
from minicache_trt.backends.tensorrt.collectives import KIND, connect, set_ranks
from minicache_trt.backends.tensorrt.engine import TensorRtRtxEngine
from minicache_trt.backends.tensorrt.network import Network, parse_network
from minicache_trt.backends.tensorrt.steps import count_shapes, split_step
from minicache_trt.build import load_engine
from minicache_trt.contract import LOGITS, decoder_inputs
from minicache_trt.engine_directory import ENGINES, EngineInfo, rank_folder, read_engine
from minicache_trt.errors import UserError
from minicache_trt.kernels.steps import StepInputs, StepShape
from minicache_trt.model.rank_collectives import OP
from minicache_trt.parallel.collectives import ALONE
from minicache_trt.parallel.rank import Rank
from minicache_trt.parallel.shard import Shard
from tests.support.checkpoints import make_checkpoint
from tests.support.engines import build
from tests.support.int4_writer import write_int4
from tests.support.steps import step

trt = pytest.importorskip("tensorrt_rtx")

BIASES = {"attention_bias": True, "mlp_bias": True, "vocab_size": 104}
COPIES = {"tie_word_embeddings": True, "vocab_size": 104}
ODD_VOCABULARY = {"vocab_size": 101}
MIXTRAL = {"family": "mixtral", "num_local_experts": 4, "vocab_size": 104}
TOKENS = 40


@pytest.fixture
def rank_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Builds leave each rank's folder here as it was when its engines were to be built, and build none."""

    def keep(folder: Path, *arguments: Any) -> None:
        shutil.copytree(folder, tmp_path / "graphs" / folder.name)

    monkeypatch.setattr("minicache_trt.backends.tensorrt.rank_engines.build_engines", keep)
    return tmp_path / "graphs"


def merge(models: list[onnx.ModelProto], steps: set[str]) -> onnx.ModelProto:
    """One graph of all ranks', whose collectives are a sum or a concatenation; names of rank k begin with ``k.``.

    Nodes of each rank are in an order in which they can run and meet the same collectives.
    """
    assert all(list(model.functions) == list(models[0].functions) for model in models)
    waiting = [list(model.graph.node) for model in models]
    nodes: list[NodeProto] = []
    while any(waiting):
        at_collective = []
        for rank, own in enumerate(waiting):
            while own and own[0].op_type != OP:
                nodes.append(renamed(own.pop(0), rank, steps))
            at_collective += [renamed(own.pop(0), rank, steps)] if own else []
        if at_collective:
            assert len(at_collective) == len(models)
            nodes += combined(at_collective)
    graph = onnx.GraphProto(name="ranks", node=nodes)
    for rank, model in enumerate(models):
        for target, values in (
            (graph.initializer, model.graph.initializer),
            (graph.input, [value for value in model.graph.input if not (rank and value.name in steps)]),
            (graph.output, model.graph.output),
        ):
            for value in values:
                made = target.add()
                made.CopyFrom(value)
                made.name = prefixed(value.name, rank, steps)
    merged = onnx.ModelProto(ir_version=models[0].ir_version, graph=graph, opset_import=models[0].opset_import)
    merged.functions.extend(models[0].functions)
    return merged


def prefixed(name: str, rank: int, steps: set[str]) -> str:
    return name if not name or name in steps else f"{rank}.{name}"


def renamed(node: NodeProto, rank: int, steps: set[str]) -> NodeProto:
    made = NodeProto()
    made.CopyFrom(node)
    made.name = f"{rank}.{node.name}"
    for names in (made.input, made.output):
        names[:] = [prefixed(name, rank, steps) for name in names]
    return made


def combined(collectives: list[NodeProto]) -> list[NodeProto]:
    """What the collectives of all ranks do, by its definition."""
    attributes = [{a.name: helper.get_attribute_value(a) for a in node.attribute} for node in collectives]
    assert all(a == attributes[0] for a in attributes) and attributes[0]["nb_rank"] == len(collectives)
    inputs, result = [node.input[0] for node in collectives], f"combined.{collectives[0].output[0]}"
    wanted = {(b"all_reduce", b"sum"): "Sum", (b"all_gather", b"none"): "Concat"}
    kind = wanted[attributes[0]["collective_operation"], attributes[0]["reduce_op"]]
    node = helper.make_node(kind, inputs, [result], **({"axis": 0} if kind == "Concat" else {}))
    return [node, *(helper.make_node("Identity", [result], [node.output[0]]) for node in collectives)]


def run(session: ort.InferenceSession, feeds: dict[str, Any]) -> dict[str, Any]:
    """All outputs; pools begin with zeros."""
    inputs = dict(feeds)
    for value in session.get_inputs():
        if value.name not in inputs:
            kind = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(float16)": np.float16}[value.type]
            inputs[value.name] = np.zeros([48, *value.shape[1:]], kind)
    used = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v for k, v in inputs.items() if k in used}), strict=True))


@pytest.mark.parametrize(
    ("size", "plan", "shape"),
    [
        (2, "kivi4", BIASES),
        (4, "full", COPIES),
        pytest.param(2, "full", ODD_VOCABULARY, marks=pytest.mark.long),
        pytest.param(2, "full", MIXTRAL, marks=pytest.mark.long),
    ],
)
def test_ranks_together_compute_what_one_does(
    tmp_path: Path, rank_graphs: Path, size: int, plan: str, shape: dict[str, Any]
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **shape)
    limits: dict[str, Any] = {"backend": "tensorrt-rtx", "dtype": "float32", "tp_size": size}
    directory = build(checkpoint, tmp_path / "engine", plan, **limits)
    info = read_engine(directory)
    models = [onnx.load(rank_folder(rank_graphs, rank) / "decoder.onnx") for rank in range(size)]
    steps = set(decoder_inputs(info.plan))
    onnx.save(merge(models, steps), tmp_path / "merged.onnx")
    batch = step([(TOKENS, 0, TOKENS)])
    batch.input_ids[:] = np.random.default_rng(1).integers(0, info.model.vocab_size, TOKENS)
    object.__setattr__(batch, "logit_index", np.arange(TOKENS, dtype=np.int32))
    (batch,) = split_step(batch)
    loaded = StepInputs(StepShape.of(batch), torch.device("cpu"))
    loaded.load(batch)
    feeds = {name: loaded.tensors[name].numpy() for name in steps & loaded.tensors.keys()}
    counts = count_shapes(loaded.shape, plugins=False)
    feeds |= {name: np.zeros(counts[name], np.int32) for name in steps & counts.keys()}
    together = run(ort.InferenceSession(tmp_path / "merged.onnx"), feeds)
    alone = run(ort.InferenceSession(directory / "decoder.onnx"), feeds)
    for rank in range(size):
        np.testing.assert_allclose(together[f"{rank}.{LOGITS}"], alone[LOGITS], atol=2e-4)
    heads = [together[name] for rank in range(size) for name in together if name.startswith(f"{rank}.kv.0")]
    copies = max(1, size // info.model.num_kv_heads)
    (whole,) = (alone[name] for name in alone if name.startswith("kv.0"))
    np.testing.assert_allclose(np.concatenate(heads[::copies], 2), whole, atol=1e-5)
    assert np.abs(whole).max() > 0.1


def test_rtx_builds_engines_of_ranks(tmp_path: Path) -> None:
    """Engines of both ranks, with two collectives for every layer and one for the logits; graphs are gone."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64, **BIASES)
    limits: dict[str, Any] = {"backend": "tensorrt-rtx", "dtype": "float16", "max_seq_len": 256, "max_num_tokens": 128}
    directory = build(checkpoint, tmp_path / "engine", "full", tp_size=2, **limits)
    for rank in range(2):
        folder = rank_folder(directory, rank)
        assert {path.name for path in folder.iterdir()} == {"decoder.engine", ENGINES}
        decoder = json.loads((folder / ENGINES).read_text())["engines"]["decoder.engine"]
        assert decoder["layers"][KIND] == 2 * 4 + 1
        pools = {tensor["name"]: tensor["shape"] for tensor in decoder["inputs"]}
        assert pools["kv.0"] == ["Nf", 2, 1, 64, 64]
    assert not list(directory.glob("*.engine"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="the engine has 2 ranks, one GPU each, and PyTorch finds 0"):
            load_engine(directory, 1)


def test_the_number_of_ranks_is_set_where_a_node_has_not(tmp_path: Path) -> None:
    node = helper.make_node(OP, ["x"], ["y"], collective_operation="all_reduce", reduce_op="sum", root=-1)
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, ["n", 8]) for name in "xy"]
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), tmp_path / "g.onnx")
    network = parse_network(trt, tmp_path / "g.onnx")
    set_ranks(network, 4)
    assert network.definition.get_layer(0).num_ranks == 4


def test_a_tensorrt_without_collectives_is_refused() -> None:
    class Old:
        __version__ = "10.9"

        class LayerType:
            pass

    network = Network(Old, None, None, None, None, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"TensorRT 10\.9 has no collectives, which engines of 2 ranks need"):
        set_ranks(network, 2)


def test_a_rank_opens_its_own_engines(tmp_path: Path, rank_graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder, its shape, and its communicator for the decoder's contexts, on stand-ins for the GPU and NCCL."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **BIASES)
    directory = build(checkpoint, tmp_path / "engine", "full", backend="tensorrt-rtx", dtype="float16", tp_size=2)
    (rank_folder(directory, 1) / "decoder.engine").touch()
    info = read_engine(directory)
    opened: list[Any] = []

    def start(self: TensorRtRtxEngine, trt: Any, folder: Path, own: EngineInfo, *_: Any) -> None:
        opened.extend([folder, own])
        self._decoder = SimpleNamespace(communicator=None)  # type: ignore[assignment]

    monkeypatch.setattr(TensorRtRtxEngine, "_start", start)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(engine_module, "CudaRecorder", lambda: None)
    monkeypatch.setattr(engine_module, "NcclCommunicator", lambda *place: SimpleNamespace(capsule=place))
    rank = Rank(Shard.of(info.model, 1, 2), ALONE)
    engine = TensorRtRtxEngine(directory, info, rank=rank)
    assert engine._decoder.communicator == (1, 2)
    assert opened[0] == rank_folder(directory, 1)
    assert (opened[1].model.num_kv_heads, opened[1].model.num_heads) == (1, 2)
    with pytest.raises(UserError, match="rank0 was built for backend tensorrt-rtx, it has no TensorRT-RTX engine"):
        TensorRtRtxEngine(directory, info, rank=replace(rank, shard=Shard(0, 2)))


def test_4_bit_checkpoints_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
    write_int4(make_checkpoint(tmp_path / "hf", **shape), tmp_path / "int4", "gptq", group=64)
    with pytest.raises(UserError, match="engines of 2 ranks cannot be built from 4-bit checkpoints"):
        build(tmp_path / "int4", tmp_path / "engine", "full", backend="tensorrt-rtx", dtype="float16", tp_size=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "int4"]


def test_a_refused_communicator_is_said() -> None:
    with pytest.raises(UserError, match="TensorRT refuses the ranks' NCCL communicator"):
        connect(SimpleNamespace(set_communicator=lambda communicator: False), object())
