"""Several processes: each picture exactly once, one result in all; killed and resumed to the same bits."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_filter_grid import fit, images, same

from deconvviz import FilterGrid
from deconvviz.errors import CheckpointError
from deconvviz.mining.archive import load_archive
from deconvviz.mining.found import Found

HERE = Path(__file__).parent


def environment() -> dict[str, str]:
    package = str(HERE.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), package]), "OMP_NUM_THREADS": "1"}


WHOLE = """
import os, sys
from torch import distributed
from test_filter_grid import *

folder, x, rank = sys.argv[1], images(31), int(os.environ["RANK"])
x[8] = torch.nan
for world in (3, 2):  # the last process stands aside then
    if rank < world:
        two = {"init_method": f"file://{folder}/meet", "rank": rank, "world_size": 2} if world == 2 else {}
        distributed.init_process_group("gloo", **two)
        fit(x, batch_size=4, checkpoint=f"{folder}/{world}.npz").save(f"{folder}/whole.{world}.{rank}.npz")
        try:  # one picture has another shape, and one process has it
            fit([*images(6), images(1, 22)[0]])
        except Exception as error:
            open(f"{folder}/error.{world}.{rank}", "w").write(f"{type(error).__name__}: {error}")
        distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def of_torchrun(tmp_path_factory) -> Path:
    """A folder with what three processes of torchrun's found, and then two of them."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "program.py").write_text(WHOLE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone"]
    command = [*launcher, str(folder / "program.py"), str(folder)]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=300)
    return folder


@pytest.mark.parametrize("world", [2, 3])
def test_torchrun_takes_each_picture_once_and_gives_all_processes_the_whole(of_torchrun, world):
    x = images(31)
    x[8] = np.nan
    parts = [fit(x, batch_size=4, share=(i, world)) for i in range(world)]
    expected = parts[0].merge(*parts[1:])
    assert expected.found.layers[0].seen == 30
    for rank in range(world):
        found = Found.load(of_torchrun / f"whole.{world}.{rank}.npz")
        assert found.shares == expected.found.shares
        assert all(a.arrays()["images"].tobytes() == b.arrays()["images"].tobytes()
                   for a, b in zip(found.layers, expected.found.layers, strict=True))  # fmt: skip
        assert same(type("G", (), {"found": found}), expected)
    assert len(list(of_torchrun.glob(f"{world}.*of{world}.npz"))) == world
    failed, *told = ((of_torchrun / f"error.{world}.{rank}").read_text() for rank in range(world))
    assert failed.startswith("InvalidInput") and "22" in failed
    assert told == [f"OtherProcessFailed: process 0 failed: {failed}"] * (world - 1)


SLOW = """
import json, os, signal, sys, time
from test_filter_grid import *

class Slow(Mapped):
    def __getitem__(self, i):
        time.sleep(0.004)
        return super().__getitem__(i)

def started(path):
    if pid := os.fork():
        return pid
    fit(Slow(images(60)), batch_size=4, checkpoint=path, every=0)
    os._exit(0)

Slow.__name__ = "Mapped"
for path, count, end_after in map(json.loads, sys.stdin):
    processes = [started(path) for _ in range(count)]
    if end_after is not None:
        time.sleep(end_after)
        for process in processes:
            os.kill(process, signal.SIGKILL)
    ends = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    print(json.dumps(ends), flush=True)
"""
"""For each path: some processes that mine to one checkpoint, killed after a while if asked for; then how they ended."""


@pytest.fixture(scope="module")
def mines():
    """Starts such processes, all from one that has imported what they need."""
    program = [sys.executable, "-c", SLOW]
    with subprocess.Popen(
        program, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def start(path: Path, count: int, end_after: float | None = None):
            print(json.dumps([str(path), count, end_after]), file=process.stdin, flush=True)
            return process.stdout

        yield start
        process.stdin.close()


@pytest.mark.parametrize(("seed", "kills"), [(0, 6), pytest.param(1, 20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_to_the_same_bits(mines, tmp_path, seed, kills):
    """Kills in a row, each of the process that resumed from the one before."""
    path, rng, ends = tmp_path / "grid.npz", random.Random(seed), []
    for _ in range(kills):
        ends += json.loads(mines(path, 1, rng.uniform(0, 0.25)).readline())
        if path.exists():
            load_archive(path)  # whole, whenever the process died
    assert -signal.SIGKILL in ends and {*ends} <= {-signal.SIGKILL, 0}
    grid = fit(mapped(images(60)), batch_size=4, checkpoint=path)
    assert same(grid, fit(images(60), batch_size=4))


def mapped(x):
    from test_filter_grid import Mapped

    return Mapped(x)


def test_two_writers_leave_a_whole_file(mines, tmp_path):
    path = tmp_path / "grid.npz"
    answer = mines(path, 2)
    while not select.select([answer], [], [], 0.02)[0]:
        if path.exists():
            load_archive(path)
    assert json.loads(answer.readline()) == [0, 0]
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
