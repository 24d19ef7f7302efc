"""Run a model on many windows of its input: by which engine, in what batches, and what to do when one fails.

Two kinds of engine give the same numbers. :class:`FullEngine` calls the model on covered copies of the input;
:class:`IncrementalEngine` computes again only what each window changed, and one of its windows is compared with a whole
pass, as no tape shows code that hides from PyTorch. Every batch is work done: the first ones are timed, and the faster
engine and batch size go on.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from deconvviz.errors import DeconvvizError, UnsupportedModel, WindowFailed
from deconvviz.incremental import CleanPass, Outcome, Plan, alike
from deconvviz.memory import how_many_fit, out_of_memory
from deconvviz.occlusion.windows import Windows

FIRST_BATCH = 24
LARGEST_BATCH = {"cpu": 256}
"""Windows in a batch: to begin with, and at most (1024 on an accelerator), if they fit into the memory."""
OF_INPUTS = 64
"""What a pass of which no operations are known is taken to hold, in multiples of its inputs: VGG's takes 43 times."""
WORTH_GROWING = 1.03
"""The gain in speed for which a batch is doubled again."""
TF32 = 2**-10
"""The step of the type that an NVIDIA GPU may filter in, where float32 is asked for."""
SURE = 1.5
"""From this saving of multiply-adds on, whole passes need not even be tried."""
Chosen = NDArray[np.int64]
Rows = dict[str, Tensor]
"""Named results of B windows, (B, ...) each."""


class Engine(Protocol):
    """Evaluates windows."""

    work: float
    """What the last batch took, in units that compare batches of this engine with each other."""
    memory: float
    """Bytes that one window takes, about."""

    def evaluate(self, chosen: Chosen) -> Rows:
        """The results of the windows ``chosen``."""


class FullEngine:
    """Calls ``run`` on copies of the inputs (B * N, ...), each of the B windows covered in all N images."""

    def __init__(
        self,
        run: Callable[[tuple[Tensor, ...], int], Rows],
        inputs: Sequence[Tensor],
        covered: int,
        windows: Windows,
        fill: Tensor,
        channels_last: bool = False,
    ) -> None:
        self._run, self._inputs, self._covered = run, tuple(inputs), covered
        self._windows, self._fill, self._channels_last = windows, fill, channels_last
        self.work, self.memory = 0.0, float(OF_INPUTS * sum(tensor.nbytes for tensor in inputs))

    def evaluate(self, chosen: Chosen) -> Rows:
        """See :class:`Engine`."""
        self.work = len(chosen)
        copies = [
            self._windows.cover(tensor, self._fill, chosen)
            if i == self._covered
            else tensor.repeat(len(chosen), *[1] * (tensor.dim() - 1))
            for i, tensor in enumerate(self._inputs)
        ]
        if self._channels_last:
            copies[self._covered] = copies[self._covered].contiguous(memory_format=torch.channels_last)
        try:
            return self._run(tuple(copies), len(chosen))
        except Exception as error:
            if not self._channels_last or out_of_memory(error):
                raise
        self._channels_last = False  # the model may need its own layout, as for x.view(len(x), -1)
        return self.evaluate(chosen)


class IncrementalEngine:
    """Computes again what the windows changed in each image's clean pass; ``finish`` makes the results of it."""

    def __init__(
        self,
        passes: Sequence[CleanPass],
        images: Tensor,
        windows: Windows,
        fill: Tensor,
        finish: Callable[[Iterable[Outcome], int], Rows],
    ) -> None:
        self._passes, self._images, self._windows = tuple(passes), images, windows
        self._fill, self._finish = fill.expand(images.shape), finish
        self._labels, self._order = np.zeros(len(windows), np.int64), np.zeros(0, np.int64)
        self.work, self.memory = 0.0, float(passes[0].peak)  # one image after the other

    def arranged(self, order: Chosen) -> tuple[Chosen, Chosen]:
        """Windows so that those that are computed together follow each other; and where each such group begins."""
        if not np.array_equal(order, self._order):
            firsts = self._windows.firsts[:, order]
            self._labels[order] = alike(self._passes[0], firsts, self._windows.size)
            self._order = order
        order = order[np.argsort(self._labels[order], kind="stable")]
        return order, np.flatnonzero(np.diff(self._labels[order], prepend=-1))

    def sure(self, order: Chosen) -> bool:
        """Whether the windows that change most still save so much that whole passes are not worth a try."""
        if not len(order):
            return True
        plan = self._plan(self._passes[0], self.arranged(order)[0][-FIRST_BATCH:])
        return plan.whole_cost >= SURE * plan.cost

    def evaluate(self, chosen: Chosen) -> Rows:
        """See :class:`Engine`."""
        return self._finish(self._outcomes(chosen), len(chosen))

    def _outcomes(self, chosen: Chosen) -> Iterator[Outcome]:
        """Of each image; whoever takes them keeps none, as each holds its image's pass."""
        for clean, image, fill in zip(self._passes, self._images, self._fill, strict=True):
            plan = self._plan(clean.complete(), chosen)
            self.work = float(plan.cost)
            yield plan.run(self._windows.patches(image, fill, chosen))

    @property
    def rounding(self) -> float:
        """To what share of a result two ways to compute it may differ: by the coarsest type in the pass."""
        steps = [torch.finfo(t.dtype).eps for t in self._passes[0].contents.values() if t.is_floating_point()]
        coarse = self._images.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        return float(max(*steps, TF32 if coarse else 0.0) ** 0.5)

    def _plan(self, clean: CleanPass, chosen: Chosen) -> Plan:
        return Plan(clean, self._windows.firsts[:, chosen], self._windows.size, self._labels[chosen])


