"""What is left of the memory: as Linux tells it, also within a container; and what asks before it takes much."""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch
from test_occlusion import Little, toy
from trained_like import pictures

import deconvviz.memory
from deconvviz import OcclusionSensitivity
from deconvviz.errors import UnsupportedModel
from deconvviz.memory import memory_left
from deconvviz.occlusion.clean_passes import clean_passes

FILES = {
    "proc/meminfo": "MemTotal:       16000 kB\nMemFree:         2000 kB\nMemAvailable:    8000 kB\n",
    "sys/fs/cgroup/memory.current": "5000000\n",
    "sys/fs/cgroup/memory.stat": "anon 2000000\nfile 3000000\ninactive_file 1000000\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "5000000\n",
    "sys/fs/cgroup/memory/memory.stat": "cache 1000\ninactive_file 5\ntotal_inactive_file 2000000\n",
}


@pytest.mark.parametrize(
    ("changed", "left"),
    [
        ({}, 8000 * 1024),
        ({"sys/fs/cgroup/memory.max": "max\n"}, 8000 * 1024),
        ({"sys/fs/cgroup/memory.max": "6000000\n"}, 2_000_000),  # 1 MB is copies of files
        ({"sys/fs/cgroup/memory.max": "600000000\n"}, 8000 * 1024),
        ({"sys/fs/cgroup/memory.max": "3000000\n"}, 0),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "7000000\n"}, 4_000_000),
        ({"proc/meminfo": "MemTotal: 16000 kB\n"}, 9223372036854771712 - 3_000_000),
    ],
)
def test_what_is_left_as_linux_tells(changed, left, tmp_path):
    for name, text in {**FILES, **changed}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_left("cpu", tmp_path) == pytest.approx(left)


def test_processes_of_one_machine_share_it(tmp_path, monkeypatch):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(FILES["proc/meminfo"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_left("cpu", tmp_path) == 2000 * 1024


def test_elsewhere_it_is_not_known(tmp_path):
    assert memory_left("cpu", tmp_path) == memory_left("mps") == math.inf


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="known on Linux")
def test_no_more_is_left_here_than_there_is():
    assert 0 < memory_left("cpu") <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_what_pytorch_keeps_on_a_gpu_is_left_too(monkeypatch):
    for name, found in {"mem_get_info": (100, 1000), "memory_reserved": 80, "memory_allocated": 50}.items():
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    assert memory_left("cuda") == 130


def leave(monkeypatch, left):
    monkeypatch.setattr(deconvviz.memory, "memory_left", lambda device: left)


def test_a_batch_is_no_larger_than_fits(monkeypatch):
    model, inputs = Little(1000), torch.rand(1, 3, 16, 16)
    leave(monkeypatch, 2 * 64 * inputs.nbytes * 5)
    OcclusionSensitivity(model, engine="full").attribute(inputs, (3, 4, 4), (3, 2, 2), target=0)
    assert max(model.sizes) == 5
    leave(monkeypatch, 1)
    OcclusionSensitivity(model := Little(1000), engine="full").attribute(inputs, (3, 4, 4), (3, 4, 4), target=0)
    assert max(model.sizes) <= 2  # two, to see whether windows of one batch depend on each other


def test_a_batch_that_was_asked_for_is_taken(monkeypatch):
    leave(monkeypatch, 1)
    model, inputs = Little(1000), torch.rand(1, 3, 16, 16)
    full = OcclusionSensitivity(model, engine="full")
    full.attribute(inputs, (3, 4, 4), (3, 2, 2), target=0, perturbations_per_eval=7)
    assert max(model.sizes) == 7


def test_what_a_pass_holds_at_most():
    """By hand: a filter's input and output; the output and what a ReLU in place copied; that and the pool's."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(inplace=True), torch.nn.MaxPool2d(2)
    (clean,), _, _ = clean_passes(torch.nn.Sequential(*layers), torch.rand(1, 3, 10, 10))
    assert clean.peak == 4 * (800 + 800)


def test_a_pass_that_has_no_place_is_not_kept(monkeypatch):
    model, images = toy(), pictures(3, 16)
    arguments = images, (3, 4, 4), (3, 4, 4)
    expected = OcclusionSensitivity(model, engine="full").attribute(*arguments, target=1)
    (first, *_), _, _ = clean_passes(model, images)
    leave(monkeypatch, sum(t.nbytes for t in first.contents.values()))
    with pytest.raises(UnsupportedModel, match=r"the pass of an image holds 0\.0 GB, more than half"):
        OcclusionSensitivity(model, engine="incremental").attribute(*arguments, target=1)
    assert torch.allclose(OcclusionSensitivity(model).attribute(*arguments, target=1), expected)


@pytest.mark.parametrize("place", [1, 2, 3, 5, 9])
def test_passes_of_more_images_than_have_a_place_are_computed_again(place, monkeypatch):
    model, images = toy().double(), pictures(5, 16).double()
    expected = OcclusionSensitivity(model, engine="full").attribute(images, (3, 4, 4), (3, 2, 2), target=1)
    maps = OcclusionSensitivity(model, engine="full").maps(images, 4, 2, "0")
    (first, *_), _, _ = clean_passes(model, images)
    whole = len(first.contents)
    leave(monkeypatch, 2.5 * place * sum(t.nbytes for t in first.contents.values()))
    passes, _, _ = clean_passes(model, images)
    held = [len(clean.contents) == whole for clean in passes]
    assert held == [i == 0 or i + 2 <= 1.25 * place for i in range(5)]
    assert all(len(clean.complete().contents) == whole for clean in passes)
    ours = OcclusionSensitivity(model, engine="incremental")
    torch.testing.assert_close(ours.attribute(images, (3, 4, 4), (3, 2, 2), target=1), expected, rtol=1e-9, atol=1e-12)
    found = ours.maps(images, 4, 2, "0")
    for name in ("activation_cells", "score_cells"):
        torch.testing.assert_close(getattr(found, name), getattr(maps, name), rtol=1e-9, atol=1e-12)
