"""The deconvnet: what in the picture made a feature map fire (Zeiler & Fergus, section 2.1).

Take one activation of a layer, set all others to zero, and go back to the pixels: max pools are undone by
the switches of the forward pass, rectifiers rectify the signal, filters are applied transposed.

With signal g and forward input x: saliency passes g·1[x>0], guided backprop g·1[x>0]·1[g>0], the deconvnet
g·1[g>0]. Its pictures are sharp partly because the switches restore image structure (Mahendran & Vedaldi
2016; Nie et al. 2018), so they show what a unit responds to far better than why a class was chosen: look at
single positions, and beside a weight-randomised model (:mod:`deconvviz.comparison`).

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3))
>>> images = torch.randn(2, 3, 16, 16)
>>> with Deconvnet(model) as deconv:
...     output = model(images)              # existing code: recorded
...     pixels = deconv.project("3", [0, 2])
>>> pixels.shape
torch.Size([2, 2, 3, 16, 16])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from captum.attr import Attribution, NeuronAttribution
from captum.log import log_usage
from torch import Tensor, nn

from deconvviz.boxes import boxed
from deconvviz.capture import Recorder, require_module, watch
from deconvviz.check import CheckReport, explains
from deconvviz.errors import FeatureMapOutOfRange, InvalidInput, NoForwardPass
from deconvviz.inputs import input_tensors, integer, require_finite
from deconvviz.layers import Layer, described, find_call, locate, only_output, only_value
from deconvviz.projection import back_to_inputs, project
from deconvviz.switches import OVERLAPS
from deconvviz.tape import Tape, flatten
from deconvviz.targets import neuron_seed, target_seed
from deconvviz.units import FeatureMaps, Position, feature_maps, require, seeds, strongest


class Deconvnet(Attribution):
    """Projects feature maps of ``model`` to pixels; records the passes that existing code makes.

    Args:
        model: any ``nn.Module``; it is never changed. In train mode too, a pass of ours leaves batch norm's
            statistics and the random state as they were. A copy or a pickle of a ``Deconvnet`` records its own copy
            of the model.
        overlap: where pooling windows overlap and chose the same input, ``"sum"`` their signals (the
            adjoint, as captum) or ``"overwrite"`` (as ``nn.MaxUnpool2d``).
        on_unsupported: at an operation without a rule, ``"raise"`` or take the plain ``"gradient"``.

    Raises:
        UnsupportedModel: not a module, or a scripted or compiled one.
        InvalidInput: an unknown option, or a layer.
    """

    def __init__(self, model: nn.Module, overlap: str = "sum", on_unsupported: str = "raise") -> None:
        self.model = require_module(model)
        Attribution.__init__(self, model)
        layers = [name for name, module in self.model.named_modules() if overlap is module or overlap == name]
        if layers and overlap not in OVERLAPS:  # as captum's classes of layers are built
            raise InvalidInput(
                f"a Deconvnet takes no layer: give {layers[0]!r} to project(layer, fmap), or take "
                "NeuronDeconvnet(model, layer)"
            )
        require("overlap", overlap, OVERLAPS)
        require("on_unsupported", on_unsupported, ("raise", "gradient"))
        self.overlap = overlap
        self.gradient = on_unsupported == "gradient"
        self._recorder = Recorder(self.model, self.gradient)
        self._counts: dict[str, int] = {}
        self._replayed: tuple[Tape | None, int, Tensor | None] = (None, -1, None)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: it records its own model's passes, if this does; the recorded pass stays here."""
        return {**vars(self), "_recorder": self._recorder.close.alive, "_replayed": (None, -1, None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["model"] if vars(state["model"]) else nn.Module()  # not built yet, if it holds its own deconvnet
        self.__dict__.update(state, _recorder=Recorder(model, state["gradient"]))
        if not state["_recorder"]:
            self.close()

    def __enter__(self) -> Deconvnet:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop recording: take the two hooks off the model and forget the recorded pass."""
        self._recorder.close()
        self._recorder.tape = None
        self._replayed = (None, -1, None)

    def project(
        self,
        layer: Layer,
        fmap: FeatureMaps = None,
        *,
        inputs: Tensor | tuple[Tensor, ...] | None = None,
        position: Position = "max",
        seed: str = "activation",
    ) -> Any:
        """Feature maps of a layer, back to pixels.

        Args:
            layer: a dotted name, a module, or a call such as ``"layer1.0.relu#2"``. Its output is one tensor
                (N, C, *S), the feature maps on axis 1.
            fmap: one map, several (a sequence or slice), ``"strongest"`` (each image's map of the largest
                total activation), or ``None`` for all C.
            inputs: the images (N, C, H, W), or a tuple as the model takes them, for a pass of ours. It stops at
                the layer, if that is a call or a whole pass has shown that it runs once. By default the last
                recorded pass of ``model(...)``.
            position: ``"max"``, the strongest position of each map in each image (the paper's single
                activation); ``"all"``, the whole map; or a position in map cells, (y, x) for every image or a
                tensor (N, 2).
            seed: start from the ``"activation"`` or from ``"one"``.

        Returns:
            (N, C, H, W) for one map, (N, M, C, H, W) for several; a tuple of these for a model with several
            inputs. Signed, in the units of the activation per pixel; zero outside the receptive field.

        Raises:
            NoForwardPass, UnknownLayer, AmbiguousLayer, LayerNotRun, FeatureMapOutOfRange,
            PositionOutOfRange, UnsupportedOperation, InvalidInput: as their names say.
        """
        require("seed", seed, ("activation", "one"))
        tape, value, activation = self._layer(layer, inputs)
        single, maps = feature_maps(activation, fmap)
        make = seeds(activation.to(tape.tensors[0].dtype), maps, position, seed)
        pixels = project(tape, value, make, maps.shape[1], self.overlap)
        listed = tape.listed and all(p.dim() == activation.dim() for p in pixels)  # pictures (C, H, W)
        pixels = [p if listed else p.movedim(0, 1) for p in pixels]
        pixels = [p.select(0 if listed else 1, 0) if single else p.contiguous() for p in pixels]
        return pixels[0] if len(pixels) == 1 and not isinstance(inputs, (tuple, list)) else tuple(pixels)

    def strongest(self, layer: Layer, k: int = 1, *, inputs: Any = None) -> Tensor:
        """The ``k`` feature maps (N, k) with the largest total activation in each image, largest first."""
        _, _, activation = self._layer(layer, inputs)
        expected = f"layer {layer!r} has {activation.shape[1]} feature maps: expected 1 to {activation.shape[1]}"
        try:
            k = integer(k)
        except TypeError:
            raise InvalidInput(f"k is {k!r}; {expected}") from None
        if not 1 <= k <= activation.shape[1]:
            raise FeatureMapOutOfRange(f"k is {k}; {expected}")
        return strongest(activation, k)

    def strongest_position(self, layer: Layer, fmap: FeatureMaps, *, inputs: Any = None) -> list[tuple[int, ...]]:
        """Where each image's feature map is strongest, in map cells: one tuple, (y, x), an image."""
        _, _, activation = self._layer(layer, inputs)
        single, maps = feature_maps(activation, fmap)
        if not single:
            raise InvalidInput(f"fmap is {fmap!r}; expected one feature map or 'strongest'")
        cells = activation[torch.arange(len(maps), device="cpu"), maps[:, 0]]
        flat = cells.reshape(len(cells), -1).argmax(1).tolist()
        return [tuple(int(i) for i in np.unravel_index(cell, cells.shape[1:])) for cell in flat]

    @log_usage()  # captum's wrappers call what it wraps
    def attribute(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Any:
        """The model's output back to pixels, as ``captum.attr.Deconvolution`` in arguments and meaning.

        Returns:
            A tensor of the shape of ``inputs``, or a tuple of them if ``inputs`` is one.

        Raises:
            TargetOutOfRange, UnsupportedOperation, InvalidInput: as their names say.
        """
        tape, output = self._watch(inputs, additional_forward_args)
        value = only_output(tape.calls[-1])
        return _attributions(tape, value, target_seed(flatten(output)[0], target), self.overlap, inputs)

    def check(self, inputs: Any, additional_forward_args: Any = None) -> CheckReport:
        """How every operation of one pass goes back: exactly, generalised, or not at all.

        Mirrored images show whether the operations seen are all that the model does.
        """
        tape, _ = self._watch(inputs, additional_forward_args)
        mirrored = tuple(tensor.flip(-1) for tensor in tape.tensors)
        _, output = self._watch(mirrored, additional_forward_args)
        return CheckReport.of(tape, explains(tape, mirrored, output))

    def _watch(self, inputs: Any, additional: Any, layer: tuple[str, int | None] | None = None) -> Any:
        extra = additional if isinstance(additional, tuple) else () if additional is None else (additional,)
        tape, output = watch(self.model, input_tensors(inputs, self.model), extra, layer, self.gradient)
        _require_batch(tape)
        if tape.complete:
            self._counts = tape.counts()
        return tape, output

    def _layer(self, layer: Layer, inputs: Any) -> tuple[Tape, int, Tensor]:
        """The pass, the value that the layer put out in it, and that value's content."""
        name, number = locate(self.model, layer)
        if inputs is not None:
            recorded = self._recorder.tape
            counts = self._counts or (recorded.counts() if recorded is not None and recorded.complete else {})
            if number is None and counts.get(name) == 1:
                number = 1  # it runs once, so the pass can stop there
            tape, output = self._watch(inputs, None, (name, number))
            value = only_output(find_call(tape, name, number))
            return tape, value, _maps(flatten(output)[0], name)
        tape = self._recorded()
        value = only_output(find_call(tape, name, number))
        if self._replayed[:2] != (tape, value):
            self._replayed = (tape, value, tape.replay(value))
        return tape, value, _maps(self._replayed[2], name)

    def _recorded(self) -> Tape:
        tape = self._recorder.tape
        if tape is None:
            raise NoForwardPass(
                "no forward pass has been recorded (those under torch.func are not, nor any after close()): call "
                "model(images) first, or give inputs=images"
            )
        if tape.stale():
            raise NoForwardPass(
                "the model's weights or the images were changed in place after the recorded pass, so its "
                "switches no longer fit: call model(images) again"
            )
        _require_batch(tape)
        for tensor in tape.tensors:
            require_finite(tensor)
        return tape


class NeuronDeconvnet(NeuronAttribution):
    """A layer's neurons back to pixels, as ``captum.attr.NeuronDeconvolution`` in arguments and meaning.

    Args:
        model: any ``nn.Module``.
        layer: a module (of several calls the last, as in captum), a dotted name, or a call ``"relu#2"``.
        device_ids: accepted for captum's sake; a ``DataParallel`` model is run on its wrapped module.
        overlap, on_unsupported: as for :class:`Deconvnet`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer,
        device_ids: list[int] | None = None,
        overlap: str = "sum",
        on_unsupported: str = "raise",
    ) -> None:
        NeuronAttribution.__init__(self, model, layer, device_ids)
        self.deconv = Deconvnet(model, overlap, on_unsupported)
        self.deconv.close()  # nothing to record: each call makes its own pass
        self.name, self.number = locate(self.deconv.model, layer)

    @log_usage()
    def attribute(
        self,
        inputs: Any,
        neuron_selector: int | tuple[int | slice, ...] | Callable[..., Tensor],
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
    ) -> Any:
        """The selected neuron back to pixels.

        Args:
            inputs: a tensor (N, ...) or a tuple of them.
            neuron_selector: an int (a layer of shape (N, F)), a tuple of ints and slices without the batch
                axis (the neurons of a slice are summed), or a function of the layer's output giving (N,).
            additional_forward_args: what else the model takes.
            attribute_to_neuron_input: select in the layer's input instead of its output.

        Returns:
            A tensor of the shape of ``inputs``, or a tuple of them if ``inputs`` is one.

        Raises:
            TargetOutOfRange, LayerNotRun, UnsupportedOperation, InvalidInput: as their names say.
        """
        tape, output = self.deconv._watch(inputs, additional_forward_args, (self.name, self.number))
        number = self.number or tape.counts().get(self.name)
        call = find_call(tape, self.name, number)
        if attribute_to_neuron_input:
            value = only_value(call.inputs, f"the input of {described(call.name)}")
            activation = tape.replay(value)
        else:
            value, activation = only_output(call), flatten(output)[0]
        seed = neuron_seed(activation, neuron_selector)
        return _attributions(tape, value, seed, self.deconv.overlap, inputs)


def _require_batch(tape: Tape) -> None:
    if any(tensor.shape[:1] == (0,) for tensor in tape.tensors):
        raise InvalidInput(f"the model was given shape {tuple(tape.tensors[0].shape)}; expected at least one image")
    if tape.unbatched():
        raise InvalidInput(
            f"the model was given shape {tuple(tape.tensors[0].shape)}; expected a batch, usually (N, C, H, W): "
            "inputs.unsqueeze(0) makes one of a single picture"
        )


def _maps(activation: Tensor | None, name: str) -> Tensor:
    if activation is None or activation.dim() < 2:
        shape = None if activation is None else tuple(activation.shape)
        raise InvalidInput(f"{described(name)} gives shape {shape}; expected feature maps (N, C, ...)")
    return activation


def _attributions(tape: Tape, value: int, seed: Tensor, overlap: str, inputs: Any) -> Any:
    back = back_to_inputs(tape, value, boxed(seed.to(tape.tensors[0].dtype)[None]), overlap)
    return tuple(b[0] for b in back) if isinstance(inputs, (tuple, list)) else back[0][0]
