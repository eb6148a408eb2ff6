"""Addresses of tensors against the safetensors library; damaged files against what the error must say."""

import json
import re
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minicache_trt.checkpoint import load_checkpoint, read_safetensors_index
from minicache_trt.checkpoint.weights import WeightView, numpy_dtype
from minicache_trt.errors import UserError


def write_safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_views_read_what_the_library_reads(tmp_path, dtype):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"t{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate([(3, 5), (7,), (2, 3, 4)])
    }
    save_file(tensors, tmp_path / "model.safetensors")
    views = read_safetensors_index(tmp_path)
    assert views.keys() == tensors.keys()
    with safe_open(tmp_path / "model.safetensors", "pt") as reference:
        for name, view in views.items():
            expected = reference.get_tensor(name)
            assert view.shape == tuple(expected.shape) and view.dtype == str(expected.dtype).removeprefix("torch.")
            assert torch.equal(view.torch(), expected) and view.torch().dtype == expected.dtype
            np.testing.assert_array_equal(view.numpy().astype(np.float32), expected.float().numpy())
            assert view.numpy().dtype == numpy_dtype(view.dtype)
            raw = view.file.read_bytes()[view.offset : view.offset + view.nbytes]
            assert raw == expected.contiguous().view(torch.uint8).numpy().tobytes()


def test_arrays_are_read_only_and_share_one_mapping(tmp_path):
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, tmp_path / "model.safetensors")
    views = read_safetensors_index(tmp_path)
    a, b = views["a"].numpy(), views["b"].numpy()
    assert not a.flags.writeable
    assert np.shares_memory(a, views["a"].numpy())
    assert abs(a.ctypes.data - b.ctypes.data) == 16


def test_unaligned_offset(tmp_path):
    values = np.arange(6, dtype=np.float32)
    (tmp_path / "file").write_bytes(b"xyz" + values.tobytes())
    view = WeightView("w", tmp_path / "file", 3, 24, (2, 3), "float32")
    np.testing.assert_array_equal(view.numpy(), values.reshape(2, 3))
    assert torch.equal(view.torch(), torch.arange(6.0).reshape(2, 3))


def test_file_that_is_replaced_is_mapped_anew(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    before = read_safetensors_index(tmp_path)["a"].numpy()
    save_file({"a": torch.ones(4)}, tmp_path / "other")
    (tmp_path / "other").replace(tmp_path / "model.safetensors")
    assert read_safetensors_index(tmp_path)["a"].numpy()[0] == 1 and before[0] == 0


def test_sharded_equals_single(save_model):
    directory, model = save_model(shard_size="60KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    checkpoint = load_checkpoint(str(directory))
    assert checkpoint.weight_files() == shards
    views = read_safetensors_index(directory)
    for name, tensor in model.state_dict().items():
        assert torch.equal(views[name].torch(), tensor)


def truncate(path):
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    return f"{path.name}: truncated: expected {size} bytes, got {size - 100}"


def truncate_in_header(path):
    length = int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[:100])
    return f"{path.name}: truncated: the header ends at byte {8 + length}, the file has 100"


def nearly_empty(path):
    path.write_bytes(b"abc")
    return "truncated: expected at least 8 bytes, got 3"


def not_safetensors(path):
    path.write_bytes(b"\xff" * 64)
    return "not a safetensors file"


def lfs_pointer(path):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return "Git LFS pointer"


def header_not_json(path):
    write_safetensors(path, b"{nonsense}")
    return "the header is not JSON"


def header_not_utf8(path):
    write_safetensors(path, b'{"\xff\xfe": 1}')
    return "the header is not JSON"


def header_not_object(path):
    write_safetensors(path, [1, 2])
    return "the header is not a JSON object"


def overlapping(path):
    write_safetensors(path, {"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, bytes(24))
    return "b overlaps a"


def wrong_size(path):
    write_safetensors(path, {"a": entry(0, 12, [4])}, bytes(12))
    return r"a: float32 \[4\] needs 16 bytes, the header gives it 12"


def negative_offset(path):
    write_safetensors(path, {"a": entry(-4, 12, [4])}, bytes(16))
    return "a: the header gives no valid dtype, shape and data_offsets"


def no_offsets(path):
    write_safetensors(path, {"a": {"dtype": "F32", "shape": [4]}}, bytes(16))
    return "a: the header gives no valid dtype, shape and data_offsets"


DAMAGE = [
    truncate, truncate_in_header, nearly_empty, not_safetensors, lfs_pointer, header_not_json, header_not_utf8,
    header_not_object, overlapping, wrong_size, negative_offset, no_offsets,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda function: function.__name__)
def test_damaged_file(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(64), "b": torch.zeros(64)}, path)
    expected = damage(path)
    with pytest.raises(UserError, match=expected) as caught:
        read_safetensors_index(tmp_path)
    assert str(path) in caught.value.cause and caught.value.remedy
    assert "\n" not in str(caught.value)


def test_tensors_of_other_types_have_an_address(tmp_path):
    header = {"a": entry(0, 16, [4]), "ids": entry(16, 24, [1], "I64"), "new": entry(24, 25, [2], "F4")}
    write_safetensors(tmp_path / "model.safetensors", header, bytes(25))
    views = read_safetensors_index(tmp_path)
    assert views["ids"].dtype == "I64"
    with pytest.raises(ValueError, match="dtype: expected one of float16, bfloat16, float32, got 'I64'"):
        views["ids"].numpy()


@pytest.mark.parametrize(
    ("files", "cause", "remedy"),
    [
        ([], "no model.safetensors and no model.safetensors.index.json", "safetensors format"),
        (["consolidated.safetensors"], r"found consolidated.safetensors", "safetensors format"),
        (["pytorch_model.bin"], "PyTorch pickles", r"save_pretrained\(NEW_DIR\)"),
        (["consolidated.00.pth"], "PyTorch pickles", "save_pretrained"),
    ],
)
def test_no_safetensors(tmp_path, files, cause, remedy):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=cause) as caught:
        read_safetensors_index(tmp_path)
    assert re.search(remedy, caught.value.remedy)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors: missing, model.safetensors.index.json names it"),
        ({"weight_map": {"a": "../shard.safetensors"}}, "expected the names of files beside it"),
        ({"weight_map": {"b": "shard.safetensors"}}, "shard.safetensors: lacks b"),
        ({"weight_map": ["a"]}, "weight_map: expected an object of file names"),
        ({}, "weight_map: expected an object of file names"),
        ([], "expected a JSON object, got list"),
    ],
)
def test_bad_index(tmp_path, index, message):
    save_file({"a": torch.zeros(4)}, tmp_path / "shard.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        read_safetensors_index(tmp_path)


def test_truncated_shard_is_named(save_model):
    directory, _ = save_model(shard_size="60KB")
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    expected = truncate(shard)
    with pytest.raises(UserError, match=expected):
        load_checkpoint(str(directory))


def test_checkpoint_through_symbolic_links(save_model, tmp_path):
    directory, _ = save_model()
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in directory.iterdir():
        (linked / path.name).symlink_to(path)
    checkpoint = load_checkpoint(str(linked))
    assert checkpoint.weight_files() == [linked / "model.safetensors"]
    shutil.rmtree(directory)
    with pytest.raises(UserError, match=r"no config\.json"):
        load_checkpoint(str(linked))
