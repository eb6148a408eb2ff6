"""Plugins from fields: what is refused and how, and that an engine's fields make the same plugin again."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.cases import model
from tests.support.plugin_harness import CHW32, RUNTIME, TYPES, Harness, PluginError, described
from tests.support.plugin_nodes import Node, nodes_named, plans_of

CONFIG = model(80, 3)
KIVI = nodes_named(CONFIG, "kivi4")
ATTENTION, COMPRESSION = KIVI.attention[1], KIVI.compression[1]


def nodes_of(name: str) -> list[Node]:
    nodes = nodes_named(CONFIG, name)
    return [*nodes.attention, *nodes.compression]


def test_creators(harness: Harness) -> None:
    assert list(harness.creators) == ["minicache::PagedAttention::1", "minicache::CompressBlocks::1"]


@pytest.mark.parametrize("name", plans_of(CONFIG))
def test_kept_fields_make_the_same_plugin(harness: Harness, name: str) -> None:
    """Made from a node's attributes, cloned, made again from what the clone keeps: the fields are the node's."""
    for node in nodes_of(name):
        made = harness.create(node.op, node.fields)
        again = harness.create(node.op, made.clone().fields(), RUNTIME)
        assert made.fields() == again.fields() == again.clone().fields() == node.fields
        assert made.name == again.name == f"minicache::{node.op}::1"
        assert made.aliases() == again.aliases()


@pytest.mark.parametrize("name", ["full", "minicache4", "aligned KLT"])
def test_pools_are_aliased_and_outputs_are_like_inputs(harness: Harness, name: str) -> None:
    for node in nodes_of(name):
        plugin = harness.create(node.op, node.fields)
        inputs = list(node.inputs)
        pools = [inputs.index("kv")] if node.op == "PagedAttention" else plugin.aliases()
        expected = [-1, *pools] if node.op == "PagedAttention" else pools
        assert plugin.aliases() == expected
        assert [f"{node.inputs[inputs[place]]}.out" for place in pools] == list(node.outputs)[-len(pools) :]
        numbers = list(range(1, len(inputs) + 1))
        given = [described(torch.empty(0, dtype=torch.float16), (n,)) for n in numbers]
        like = [place if place >= 0 else inputs.index("q") for place in expected]
        assert plugin.infer(given) == (like, [TYPES[torch.float16]] * len(like))


BAD_ATTENTION = [
    ({"num_heads": 5}, "num_heads: expected a multiple of num_kv_heads (3), got 5"),
    ({"num_kv_heads": 0}, "num_kv_heads: expected 1 to 32768, got 0"),
    ({"num_heads": "six"}, "num_heads: expected an integer, got a field of type 6"),
    ({"head_dim": 72}, "head_dim: expected 64, 80, 96, 128 or 256, got 72"),
    ({"sliding_window": -1}, "sliding_window: expected 0 to 2147483647, got -1"),
    ({"logit_numbers": "0.1"}, "logit_numbers: expected 2 numbers, got 1"),
    ({"logit_numbers": "0 1"}, "logit_numbers: expected a positive scale, got 0"),
    ({"logit_numbers": "0.1 -1"}, "logit_numbers: expected a soft cap of at least 0, got -1"),
    ({"input_names": 3}, "input_names: expected text, got a field of type 5"),
    ({"input_names": "q k v"}, "input_names: kv is missing"),
    ({"input_names": "q q"}, "input_names: q is there twice"),
    ({"input_names": "q weights"}, "input_names: weights is no input of a node with these attributes"),
    ({"key_stream": "1 0 0"}, "key_stream: stream: expected at least 15 integers, got 3"),
    ({"key_stream": "1 0 x"}, "key_stream: expected integers separated by spaces, got 'x'"),
    ({"key_stream": ATTENTION.fields["value_stream"]}, "key_stream: expected a stream of keys, got one of values"),
    ({"value_stream": "9" + str(ATTENTION.fields["value_stream"])[1:]}, "value_stream: stream: version 9"),
    ({"inverse_frequencies": "1 0.5"}, "inverse_frequencies: expected head_dim / 2 = 40 numbers, got 2"),
    ({"inverse_frequencies": "1 nan " + "1 " * 38}, "inverse_frequencies: expected finite numbers, got nan"),
    ({"scale": 1}, "field scale: expected one of num_heads, num_kv_heads, head_dim"),
]
BAD_COMPRESSION = [
    ({"stream_numbers": "0.6"}, "stream: stream: expected 2 floats (t, gamma), got 1"),
    ({"stream": "1"}, "stream: stream: expected at least 15 integers, got 1"),
    ({"input_names": "source_blocks target_blocks block_index"}, "input_names: kv0 is missing"),
]


@pytest.mark.parametrize(
    ("node", "changed", "message"),
    [(ATTENTION, *row) for row in BAD_ATTENTION] + [(COMPRESSION, *row) for row in BAD_COMPRESSION],
)
def test_bad_fields_are_refused(harness: Harness, node: Node, changed: dict[str, int | str], message: str) -> None:
    """The logger gets one error, which names the op and the field."""
    with pytest.raises(PluginError) as error:
        harness.create(node.op, node.fields | changed)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"1 minicache: {node.op}: {message}")


@pytest.mark.parametrize("node", [ATTENTION, COMPRESSION], ids=["attention", "compression"])
def test_missing_fields_are_named(harness: Harness, node: Node) -> None:
    for name in node.fields:
        fields = {field: value for field, value in node.fields.items() if field != name}
        with pytest.raises(PluginError) as error:
            harness.create(node.op, fields)
        assert f"{node.op}: field {name} is missing" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_and_formats(harness: Harness, dtype: torch.dtype) -> None:
    """One compute type for all tensors that have it; everything is linear."""
    plugin = harness.create("PagedAttention", ATTENTION.fields)
    own = {"codes": torch.int8, "params": torch.float16}
    types = [own.get(name.rpartition(".")[2], torch.int32) for name in ATTENTION.inputs]
    types[:4] = [dtype] * 4
    inputs = [described(torch.empty(0, dtype=x), (1, 1)) for x in types]
    outputs = [described(torch.empty(0, dtype=dtype), (1, 1))] * 2
    everything = [*inputs, *outputs]
    for place in range(len(everything)):
        assert plugin.supports(place, inputs, outputs), place
        for wrong in set(TYPES) - {dtype} if place else {torch.int8, torch.int32, torch.int64}:
            if TYPES[wrong] == everything[place].type:
                continue
            other = [*everything]
            other[place] = described(torch.empty(0, dtype=wrong), (1, 1))
            assert not plugin.supports(place, other[: len(inputs)], other[len(inputs) :]), (place, wrong)
        other = [*everything]
        kind = next(x for x, number in TYPES.items() if number == everything[place].type)
        other[place] = described(torch.empty(0, dtype=kind), (1, 1), CHW32)
        assert not plugin.supports(place, other[: len(inputs)], other[len(inputs) :]), place
    assert not plugin.supports(0, inputs[1:], outputs), "one input less"
