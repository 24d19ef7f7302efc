"""The checkpoint's file: whole or refused, and the old one stays when a write fails."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import ToTensor

from deconvviz import FilterGrid
from deconvviz.errors import CheckpointError
from deconvviz.evolution.result import Evolution
from deconvviz.mining.archive import hash_of, load_archive, model_fingerprint, save_archive

ARRAYS = {"a": np.arange(5000, dtype=np.float32).reshape(50, 100), "b": np.array([2**62], np.int64)}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "grid.npz"
    save_archive(path, {"layers": ["a", "é"]}, ARRAYS)
    header, arrays = load_archive(path)
    assert header["layers"] == ["a", "é"]
    assert all((arrays[name] == array).all() and arrays[name].dtype == array.dtype for name, array in ARRAYS.items())
    assert [file.name for file in path.parent.iterdir()] == ["grid.npz"]


def test_a_truncated_or_altered_file_is_refused(tmp_path):
    path = tmp_path / "grid.npz"
    save_archive(path, {}, ARRAYS)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            load_archive(path)
    for place in range(40, len(whole) // 2, 331):  # the entries' contents, each under its CRC
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            _, arrays = load_archive(path)
        except CheckpointError:
            continue
        assert all((arrays[name] == array).all() for name, array in ARRAYS.items())


def test_whatever_is_altered_is_refused_with_a_typed_error(tmp_path):
    path = tmp_path / "grid.npz"
    save_archive(path, {"about": {"layers": []}}, {"a": np.arange(9)})
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 3, 6):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with contextlib.suppress(CheckpointError):
                load_archive(path)


def test_a_damaged_file_is_not_called_another_classs(tmp_path):
    (tmp_path / "watched.npz").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="damaged or no file of deconvviz"):
        Evolution.load(tmp_path / "watched.npz")


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_file_names_that_are_no_utf_8(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = [os.fsdecode(name) for name in (b"caf\xe9.png", b"caf\xe8.png")]
    for name in names:
        try:
            Image.new("RGB", (12, 12)).save(folder / name)
        except OSError:
            pytest.skip("the file system has no such names")
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    grid = FilterGrid(model, "0").fit(folder, transform=ToTensor(), checkpoint=tmp_path / "grid.npz", progress=False)
    assert set(grid["0"][0].names) == set(names)
    assert hash_of(names[0]) != hash_of(names[1])


def test_pickles_and_other_files_are_refused(tmp_path):
    path = tmp_path / "grid.npz"
    np.savez(path, header=np.array([{"format": 1}], dtype=object))
    with pytest.raises(CheckpointError):
        load_archive(path)
    for content in (pickle.dumps({"format": 1}), b"hello", np.arange(3).tobytes()):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            load_archive(path)
    np.save(tmp_path / "array.npy", np.arange(3))
    with pytest.raises(CheckpointError):
        load_archive(tmp_path / "array.npy")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_archive(tmp_path / "nix.npz")


def test_a_newer_format_is_refused(tmp_path):
    save_archive(tmp_path / "grid.npz", {"format": 99}, {})
    with pytest.raises(CheckpointError, match="format 99"):
        load_archive(tmp_path / "grid.npz")


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "grid.npz"
    save_archive(path, {"version": 1}, ARRAYS)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full) if where == "fsync" else monkeypatch.setattr(type(path), "replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_archive(path, {"version": 2}, ARRAYS)
    assert load_archive(path)[0]["version"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["grid.npz"]


def test_the_fingerprint_is_of_every_weight():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    first = model_fingerprint(model())
    assert first == model_fingerprint(model())
    for name, tensor in model().state_dict().items():
        changed = model()
        with torch.no_grad():
            changed.state_dict()[name].view(-1)[-1:] += 1
        assert model_fingerprint(changed) != first, (name, tensor)
    half = model().bfloat16()
    assert model_fingerprint(half) != first
