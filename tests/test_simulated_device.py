"""An accelerator without an accelerator: its tensors don't mix with the CPU's, and it may lack float64, as MPS does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

FOLDER = Path(__file__).parent / "simulated_device"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp("device") / "device.so"
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    source = FOLDER / "device.cpp"
    options = [*includes, *libraries, "-shared", "-fPIC", "-std=c++20", "-O0"]
    subprocess.run([compiler, *options, source, "-o", path, "-ltorch_cpu", "-lc10"], check=True)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("lacks", [{}, {"SIMULATED_WITHOUT_DOUBLE": "1"}], ids=["as CUDA", "as MPS"])
def test_everything_runs_on_another_device(library, lacks):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FOLDER / "checks.py"]
    environment = {**os.environ, "SIMULATED_DEVICE": str(library), **lacks}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parent.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
