"""The model is a guest's house: after any call, also one that raised, it is as it was found."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import pickle
import random
import threading
import tracemalloc
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import build
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from deconvviz import Deconvnet, DeconvvizError, NeuronDeconvnet, OcclusionSensitivity
from deconvviz.errors import NoForwardPass

HOOK_DICTS = [name for name, held in vars(nn.Module()).items() if "hook" in name and isinstance(held, dict)]
IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class House(nn.Module):
    """Everything that a careless guest disturbs: statistics, counters, caches, dropout, in-place writes."""

    trouble: type[BaseException] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.drop = nn.Dropout(0.5)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.RReLU())
        self.head = nn.Linear(4, 5)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("running", torch.ones(1))
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.running = self.running * 0.5
        if self.cache is None:
            self.cache = torch.ones(4, 1, 1)
        x = self.drop(self.pool(self.relu(self.bn(self.conv(x)))))
        if self.trouble is not None:
            raise self.trouble("in the model")
        x = self.relu(x + self.body(x)) * self.cache
        return self.head(F.relu_(x).mean((2, 3)))


def furnish(mode: str = "mixed") -> House:
    """A house in eval, train or mixed mode, partly frozen, with a gradient left from before."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        house = House().train(mode != "eval")
        nn.init.uniform_(house.bn.running_var, 0.5, 2.0)
        nn.init.normal_(house.bn.running_mean)
    if mode == "mixed":
        house.bn.eval()
        house.head.eval()
    house.conv.bias.requires_grad_(False)
    house.head.bias.grad = torch.ones(5)
    return house


def content(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().float().contiguous().numpy().tobytes()


def hooks(model: nn.Module) -> dict[tuple[str, str], list[int]]:
    """The identity of every hook of every module."""
    return {
        (name, kind): [id(hook) for hook in getattr(module, kind).values()]
        for name, module in model.named_modules()
        for kind in HOOK_DICTS
    }


def count_hooks(model: nn.Module) -> int:
    return sum(len(ids) for (_, kind), ids in hooks(model).items() if "with_kwargs" not in kind)


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that a guest could change, in comparable form: objects by identity, contents by their bits."""
    return {
        "hooks": hooks(model),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "buffers": {
            (name, key): (id(buffer), content(buffer))
            for name, module in model.named_modules()
            for key, buffer in module._buffers.items()
        },
        "parameters": {name: (id(p), content(p), p._version) for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grad": {name: content(p.grad) for name, p in model.named_parameters()},
        **surroundings(),
    }


def surroundings() -> dict[str, object]:
    """What lies around the model: random state, modes, global hooks."""
    return {
        "random": (bytes(torch.get_rng_state().numpy()), random.getstate()),
        "modes": [id(mode) for mode in _get_current_function_mode_stack()],
        "autograd": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "global hooks": len(nn.modules.module._global_forward_hooks) + len(nn.modules.module._global_forward_pre_hooks),
    }


CONTEXTS = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16),
}


class Bystander(TorchFunctionMode):
    """A mode of the user's."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


OWN_PASSES = {
    "project": lambda model: Deconvnet(model).project("body.0", 0, inputs=IMAGES),
    "project a reused layer": lambda model: Deconvnet(model).project("relu#2", [0, 1], inputs=IMAGES),
    "strongest": lambda model: Deconvnet(model).strongest("body", 2, inputs=IMAGES),
    "attribute": lambda model: Deconvnet(model).attribute(IMAGES, 1),
    "check": lambda model: Deconvnet(model).check(IMAGES),
    "neuron": lambda model: NeuronDeconvnet(model, "body").attribute(IMAGES, (0, 1, 1)),
    "neuron, at its input": lambda model: NeuronDeconvnet(model, "body").attribute(
        IMAGES, (0, 1, 1), attribute_to_neuron_input=True
    ),
}


def twice(model: nn.Module) -> None:
    """Stop at a layer: only the second pass, when its number of calls is known, does."""
    deconv = Deconvnet(model)
    deconv.check(IMAGES)
    deconv.project("body.0", 0, inputs=IMAGES)


OWN_PASSES["project, stopped at the layer"] = twice


# ── our own passes ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["eval", "train", "mixed"])
@pytest.mark.parametrize("action", OWN_PASSES)
def test_own_pass_leaves_everything_as_found(action, mode):
    house = furnish(mode)
    twin, before = copy.deepcopy(house), snapshot(house)
    OWN_PASSES[action](house)
    assert snapshot(house) == before
    torch.manual_seed(1)
    expected = twin(IMAGES)
    torch.manual_seed(1)
    assert torch.equal(house(IMAGES), expected)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["model", "pre-hook", "hook"])
