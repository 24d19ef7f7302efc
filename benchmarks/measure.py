"""Time alternatives side by side in one process, and their peak memory in fresh ones."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import captum
import torch
import torchvision

import deconvviz


def machine() -> str:
    """The machine and the versions, for the head of a table."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    return (
        f"{cpu}, {device}; Python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, captum {captum.__version__}, deconvviz {deconvviz.__version__}"
    )


def side_by_side(alternatives: Mapping[str, Callable[[], object]], runs: int = 5, warm_up: int = 1) -> dict[str, float]:
    """The median seconds of each alternative, run in turns so that all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(warm_up + runs):
        for name, run in alternatives.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_memory(script: str, *arguments: str, runs: int = 3) -> float:
    """MiB by which ``script arguments`` raises a fresh process's peak over where :func:`report_peak` began: the median
    of several processes, as how freed memory is used again differs by some MiB."""
    peaks = []
    for _ in range(runs):
        command = [sys.executable, script, *arguments]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks.append(float(output.split()[-1]))
    return statistics.median(peaks)


def report_peak(run: Callable[[], object]) -> None:
    """In the fresh process: print how far ``run`` raises the peak over what is resident (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    run()
    print((_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    """A line of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
