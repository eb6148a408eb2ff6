"""A file that is written by several threads and several runs."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from minicache_trt.quantization.partial import kept_if_killed
from minicache_trt.quantization.partial_file import FINISHED, WEIGHTS, PartialFile

SHAPES = {"a": ("F32", (3, 5)), "b": ("U8", (7,)), "c": ("F32", (2,))}
ARRAYS = {
    "a": np.arange(15, dtype=np.float32).reshape(3, 5),
    "b": np.arange(7, dtype=np.uint8),
    "c": np.array([1.5, -2], np.float32),
}


def open_file(directory: Path, key: str = "key") -> PartialFile:
    directory.mkdir(exist_ok=True)
    return PartialFile(directory, SHAPES, key, {"bits": "4"})


def write(file: PartialFile, *names: str) -> None:
    file.write(names, [(name, piece) for name in names for piece in np.array_split(ARRAYS[name], 2)])


def test_complete_file(tmp_path: Path) -> None:
    with open_file(tmp_path / "part") as file:
        with pytest.raises(ValueError, match="3 tensors are not written"):
            file.publish(tmp_path / "out.safetensors")
        threads = [threading.Thread(target=write, args=(file, *names)) for names in (("c",), ("a", "b"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        file.publish(tmp_path / "out.safetensors")
    read = load_file(tmp_path / "out.safetensors")
    assert read.keys() == ARRAYS.keys() and all((read[name] == ARRAYS[name]).all() for name in ARRAYS)


def test_next_run_goes_on(tmp_path: Path) -> None:
    with open_file(tmp_path / "part") as file:
        write(file, "a", "c")
    with open_file(tmp_path / "part") as file:
        assert file.finished == {"a", "c"}
        write(file, "b")
        file.publish(tmp_path / "out.safetensors")
    assert all((value == ARRAYS[name]).all() for name, value in load_file(tmp_path / "out.safetensors").items())


def test_another_key_begins_anew(tmp_path: Path) -> None:
    with open_file(tmp_path / "part") as file:
        write(file, "a")
    (tmp_path / "part" / "hidden.1.npy").write_bytes(b"old")
    with open_file(tmp_path / "part", "other") as file:
        assert not file.finished
    assert not (tmp_path / "part" / "hidden.1.npy").exists()
    with PartialFile(tmp_path / "part", SHAPES | {"d": ("U8", (1,))}, "other") as file:
        assert not file.finished


def test_damaged_bytes_are_written_again(tmp_path: Path) -> None:
    with open_file(tmp_path / "part") as file:
        write(file, "a")
        write(file, "c")
    path = tmp_path / "part" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in c
    path.write_bytes(data)
    with open_file(tmp_path / "part") as file:
        assert file.finished == {"a"}


def test_line_that_was_cut_off(tmp_path: Path) -> None:
    with open_file(tmp_path / "part") as file:
        write(file, "a")
        write(file, "c")
    log = tmp_path / "part" / FINISHED
    log.write_bytes(log.read_bytes()[:-5])
    with open_file(tmp_path / "part") as file:
        assert file.finished == {"a"}
        write(file, "b")
    with open_file(tmp_path / "part") as file:
        assert file.finished == {"a", "b"}


def test_wrong_number_of_bytes(tmp_path: Path) -> None:
    with open_file(tmp_path / "part") as file:
        with pytest.raises(ValueError, match="b: expected 7 bytes, got 6"):
            file.write(("b",), [("b", ARRAYS["b"][:6])])
        with pytest.raises(ValueError, match="b: expected 7 bytes, got 14"):
            file.write(("b",), [("b", ARRAYS["b"])] * 2)
        assert not file.finished


def test_directory_is_one_builds(tmp_path: Path) -> None:
    with kept_if_killed(tmp_path / "engine", tmp_path / "private") as first:
        shared = first.directory()
        assert shared.parent == tmp_path and shared.is_dir()
        with kept_if_killed(tmp_path / "engine", tmp_path / "private") as second:
            assert second.directory() == tmp_path / "private"
        assert shared.is_dir()
    assert not shared.exists()
    with pytest.raises(KeyboardInterrupt), kept_if_killed(tmp_path / "engine", tmp_path / "private") as partial:
        partial.directory()
        raise KeyboardInterrupt
    assert shared.is_dir()
    with pytest.raises(RuntimeError), kept_if_killed(tmp_path / "engine", tmp_path / "private") as partial:
        raise RuntimeError
    assert not shared.exists()