@pytest.mark.parametrize("action", OWN_PASSES)
def test_own_pass_that_raises_leaves_everything_as_found(action, where, error):
    house = furnish("train")

    def raising(*arguments):
        raise error("in a hook")

    if where == "model":
        house.trouble = error
    elif where == "hook":
        house.bn.register_forward_hook(raising)
    else:
        house.pool.register_forward_pre_hook(raising)
    before = snapshot(house)
    if where == "model" and action == "project, stopped at the layer":
        action = "project"
    with pytest.raises(error, match="in "):
        OWN_PASSES[action](house)
    assert snapshot(house) == before


NOT_FINITE = IMAGES.clone().fill_(torch.nan)
BAD_ARGUMENTS = {
    "channels": lambda d: d.attribute(IMAGES[:, :2], 0),
    "NaN": lambda d: d.attribute(NOT_FINITE, 0),
    "target": lambda d: d.attribute(IMAGES, 99),
    "layer": lambda d: d.project("nowhere", 0, inputs=IMAGES),
    "call": lambda d: d.project("relu#9", 0, inputs=IMAGES),
    "ambiguous": lambda d: d.project("relu", 0, inputs=IMAGES),
    "fmap": lambda d: d.project("conv", 99, inputs=IMAGES),
    "position": lambda d: d.project("conv", 0, inputs=IMAGES, position=(99, 0)),
    "seed": lambda d: d.project("conv", 0, inputs=IMAGES, seed="two"),
    "k": lambda d: d.strongest("conv", 99, inputs=IMAGES),
    "check": lambda d: d.check(IMAGES[:, :2]),
    "neuron": lambda d: NeuronDeconvnet(d.model, "conv").attribute(IMAGES, (99, 0, 0)),
    "neuron's layer": lambda d: NeuronDeconvnet(d.model, "nowhere"),
}


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_argument_leaves_everything_as_found(bad):
    house = furnish("train")
    with Deconvnet(house) as deconv:
        before = snapshot(house)
        with pytest.raises(DeconvvizError):
            BAD_ARGUMENTS[bad](deconv)
        assert snapshot(house) == before


def test_images_are_not_written_to():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3))
    images = IMAGES.clone()
    Deconvnet(model).project("1", 0, inputs=images)
    Deconvnet(model).attribute(images, (0, 0, 0))
    assert torch.equal(images, IMAGES) and images._version == 0


def test_own_pass_between_forward_and_backward():
    """Autograd keeps batch norm's statistics for the pending backward: it must not find them written to."""
    house, twin = furnish("train"), furnish("train")
    for model in (house, twin):
        torch.manual_seed(0)
        loss = model(IMAGES).sum()
        if model is house:
            Deconvnet(house).attribute(IMAGES, 0)
        loss.backward()
    assert snapshot(house)["grad"] == snapshot(twin)["grad"]


def test_own_passes_in_an_autocast_region_before_a_forward():
    """Weights that autocast converts are shared within a region: ours, without autograd, must not be."""
    house, twin = furnish("eval"), furnish("eval")
    for model in (house, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16), Deconvnet(house) as deconv:
            if model is house:
                house(IMAGES)
                deconv.project("body.0", 0)
                deconv.project("body.0", 0, inputs=IMAGES)
            loss = model(IMAGES).float().sum()
        loss.backward()
    assert snapshot(house)["grad"] == snapshot(twin)["grad"]


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "autocast"])
@pytest.mark.parametrize("action", OWN_PASSES)
def test_own_pass_inside_a_context_leaves_everything_as_found(action, context):
    house = furnish("train")
    with CONTEXTS[context](), Bystander():
        before = snapshot(house)
        OWN_PASSES[action](house)
        assert snapshot(house) == before