def sweep(
    engine: str,
    changed: IncrementalEngine | None,
    whole: Sequence[FullEngine],
    order: Chosen,
    clean: Rows,
    batch: int | None = None,
    device: str = "cpu",
    progress: bool = False,
    scales: Rows | None = None,
) -> Iterator[tuple[Chosen, Rows]]:
    """Evaluate every window of ``order``, those that cost most first.

    Args:
        engine: ``"auto"``, ``"incremental"`` or ``"full"``.
        changed: the incremental engine, if there can be one.
        whole: the full engines, of which the faster one is taken.
        order: the windows' numbers.
        clean: the results without a window, without their first axis; those named are compared.
        batch: windows in a batch; by default what measures fastest.
        device: where the model is.
        progress: show a bar.
        scales: of what magnitude are the terms of a named result that is a sum; by default as large as the result.

    Yields:
        The numbers of some windows, and their results.

    Raises:
        WindowFailed: the model raised, with the window's number.
        UnsupportedModel: incremental inference alone was asked for, and is not right for the model.
    """
    if not len(order):  # of more processes than windows, some have none
        return
    groups, left = np.zeros(1, np.int64), order
    fit = how_many_fit((changed or whole[0]).memory, device)
    largest = int(max(1, min(LARGEST_BATCH.get(device, 1024), fit)))
    references = {name: _Reference(rows, (scales or {}).get(name, rows)) for name, rows in clean.items()}

    def fastest(changed: IncrementalEngine | None) -> _Pace:
        return _Pace(changed, whole, _alone(whole[0], order, references) if batch is None else batch, largest)

    confirmed, sure = False, engine == "incremental"
    if changed is not None:
        try:
            left, groups = changed.arranged(order)
            sure = sure or changed.sure(order)
        except Exception as error:
            if engine != "auto":
                raise
            _warn(error)
            changed = None
    pace = _Pace(changed, (), batch, largest) if changed is not None and sure else fastest(changed)
    with tqdm(total=len(order), disable=not progress, desc="occlusion", unit="window") as bar:
        while len(left):
            chosen_by, size = pace.choice()
            first = len(left) - size if batch is not None or len(left) > 1.5 * size else 0
            if batch is None and chosen_by is changed:  # whole groups, if they fit
                begin = int(groups[np.searchsorted(groups, max(0, first), side="right") - 1])
                first = begin if len(left) - begin <= pace.largest else first
            chosen = left[max(0, first) :]
            start = time.perf_counter()
            try:
                results = chosen_by.evaluate(chosen)
                if device != "cpu":
                    getattr(torch, device).synchronize()
                seconds = time.perf_counter() - start
                if chosen_by is changed and not confirmed:
                    expected = whole[-1].evaluate(chosen[-1:])  # channels_last, as its own steps are
                    _confirm(results, expected, references, changed.rounding)
                    confirmed = True
            except Exception as error:
                if out_of_memory(error) and len(chosen) > 1:
                    pace.halve(len(chosen))
                    continue
                if chosen_by is changed and engine == "auto":
                    _warn(error)
                    changed, pace = None, fastest(None)
                    continue
                if isinstance(error, DeconvvizError):
                    raise
                failure = _failure(chosen_by, chosen, error)
                raise failure from error
            pace.took(chosen_by, size, len(chosen), seconds)
            left = left[: len(left) - len(chosen)]
            bar.update(len(chosen))
            yield chosen, results


def _warn(error: Exception) -> None:
    warnings.warn(f"incremental inference failed, so whole passes go on: {type(error).__name__}: {error}", stacklevel=4)


