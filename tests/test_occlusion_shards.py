"""Windows shared among processes by torchrun: every one gets the numbers of a single process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_occlusion import toy
from trained_like import pictures

from deconvviz import OcclusionSensitivity
from deconvviz.errors import InvalidInput
from deconvviz.occlusion import Refine

HERE = Path(__file__).parent
CASES = [(engine, patch) for engine in ("auto", "full", "incremental") for patch in (6, 20)]
"""With a patch of 20 on 20 pixels there is one window, so that all but one process have none."""


def results(shard: bool) -> list[torch.Tensor]:
    """Maps and attributions of two pictures."""
    model, images, found = toy(), pictures(2, 20), []
    for engine, patch in CASES:
        run = OcclusionSensitivity(model, engine=engine, shard=shard)
        found.append(run.attribute(images, (3, patch, patch), (3, 3, 3), target=[1, 2], baselines="mean"))
        for refine in (None, Refine(2, 0.2, 3)):
            maps = run.maps(images, patch, 3, "2", targets=[0, 4], refine=refine)
            found += [maps.activation_cells, maps.score_cells, maps.label_cells, maps.label_scores]
            found += [refinement.computed for refinement in maps.refinements]
    return found


PROGRAM = """
import os, sys
import torch
from torch import distributed
from test_occlusion_shards import failures, results
folder, rank = sys.argv[1], int(os.environ["RANK"])
for world in (3, 2):  # the last process stands aside then
    if rank < world:
        two = {"init_method": f"file://{folder}/meet", "rank": rank, "world_size": 2} if world == 2 else {}
        distributed.init_process_group("gloo", **two)
        torch.save((failures(rank), results(True)), f"{folder}/{world}.{rank}.pt")
        distributed.destroy_process_group()
"""


def failures(rank: int) -> list[str]:
    """What calls raise of which process 1 fails: at a window twice, and outside of the sweep."""
    images, model, texts = pictures(1, 20), toy(), []

    def raising(module, inputs):
        if rank == 1 and (inputs[0][:, :, 10, 10] == 0).all(1).any():
            raise ValueError("too dark")

    model.register_forward_pre_hook(raising)
    run = OcclusionSensitivity(model, engine="full", shard=True)
    for call in (
        lambda: run.attribute(images, (3, 6, 6), 3, target=1),
        lambda: run.maps(images, 6, 3, "2"),
        lambda: run.maps(images, 6, 3, "2", score="odds" if rank == 1 else "logit"),
    ):
        try:
            call()
            texts.append("no error")
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


def environment(**more: str) -> dict[str, str]:
    """A process's, from which it finds these tests and what they test."""
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def of_torchrun(tmp_path_factory):
    """The failures and results of each of three processes of torchrun's, and then of two of them."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone"]
    command = [*launcher, str(folder / "program.py"), str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {world: [torch.load(folder / f"{world}.{rank}.pt") for rank in range(world)] for world in (2, 3)}


@pytest.mark.parametrize("world", [2, 3])
def test_every_process_has_the_result_of_one(of_torchrun, world):
    """Also after calls that failed."""
    expected = results(False)
    for _, found in of_torchrun[world]:
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            if a.is_floating_point():
                assert b.abs().max() > 0 and (a - b).abs().max() <= 1e-12 * b.abs().max()
            else:
                assert torch.equal(a, b)


@pytest.mark.parametrize("world", [2, 3])
def test_what_fails_in_one_process_raises_in_all(of_torchrun, world):
    """At a window, and outside of the sweep; the next call works as if nothing had been."""
    first, second, *others = (texts for texts, _ in of_torchrun[world])
    assert all(text.startswith("WindowFailed: the model failed at window ") for text in second[:2])
    assert all("ValueError: too dark" in text for text in second[:2])
    assert second[2].startswith("InvalidInput")
    for texts in (first, *others):
        assert texts == [f"OtherProcessFailed: process 1 failed: {text}" for text in second]


ENDING = """
import os, signal, sys
import torch
from torch import distributed
from test_occlusion import toy
from trained_like import pictures
from deconvviz import OcclusionSensitivity
signal.signal(signal.SIGINT, signal.default_int_handler)  # what was started in the background ignores it
distributed.init_process_group("gloo")
rank, model = distributed.get_rank(), toy()

def ending(module, inputs):
    if rank == 1 and (inputs[0][:, :, 10, 10] == 0).all(1).any():
        os.kill(os.getpid(), signal.Signals[sys.argv[2]])

model.register_forward_pre_hook(ending)
hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
before, text = hooks(), "no error"
try:
    OcclusionSensitivity(model, engine="full", shard=True).attribute(pictures(1, 20), (3, 6, 6), 3, target=1)
except BaseException as error:
    text = f"{type(error).__name__}: {error}"
torch.save([text, hooks() == before], f"{sys.argv[1]}/{rank}.pt")
os._exit(0)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_when_a_process_ends_the_others_do_not_wait(tmp_path, how):
    """Killed, or by Ctrl-C; started by hand, as torchrun itself ends the others."""
    program = tmp_path / "program.py"
    program.write_text(ENDING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command, started = [sys.executable, str(program), str(tmp_path), how], []
    for rank in ("0", "1"):
        process = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=rank)
        started.append(subprocess.Popen(command, env=process))
    try:
        first, second = (process.wait(timeout=120) for process in started)
    finally:
        for process in started:
            process.kill()
    assert first == 0 and second == (-signal.SIGKILL if how == "SIGKILL" else 0)
    text, left_as_found = torch.load(tmp_path / "0.pt")
    assert text.startswith("OtherProcessFailed: another process was killed") and left_as_found
    if how == "SIGINT":
        assert torch.load(tmp_path / "1.pt") == ["KeyboardInterrupt: ", True]


def test_without_a_process_group_the_remedy_is_said():
    run = OcclusionSensitivity(toy(), shard=True)
    with pytest.raises(InvalidInput, match="init_process_group"):
        run.attribute(pictures(1, 20), (3, 6, 6), 3, target=1)
    with pytest.raises(InvalidInput, match="init_process_group"):
        run.maps(pictures(1, 20), 6, 3, "2")