def test_own_pass_of_one_leaves_the_recorded_pass_of_another():
    """Two deconvnets on one model: the pass of the second, stopped half way, is not the first one's."""
    house = furnish("eval")
    with Deconvnet(house) as first, Deconvnet(house) as second:
        house(IMAGES)
        expected, before = first.project("conv", 1), snapshot(house)
        for action in OWN_PASSES.values():
            action(house)
        second.check(2 * IMAGES)
        second.project("conv", 0, inputs=2 * IMAGES)
        assert snapshot(house) == before
        assert torch.equal(first.project("conv", 1), expected)
        assert torch.equal(second.project("conv", 1), expected)
    assert count_hooks(house) == 0


# ── hooks ────────────────────────────────────────────────────────────────────────────────────────────


def test_two_hooks_on_the_root_until_closed():
    house = furnish()
    before = snapshot(house)
    deconv = Deconvnet(house)
    attached = hooks(house)
    changed = [key for key, ids in before["hooks"].items() if attached[key] != ids and "with" not in key[1]]
    assert changed == [
        ("", "_forward_hooks"),
        ("", "_forward_hooks_always_called"),
        ("", "_forward_pre_hooks"),
    ]
    assert len(house._forward_hooks) == len(house._forward_pre_hooks) == 1
    with torch.random.fork_rng(), torch.no_grad():
        house(IMAGES)
        deconv.project("conv", 0)
        deconv.attribute(IMAGES, 0)
    assert hooks(house) == attached
    deconv.close()
    deconv.close()
    assert hooks(house) == before["hooks"]


@pytest.mark.parametrize("way", ["with", "with, by an error", "garbage collection", "neuron"])
def test_hooks_leave_with_the_deconvnet(way):
    house = furnish("eval")
    before = snapshot(house)["hooks"]
    if way == "garbage collection":
        deconv = Deconvnet(house)
        house(IMAGES)
        del deconv
    elif way == "neuron":
        neuron = NeuronDeconvnet(house, house.conv)
        assert hooks(house) == before
        neuron.attribute(IMAGES, (0, 0, 0))
    else:
        with contextlib.suppress(ZeroDivisionError), Deconvnet(house) as deconv:
            house(IMAGES)
            deconv.project("conv", 0)
            if way == "with, by an error":
                raise ZeroDivisionError
    gc.collect()
    assert hooks(house) == before


def test_users_hooks_fire_as_before():
    """Also those that change what passes, of every kind, on the root and on layers, set before and after."""
    fired = []

    def watchful(house):
        house.register_forward_pre_hook(lambda m, args: fired.append("root pre") or (args[0] * 2,))
        house.register_forward_pre_hook(
            lambda m, args, kwargs: fired.append("root pre kwargs") or (args, {}), with_kwargs=True
        )
        house.conv.register_forward_hook(lambda m, args, output: fired.append("conv") or output + 1)
        house.pool.register_forward_pre_hook(lambda m, args: fired.append("pool pre"))
        house.body[0].register_full_backward_hook(lambda m, grads, outs: fired.append("body backward"))
        house.register_forward_hook(lambda m, args, output: fired.append("root") or output * 3)

    alone = furnish("eval")
    watchful(alone)
    expected = alone(IMAGES)
    expected.sum().backward()
    sequence, ours = list(fired), furnish("eval")
    assert len(sequence) == 6
    with Deconvnet(ours) as deconv:
        watchful(ours)
        for _ in range(2):
            fired.clear()
            output = ours(IMAGES)
            output.sum().backward()
            assert fired == sequence and torch.equal(output, expected)
        assert deconv.project("conv", 0).abs().sum() > 0
        fired.clear()
        deconv.attribute(IMAGES, 0)
        assert fired == [name for name in sequence if name != "body backward"]
    fired.clear()
    assert torch.equal(ours(IMAGES), expected)
    assert fired == [name for name in sequence if name != "body backward"]


# ── the user's recorded pass ─────────────────────────────────────────────────────────────────────────


@functools.cache
def recordable(name: str) -> tuple[nn.Module, Tensor]:
    size = {"House": 12, "googlenet": 48}.get(name, 32)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return (furnish("eval") if name == "House" else build(name)), images


def tensors(output: object) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for t in output if t is not None]


def graph(tensor: Tensor) -> list[str]:
    """The names of a tensor's autograd graph, in depth-first order."""
    names, seen, stack = [], set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(type(node).__name__)
            stack += [following for following, _ in node.next_functions]
    return names