def _confirm(found: Rows, expected: Rows, references: Mapping[str, _Reference], rounding: float) -> None:
    """Compare the last of some windows with what a whole pass gives for it.

    Raises:
        UnsupportedModel: they differ.
    """
    for name, reference in references.items():
        if not reference.same(found[name][-1], expected[name][-1], rounding):
            raise UnsupportedModel(
                f"the {name} of a window differs from a whole pass's: the model computes something that its operations "
                "do not show (scripted code, a thread, random numbers), or its images depend on each other"
            )


class _Reference:
    """A named result without a window, and the magnitude that rounding is measured by."""

    def __init__(self, clean: Tensor, terms: Tensor) -> None:
        self._clean = clean if clean.is_floating_point() else clean.float()
        self.scale = float(terms.abs().nan_to_num().max()) if terms.numel() else 0.0

    def same(self, found: Tensor, expected: Tensor, rounding: float) -> bool:
        """Whether two results are one, but for rounding and a twentieth of how far they are from the clean one."""
        if not self._clean.numel():
            return True
        found, expected = (t if t.is_floating_point() else t.float() for t in (found, expected))
        change = (expected - self._clean).abs().max()
        return not bool((found - expected).abs().max() > 0.05 * change + rounding * self.scale)


def _alone(engine: FullEngine, order: Chosen, references: Mapping[str, _Reference]) -> int | None:
    """1 if windows in one batch depend on each other, or a batch of two can't be had; else ``None``."""
    first, last = order[0], order[-1]
    if first == last:
        return 1
    try:
        batches = [np.asarray(numbers) for numbers in ((first, last), (last, last), (last,))]
        beside, twice, single = (engine.evaluate(numbers) for numbers in batches)
    except Exception:  # a window that fails is found, and named, later
        return 1
    for name, reference in references.items():
        atol = 1e-6 * reference.scale
        if not torch.allclose(beside[name][-1], twice[name][-1], rtol=1e-5, atol=atol, equal_nan=True):
            return 1
        if not reference.same(twice[name][-1], single[name][-1], TF32**0.5):  # batches of two sizes round otherwise
            return 1
    return None


class _Pace:
    """Which engine runs the next batch, and how large it is."""

    def __init__(
        self,
        changed: IncrementalEngine | None,
        whole: Sequence[FullEngine],
        batch: int | None,
        largest: int,
    ) -> None:
        first = min(FIRST_BATCH, largest) if batch is None else batch
        self._fixed, self.largest = batch is not None, largest if batch is None else batch
        self._trials: list[tuple[Engine, int]] = []
        if len(whole) + (changed is not None) > 1:
            self._trials = [(engine, first) for engine in whole]
            if changed is not None:
                self._trials = [(changed, max(1, first // 2)), (changed, first), *self._trials]
        self._engine: Engine = changed if changed is not None else whole[0]
        self._size, self._speeds = first, dict[int, float]()
        self._best: dict[int, tuple[float, Engine]] = {}

    def choice(self) -> tuple[Engine, int]:
        """The engine and the batch to run next."""
        if self._trials:
            engine, size = self._trials[0]
            return engine, min(size, self.largest)
        return self._engine, min(self._size, self.largest)

    def took(self, engine: Engine, size: int, windows: int, seconds: float) -> None:
        """Learn from a batch of about ``size`` windows."""
        seconds = max(seconds, 1e-9)
        speed = engine.work / seconds
        if self._trials:
            self._trials.pop(0)
            self._best[id(engine)] = windows / seconds, engine  # of two the later: the first one warmed up
            if not self._trials:
                self._engine = max(self._best.values(), key=lambda item: item[0])[1]
        elif not self._fixed and windows >= self._size == size:
            self._speeds.setdefault(size, speed)
            before = self._speeds.get(size // 2)
            if before is not None and speed < WORTH_GROWING * before:
                self._fixed = True
                self._size = size if speed > before else size // 2
            elif 2 * size <= self.largest:
                self._size = 2 * size
            else:
                self._fixed = True

    def halve(self, windows: int) -> None:
        """After a batch that did not fit into the memory."""
        self.largest = max(1, windows // 2)


def _failure(engine: Engine, chosen: Chosen, error: Exception) -> WindowFailed:
    """Which of the windows the model fails on: the first that fails alone."""
    numbers = sorted(chosen.tolist())
    where = f"windows {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"window {numbers[0]}"
    for number in numbers if len(numbers) > 1 else ():
        try:
            engine.evaluate(np.asarray([number]))
        except Exception as alone:
            where, error = f"window {number}", alone
            break
    return WindowFailed(f"the model failed at {where}: {type(error).__name__}: {error}")
