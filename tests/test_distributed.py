"""Several processes: each picture exactly once, one result in all; killed and resumed to the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from test_filter_grid import fit, images, same

from deconvviz import FilterGrid
from deconvviz.errors import CheckpointError
from deconvviz.mining.archive import load_archive
from deconvviz.mining.found import Found

HERE = Path(__file__).parent


def script(body: str) -> list[str]:
    """A program that has the tests' helpers."""
    head = "import sys, time, torch\nfrom test_filter_grid import *\n"
    return ["-c", head + textwrap.dedent(body)]


def environment() -> dict[str, str]:
    package = str(HERE.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), package]), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("world", [2, 3])
def test_torchrun_takes_each_picture_once_and_gives_all_processes_the_whole(tmp_path, world):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
        from torch import distributed
        from test_filter_grid import *
        distributed.init_process_group("gloo")
        x = images(31)
        x[8] = torch.nan
        grid = fit(x, batch_size=4, checkpoint=r"{tmp_path}/grid.npz")
        rank = distributed.get_rank()
        grid.save(rf"{tmp_path}/whole.{{rank}}.npz")
        try:  # one picture has another shape, and one process has it
            fit([*images(6), images(1, 22)[0]])
        except Exception as error:
            open(rf"{tmp_path}/error.{{rank}}", "w").write(f"{{type(error).__name__}}: {{error}}")
        distributed.destroy_process_group()
        """)
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={world}",
        "--standalone",
        program,
    ]
    subprocess.run(list(map(str, command)), env=environment(), check=True, capture_output=True, timeout=300)
    x = images(31)
    x[8] = np.nan
    parts = [fit(x, batch_size=4, share=(i, world)) for i in range(world)]
    expected = parts[0].merge(*parts[1:])
    assert expected.found.layers[0].seen == 30
    for rank in range(world):
        found = Found.load(tmp_path / f"whole.{rank}.npz")
        assert found.shares == expected.found.shares
        assert all(a.arrays()["images"].tobytes() == b.arrays()["images"].tobytes()
                   for a, b in zip(found.layers, expected.found.layers, strict=True))  # fmt: skip
        assert same(type("G", (), {"found": found}), expected)
    assert len(list(tmp_path.glob("grid.*of*.npz"))) == world
    told = [(tmp_path / f"error.{rank}").read_text() for rank in range(world)]
    failed = told.pop(0)
    assert failed.startswith("InvalidInput") and "22" in failed
    assert told == [f"OtherProcessFailed: process 0 failed: {failed}"] * (world - 1)


SLOW = """
    class Slow(Mapped):
        def __getitem__(self, i):
            time.sleep(0.004)
            return super().__getitem__(i)

    Slow.__name__ = "Mapped"
    print("begun", flush=True)
    fit(Slow(images(60)), batch_size=4, checkpoint=sys.argv[1], every=0)
    print("done", flush=True)
"""


@pytest.mark.parametrize(("seed", "kills"), [(0, 3), pytest.param(1, 20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_to_the_same_bits(tmp_path, seed, kills):
    """Kills in a row, each of the process that resumed from the one before."""
    path, rng = tmp_path / "grid.npz", random.Random(seed)
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, *script(SLOW), str(path)], env=environment(), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if path.exists():
            load_archive(path)  # whole, whenever the process died
    grid = fit(mapped(images(60)), batch_size=4, checkpoint=path)
    assert same(grid, fit(images(60), batch_size=4))


def mapped(x):
    from test_filter_grid import Mapped

    return Mapped(x)


def test_two_writers_leave_a_whole_file(tmp_path):
    path = tmp_path / "grid.npz"
    two = [
        subprocess.Popen([sys.executable, *script(SLOW), str(path)], env=environment(), stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    while any(process.poll() is None for process in two):
        if path.exists():
            load_archive(path)
        time.sleep(0.02)
    assert [process.returncode for process in two] == [0, 0]
    assert same(fit(mapped(images(60)), batch_size=4, checkpoint=path), fit(images(60), batch_size=4))


def test_a_truncated_checkpoint_is_refused_and_kept(tmp_path):
    path = tmp_path / "grid.npz"
    fit(images(), checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="delete it to start afresh"):
        fit(images(), checkpoint=path)
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError):
        FilterGrid.load(path, None)