def run(model: nn.Module, images: Tensor, context: contextlib.AbstractContextManager) -> dict[str, object]:
    """One pass, and a backward if it can be had: every bit that the user could see."""
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(5)
    with context:
        output = tensors(model(images))
    seen = {
        "output": [content(t) for t in output],
        "form": [(t.shape, t.stride(), t.dtype, t.requires_grad, t.is_inference()) for t in output],
        "graph": [graph(t) for t in output],
    }
    if output[0].requires_grad:
        sum(t.float().square().mean() for t in output).backward()
    seen |= snapshot(model)
    del seen["hooks"], seen["attributes"]
    return {**seen, "parameters": None, "buffers": {key: bits for key, (_, bits) in seen["buffers"].items()}}


MODELS = ["House", "squeezenet1_1", "resnet18", "googlenet", "efficientnet_b0"]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_recorded_pass_is_the_same_to_the_bit(name, mode, context):
    """Outputs, autograd graph, gradients, batch-norm statistics and random numbers drawn."""
    original, images = recordable(name)
    model, twin = (copy.deepcopy(original).train(mode == "train") for _ in range(2))
    expected = run(twin, images, CONTEXTS[context]())
    with Deconvnet(model) as deconv:
        recorded = run(model, images, CONTEXTS[context]())
        assert deconv.project("" if name == "House" else next(iter(dict(model.named_children()))), 0).any()
    assert recorded == expected
    assert count_hooks(model) == 0


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_recorded_pass_in_channels_last(mode):
    original, images = recordable("resnet18")
    model, twin = (
        copy.deepcopy(original).train(mode == "train").to(memory_format=torch.channels_last) for _ in range(2)
    )
    images = images.contiguous(memory_format=torch.channels_last)
    expected = run(twin, images, contextlib.nullcontext())
    with Deconvnet(model) as deconv:
        assert run(model, images, contextlib.nullcontext()) == expected
        assert deconv.project("layer1", 0).abs().sum() > 0
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)


POOLS = {
    "1d": (nn.MaxPool1d(3, 2), (2, 3, 11)),
    "2d": (nn.MaxPool2d(3, 2, ceil_mode=True), (2, 3, 9, 10)),
    "2d dilated": (nn.MaxPool2d(2, 2, dilation=2), (2, 3, 9, 10)),
    "3d": (nn.MaxPool3d(2), (2, 3, 4, 4, 4)),
    "adaptive": (nn.AdaptiveMaxPool2d(3), (2, 3, 7, 8)),
    "with indices": (nn.MaxPool2d(2, return_indices=True), (2, 3, 6, 6)),
    "amax": (type("Amax", (nn.Module,), {"forward": lambda self, x: x.amax((2, 3))})(), (2, 3, 6, 6)),
    "group norm": (nn.GroupNorm(3, 3), (2, 3, 4, 4)),
    "instance norm": (nn.InstanceNorm2d(3, track_running_stats=True), (2, 3, 4, 4)),
    "alpha dropout": (nn.AlphaDropout(0.5), (2, 3, 4, 4)),
    "random leaky relu": (nn.RReLU(), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("context", ["plain", "no_grad", "autocast"])
@pytest.mark.parametrize("pool", POOLS)
def test_observed_operation_is_the_same_to_the_bit(pool, context):
    module, shape = POOLS[pool]
    twin = copy.deepcopy(module)
    images = torch.randn(shape, requires_grad=True)
    images.data[0, 0] = 1.0  # ties
    expected = run(twin, images, CONTEXTS[context]())
    gradient, images.grad = images.grad, None
    with Deconvnet(module):
        assert run(module, images, CONTEXTS[context]()) == expected
    assert content(images.grad) == content(gradient)


@pytest.mark.parametrize("context", ["no_grad", "inference_mode"])
def test_projects_the_same_from_every_kind_of_pass(context):
    house = furnish("eval")
    expected = Deconvnet(house).project("body", [0, 1], inputs=IMAGES)
    with Deconvnet(house) as deconv:
        with CONTEXTS[context]():
            images = IMAGES.clone()
            house(images)
            inside = deconv.project("body", [0, 1])
            own = deconv.project("body", [0, 1], inputs=images)
        outside = deconv.project("body", [0, 1])
    for pixels in (inside, own, outside):
        assert torch.equal(pixels, expected) and not pixels.requires_grad
    assert not outside.is_inference()


@pytest.mark.parametrize("mode", ["eval", "train", "mixed"])
def test_project_from_a_recorded_pass_runs_nothing_and_changes_nothing(mode):
    house = furnish(mode)
    with Deconvnet(house) as deconv:
        house(IMAGES)
        house.trouble = AssertionError
        ran = []
        for module in house.modules():
            module.register_forward_pre_hook(lambda *arguments: ran.append(1))
        before = snapshot(house)
        for layer in ("conv", "relu#2", "body.2", "head", ""):
            deconv.project(layer, [0, 2])
            deconv.strongest(layer, 2)
        assert not ran and snapshot(house) == before


# ── the user's recorded pass raises ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model", "operation", "pre-hook", "hook", "root pre-hook", "root hook"])
def test_recorded_pass_that_raises_leaves_everything_as_found(where, error, monkeypatch):
    house = furnish("eval")
    deconv = Deconvnet(house)

    def raising(*arguments):
        raise error("in the pass")

    handle = {
        "pre-hook": house.pool.register_forward_pre_hook,
        "hook": house.bn.register_forward_hook,
        "root pre-hook": house.register_forward_pre_hook,
        "root hook": house.register_forward_hook,
    }.get(where, lambda hook: None)(raising)
    house.trouble = error if where == "model" else None
    before = snapshot(house)
    try:
        with torch.no_grad(), monkeypatch.context() as patched:
            if where == "operation":
                patched.setattr(torch._VF, "dropout", raising, raising=False)
            house(IMAGES)
        pytest.fail("nothing was raised")
    except error as raised:
        assert "in the " in str(raised)
    after = snapshot(house)
    del before["buffers"], after["buffers"]  # the pass was the user's, and counts
    assert after == before
    house.trouble = None
    if handle is not None:
        handle.remove()
    house(IMAGES)
    assert deconv.project("conv", 0).abs().sum() > 0
    deconv.close()
    assert count_hooks(house) == 0


def test_interrupted_pass_whose_traceback_is_kept():
    """As a notebook keeps it: the next pass is recorded all the same, under whatever mode is on by then."""
    house = furnish("eval")
    before = snapshot(house)
    deconv = Deconvnet(house)
    attached = hooks(house)
    house.trouble = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt) as kept:
        house(IMAGES)
    house.trouble = None
    with Bystander() as bystander:
        expected = house(IMAGES)
        assert _get_current_function_mode_stack() == [bystander]
    assert _get_current_function_mode_stack() == []
    assert hooks(house) == attached
    assert torch.equal(deconv.strongest("head", 5), expected.topk(5).indices)
    house.trouble = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt) as kept_too:
        house(IMAGES)
    deconv.close()
    assert hooks(house) == before["hooks"] and snapshot(house)["modes"] == []
    del kept, kept_too


def test_a_pass_after_an_interrupted_one_is_recorded_whole():
    house = furnish("eval")
    with Deconvnet(house) as deconv:
        house.trouble = KeyboardInterrupt
        with contextlib.suppress(KeyboardInterrupt):
            house(IMAGES)
        house.trouble = None
        house(IMAGES)
        recorded = deconv.project("body", 0)
        assert torch.equal(recorded, deconv.project("body", 0, inputs=IMAGES))


# ── copies, threads, parallel ────────────────────────────────────────────────────────────────────────


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("way", COPIES)
def test_copy_of_a_recorded_model_lives_without_the_deconvnet(way):
    house = furnish("eval")
    with Deconvnet(house) as deconv:
        house(IMAGES)
        pixels = deconv.project("conv", 0)
        twin = COPIES[way](house)
        assert torch.equal(twin(2 * IMAGES), house(2 * IMAGES))
        house(IMAGES)
        twin(3 * IMAGES)
        assert torch.equal(deconv.project("conv", 0), pixels)
    expected = house(IMAGES)
    assert torch.equal(twin(IMAGES), expected)
    with Deconvnet(twin) as of_twin:
        assert torch.equal(twin(IMAGES), expected)
        assert torch.equal(of_twin.project("conv", 0), pixels)
    assert torch.equal(COPIES[way](house)(IMAGES), expected)


@pytest.mark.parametrize("way", COPIES)
def test_copy_of_a_deconvnet_records_its_own_model(way):
    with Deconvnet(furnish("eval"), overlap="overwrite") as deconv:
        deconv.model(IMAGES)
        pixels = deconv.project("conv", 0)
        twin = COPIES[way](deconv)
        with pytest.raises(NoForwardPass):
            twin.project("conv", 0)
        deconv.model(2 * IMAGES)
        twin.model(IMAGES)
        assert twin.overlap == "overwrite" and torch.equal(twin.project("conv", 0), pixels)
        twin.close()
        assert count_hooks(COPIES[way](twin).model) == count_hooks(twin.model)
        neuron = NeuronDeconvnet(deconv.model, "body.0")
        assert torch.equal(COPIES[way](neuron).attribute(IMAGES, (1, 2, 3)), neuron.attribute(IMAGES, (1, 2, 3)))


def test_copy_of_a_model_that_holds_its_own_deconvnet():
    house = furnish("eval")
    house.deconv = Deconvnet(house)
    twin = copy.deepcopy(house)
    assert torch.equal(twin(IMAGES), house(IMAGES))
    assert torch.equal(twin.deconv.project("conv", 0, inputs=IMAGES), house.deconv.project("conv", 0))


def test_model_outlives_nothing():
    """A deconvnet that is forgotten frees its tape; the model stays usable."""
    house = furnish("eval")
    deconv = Deconvnet(house)
    house(IMAGES)
    tape = weakref.ref(deconv._recorder.tape)
    del deconv
    gc.collect()
    assert tape() is None
    house(IMAGES)


def test_two_threads_with_two_models():
    houses = [furnish("eval"), furnish("eval")]
    nn.init.normal_(houses[1].conv.weight, generator=torch.Generator().manual_seed(9))
    expected = [Deconvnet(house).project("body", [0, 1], inputs=IMAGES) for house in houses]
    outputs = [house(IMAGES) for house in houses]
    before = [snapshot(house) for house in houses]
    start, wrong = threading.Barrier(2), []

    def work(index: int) -> None:
        house = houses[index]
        start.wait()
        with Deconvnet(house) as deconv:
            for _ in range(20):
                same = torch.equal(house(IMAGES), outputs[index])
                same &= torch.equal(deconv.project("body", [0, 1]), expected[index])
                same &= torch.equal(deconv.project("body", [0, 1], inputs=IMAGES), expected[index])
                if not same or deconv.attribute(IMAGES, 0).isnan().any():
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for house, found in zip(houses, before, strict=True):
        after = snapshot(house)
        del after["buffers"], found["buffers"]  # the passes were the user's
        assert after == found


def test_one_model_in_another_thread_is_not_recorded_by_mistake():
    """While one thread's pass is being recorded, another's leaves it whole."""
    house = furnish("eval")
    expected = Deconvnet(house).project("body", 0, inputs=IMAGES)
    with Deconvnet(house) as deconv:

        def elsewhere(module, args, output):
            handle.remove()
            thread = threading.Thread(target=house, args=(2 * IMAGES,))
            thread.start()
            thread.join()

        handle = house.bn.register_forward_hook(elsewhere)
        house(IMAGES)
        assert torch.equal(deconv.project("body", 0), expected)
    assert count_hooks(house) == 0


@pytest.mark.parametrize("act", ["attribute", "maps"])
def test_passes_of_ours_while_other_threads_are_inside_the_model(act):
    """Each pass of ours begins and ends, hooks and all, while another thread's is at the first layer."""
    house, threads, found = furnish("eval"), [], []
    actions = {
        "attribute": lambda: Deconvnet(house).attribute(IMAGES, 0),
        "maps": lambda: OcclusionSensitivity(house).maps(IMAGES, 6, 6, "conv").score_cells,
    }
    expected, alone = house(IMAGES), actions[act]()
    arrived, ended = threading.Semaphore(0), threading.Event()

    def start(module, args):
        if threading.current_thread() not in threads:
            threads.append(threading.Thread(target=lambda: found.append(house(IMAGES))))
            threads[-1].start()
            assert arrived.acquire(timeout=30)

    def wait(module, args, output):
        if threading.current_thread() in threads:
            arrived.release()
            ended.wait(30)

    with house.conv.register_forward_pre_hook(start), house.conv.register_forward_hook(wait):
        try:
            torch.testing.assert_close(actions[act](), alone)
        finally:
            ended.set()
            for thread in threads:
                thread.join()
    assert len(found) == len(threads) > 0
    assert all(torch.equal(output, expected) for output in found)


def test_data_parallel_is_its_wrapped_module():
    house = furnish("eval")
    parallel = nn.DataParallel(house)
    expected = Deconvnet(house).project("body.0", [1, 2], inputs=IMAGES)
    before = snapshot(parallel)
    with Deconvnet(parallel) as deconv:
        assert torch.equal(deconv.project("body.0", [1, 2], inputs=IMAGES), expected)
        assert torch.equal(deconv.project(house.body[0], [1, 2], inputs=IMAGES), expected)
        parallel(IMAGES)
        assert torch.equal(deconv.project("body.0", [1, 2]), expected)
        assert torch.equal(deconv.attribute(IMAGES, 1), Deconvnet(house).attribute(IMAGES, 1))
        with pytest.raises(LookupError, match="'body.0'"):
            deconv.project("module.body.0", 1)
    neuron = NeuronDeconvnet(parallel, "body.0").attribute(IMAGES, (1, 2, 3))
    assert torch.equal(neuron, NeuronDeconvnet(house, "body.0").attribute(IMAGES, (1, 2, 3)))
    after = snapshot(parallel)
    del before["buffers"], after["buffers"]
    assert after == before


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_thousand_calls_leave_no_trace():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2))
    images = torch.randn(1, 1, 4, 4)
    deconv, neuron = Deconvnet(model), NeuronDeconvnet(model, "0")

    def use() -> None:
        model(images)
        deconv.project("0", 1)
        deconv.project("0", 1, inputs=images)
        deconv.attribute(images, 1)
        neuron.attribute(images, (0, 0, 0))
        with contextlib.suppress(DeconvvizError):
            deconv.project("0", 9)

    def live() -> int:
        gc.collect()
        return sum(issubclass(type(item), Tensor) for item in gc.get_objects())

    def left() -> tuple[object, ...]:
        return hooks(model), live(), len(weakref.finalize._registry)

    tracemalloc.start()
    for _ in range(300):  # until Python's free lists of tuples are full
        use()
    before, memory = left(), tracemalloc.get_traced_memory()[0]
    for _ in range(200):
        use()
    after, grown = left(), tracemalloc.get_traced_memory()[0] - memory
    tracemalloc.stop()
    assert after == before and before[1] > 0
    assert grown < 50_000
    deconv.close()
    assert count_hooks(model) == 0


def reachable(root: object) -> list[Tensor]:
    """Every tensor that ``root`` keeps alive, through containers, dataclasses, partials and closures."""
    skipped = (type, types.ModuleType, nn.Module, types.BuiltinFunctionType, str, bytes, int, float)
    found, seen, stack = [], set(), [root]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, skipped):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, types.FunctionType):
            stack += [item.__closure__, item.__defaults__]
        else:
            stack += gc.get_referents(item)
    return found


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_recorded_pass_keeps_switches_not_activations(name):
    model = build(name)
    images = torch.randn(4, 3, 64, 64)
    activations: list[Tensor] = []
    watching = [
        module.register_forward_hook(lambda m, args, output: activations.append(output))
        for module in model.modules()
        if not list(module.children())
    ]
    with Deconvnet(model) as deconv:
        output = model(images)
        for hook in watching:
            hook.remove()
        tape = deconv._recorder.tape
        mine = {p.data_ptr() for p in (*model.parameters(), *model.buffers(), images)}
        kept = {t.data_ptr(): t for t in reachable(tape) if t.data_ptr() not in mine}
        computed = {t.data_ptr(): t.untyped_storage().nbytes() for t in activations}
        assert not kept.keys() & computed.keys()
        assert all(t.grad_fn is None for t in kept.values())
        switches = [t for t in kept.values() if t.dtype == torch.uint8]
        assert len(switches) == {"vgg11": 5, "resnet18": 1}[name]
        assert all(t.numel() <= 1024 for t in kept.values() if t.dtype != torch.uint8)
        assert sum(t.untyped_storage().nbytes() for t in kept.values()) < 0.1 * sum(computed.values())
        alive = [weakref.ref(t) for t in activations]
        activations.clear()
        del output, computed
        gc.collect()
        assert all(reference() is None for reference in alive)
