"""What a watched pass writes down: every operation, in place or not, under the address of its call."""

import copy
import threading
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build
from dense_jacobian import Applied, assert_same, by_columns, projected, random
from torch import nn
from torch.overrides import TorchFunctionMode

from deconvviz import Deconvnet
from deconvviz.capture import watch
from deconvviz.capture.reading import reading
from deconvviz.errors import NoForwardPass, UnsupportedOperation
from deconvviz.layers import find_call
from deconvviz.tape import flatten

torch.set_num_threads(1)

X = random(2, 4, 4, 3)
"""The input of most cases: (N, C, H, W)."""
CONSTANT = random(4, 4, 3, seed=2)


class Network(nn.Module):
    """A stem, a body given as a function of the network and the stem's output, and a head called on it."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.stem, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 2)
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("scratch", torch.zeros(2, 4, 4, 3))
        self.double()

    def forward(self, x):
        return self.head(self.body(self, self.stem(x)))


def seeded(body):
    """Networks with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network(body)


# ── where: the addresses of calls ────────────────────────────────────────────────────────────────────────


def test_operations_have_the_address_of_the_call_that_they_ran_in():
    tape, _ = watch(seeded(lambda net, x: net.relu(F.relu(net.relu(x) - 1).neg())), [X])
    assert [(step.module, step.number, step.operation) for step in tape.steps] == [
        ("stem", 1, "conv2d"),
        ("relu", 1, "relu"),
        ("", 1, "sub"),
        ("", 1, "relu"),
        ("", 1, "neg"),
        ("relu", 2, "relu"),
        ("head", 1, "conv2d"),
    ]
    assert tape.counts() == {"stem": 1, "relu": 2, "head": 1, "": 1}
    numbers = [(call.name, call.number) for call in tape.calls]
    assert numbers == [("stem", 1), ("relu", 1), ("relu", 2), ("head", 1), ("", 1)]


class Recursive(nn.Module):
    """A block that calls itself, ``depth`` times in all."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Conv2d(4, 4, 3, padding=1).double()

    def forward(self, x, depth=3):
        return self.filter(x if depth == 1 else self(x, depth - 1))


def test_calls_of_a_block_that_calls_itself_are_counted_from_the_outermost():
    block = Recursive()
    tape, _ = watch(nn.Sequential(block), [X])
    read = {}
    layers = [("0", number) for number in (1, 2, 3)]
    with reading(nn.Sequential(block), layers, lambda i, output: read.update({layers[i]: output.clone()})) as run:
        run(X)
    for number in (1, 2, 3):
        output = tape.replay(find_call(tape, "0", number).outputs[0])
        assert torch.equal(output, block(X, 4 - number)) and torch.equal(read["0", number], output)


def test_reading_a_layer_whose_error_the_model_caught():
    """A call that gave nothing is not counted, as on a tape."""

    class Picky(nn.Module):
        def forward(self, x):
            if x.shape[1] == 4:
                raise ValueError("too many")
            return x + 1

    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.picky = Picky()

        def forward(self, x):
            try:
                return self.picky(x)
            except ValueError:
                return self.picky(x[:, :3])

    read = {}
    with reading(Tries(), [("picky", 1)], lambda i, output: read.update({i: output})) as run:
        run(X)
    assert torch.equal(read[0], X[:, :3] + 1)


def test_a_function_called_in_a_block_belongs_to_the_block():
    tape, _ = watch(build("googlenet"), [torch.rand(1, 3, 64, 64)])
    rectifiers = [step.module for step in tape.steps if step.operation == "relu"]
    assert len(rectifiers) == 57, "as many as GoogLeNet has convolutions"
    assert rectifiers[:2] == ["conv1", "conv2"] and "inception3a.branch2.1" in rectifiers


@pytest.mark.parametrize("layer", [("layer1.0.relu", 1), ("layer1.0.relu", 2), ("layer2.0", 1)], ids=str)
def test_a_pass_stops_at_the_layer(layer):
    model = copy.deepcopy(build("resnet18"))
    images = random(1, 3, 32, 32).float()
    names = [name for name, module in model.named_modules() if not list(module.children())]
    ran, outputs = [], []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: ran.append(name))
        module.register_forward_hook(lambda _, args, output, name=name: outputs.append((name, output.clone())))
    model(images)
    whole, expected = list(ran), [output for name, output in outputs if name == layer[0]][layer[1] - 1]
    ran.clear()
    tape, output = watch(model, [images], layer=layer)
    assert torch.equal(output, expected) and not tape.complete
    assert ran == whole[: len(ran)], "the same modules up to the layer"
    assert set(ran) & set(names) < set(whole) and "layer3.0.conv1" not in ran
    last = max(i for i, name in enumerate(ran) if name == layer[0])
    assert all(name.startswith(layer[0]) for name in ran[last:]), "and none after it"


@pytest.mark.parametrize("seen", ["recorded", "own", "none"])
def test_once_a_whole_pass_was_seen_an_own_one_stops_at_a_layer_given_by_its_name(seen):
    model, ran = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), []
    images = torch.rand(1, 3, 8, 8)
    with Deconvnet(model) as deconv:
        if seen == "recorded":
            model(images)
        elif seen == "own":
            deconv.check(images)
        model[2].register_forward_hook(lambda *_: ran.append(1))
        pixels = deconv.project("1", 0, inputs=images)
        assert len(ran) == (seen == "none") and torch.equal(pixels, deconv.project("1#1", 0, inputs=images))


def test_a_pass_whose_model_catches_everything_still_gives_the_layer():
    """A model may swallow what ends the pass; the pass then goes on, and the layer's output is the same."""

    def body(net, x):
        try:
            return net.relu(x)
        except BaseException:
            return x

    tape, output = watch(seeded(body), [X], layer=("relu", 1))
    assert torch.equal(output, F.relu(seeded(body).stem(X)))
    assert find_call(tape, "relu", 1).outputs != (None,)


# ── what: writes in place ────────────────────────────────────────────────────────────────────────────────


def rows_in_a_loop(net, x):
    for row in x.unbind(1):
        row.mul_(row.new_full((), 3)).relu_()
    return x


def slices_of_zeros_in_a_loop(net, x):
    buffer = torch.zeros(2, 4, 4, 3, dtype=x.dtype)
    for c in range(4):
        buffer[:, c] = c * x[:, 3 - c]
    return buffer


def copied_into_slices(net, x):
    buffer = x.new_empty(2, 6, 4, 3).fill_(2)
    buffer[:, :4].copy_(x)
    buffer.narrow(1, 4, 2).copy_(x[:, 1:3])
    return buffer[:, 2:]


def registered_buffer(net, x):
    net.scratch[:, :2].copy_(x[:, 2:])
    return net.scratch * 2 + x


def halves_swapped(net, x):
    x[:, :2], x[:, 2:] = x[:, 2:].clone(), x[:, :2].clone()
    return x


def halves_swapped_wrongly(net, x):
    """The second right-hand side is a view, and has been written to by then."""
    x[:, :2], x[:, 2:] = x[:, 2:], x[:, :2]
    return x


def in_chunks(net, x):
    first, second = x.chunk(2, 1)
    first.relu_()
    second.add_(first)
    return x


def in_detached_memory(net, x):
    y = x + 0
    y.data[:, :2] = 0
    y.detach()[:, 2:].relu_()
    return y


def replaced_content(net, x):
    y = x + 0
    y.data = x.relu()
    return y + x


def constant_that_changes(net, x):
    """A constant counts with what it held when it was used."""
    constant = CONSTANT.clone()
    y = x * constant
    constant.mul_(3)
    y = y + x * constant + constant
    constant[:2] = x[0, 2:]
    return y + constant


def other_half_of_a_memory(net, x):
    """It is not written to, so it stays a constant."""
    first, second = torch.ones(2, 4, 4, 3, dtype=x.dtype).chunk(2, 1)
    first.copy_(x[:, 2:])
    return torch.cat([first, x[:, :2] * second], 1)


def view_made_before(net, x):
    view = x[:, 1:]
    x.relu_()
    return torch.cat([view, x[:, :1]], 1)


def expanded_view_made_before(net, x):
    view = x[:1].expand(2, -1, -1, -1)
    x.mul_(2)
    return view


def into_out(net, x):
    out = torch.ones(2, 8, 4, 3, dtype=x.dtype)
    torch.mul(x, 2, out=out[:, 2:6])
    torch.add(x, out[:, :4], out=x)
    return out[:, 1:5] + x


def constant_into_out(net, x):
    y = x + 0
    torch.mul(CONSTANT, 2, out=y[1])
    return y


def two_outs(net, x):
    out = torch.empty(0, dtype=x.dtype), torch.empty(0, dtype=torch.long)
    torch.max(x, 1, keepdim=True, out=out)
    return x + out[0]


# Bodies that write in place, each with the same body written without.
IN_PLACE = {
    "relu": (lambda net, x: net.relu(x), lambda net, x: x.relu()),
    "relu function": (lambda net, x: F.relu(x, inplace=True), lambda net, x: x.relu()),
    "rectified residual": (
        lambda net, x: F.relu_(x) + x,
        lambda net, x: 2 * x.relu(),
    ),
    "sum": (lambda net, x: x.add_(x.flip(1)).relu_().sub_(1), lambda net, x: (x + x.flip(1)).relu() - 1),
    "augmented": (lambda net, x: sum_of_augmented(x), lambda net, x: 3 * x.relu()),
    "slice set": (
        lambda net, x: set_item(x, (slice(None), slice(3)), x[:, 1:].relu()),
        lambda net, x: torch.cat([x[:, 1:].relu(), x[:, 3:]], 1),
    ),
    "slice augmented": (
        lambda net, x: set_item(x, 0, x[0].add_(x[1])),
        lambda net, x: torch.stack([x[0] + x[1], x[1]]),
    ),
    "mask set": (
        lambda net, x: set_item(x, CONSTANT > 0.5, 2.0, whole=True),
        lambda net, x: torch.where(CONSTANT > 0.5, 2.0, x),
    ),
    "view": (lambda net, x: x.view(2, -1).relu_().view_as(x), lambda net, x: x.relu()),
    "base of a view": (lambda net, x: (x.view(-1).relu_(), x)[1], lambda net, x: x.relu()),
    "transposed view": (
        lambda net, x: (x.permute(0, 2, 3, 1).reshape(2, 12, 4)[..., 1], x.mT[..., 1].zero_(), x)[2],
        lambda net, x: x * torch.tensor([1, 0, 1, 1]).view(4, 1),
    ),
    "diagonal": (
        lambda net, x: (x.diagonal(0, 2, 3).mul_(5), x)[1],
        lambda net, x: x * (1 + 4 * torch.eye(4, 3)),
    ),
    "view of a view": (
        lambda net, x: (x[:, :2][:, 1][:, 1:].mul_(3), x)[1],
        lambda net, x: torch.cat([x[:, :1], torch.cat([x[:, 1:2, :1], 3 * x[:, 1:2, 1:]], 2), x[:, 2:]], 1),
    ),
    "chunks": (
        in_chunks,
        lambda net, x: (lambda first: torch.cat([first, x[:, 2:] + first], 1))(x[:, :2].relu()),
    ),
    "rows": (rows_in_a_loop, lambda net, x: (3 * x).relu()),
    "zeros": (slices_of_zeros_in_a_loop, lambda net, x: x.flip(1) * torch.arange(4).view(4, 1, 1)),
    "copies": (copied_into_slices, lambda net, x: torch.cat([x[:, 2:], x[:, 1:3]], 1)),
    "registered buffer": (
        registered_buffer,
        lambda net, x: torch.cat([2 * x[:, 2:], torch.zeros_like(x[:, 2:])], 1) + x,
    ),
    "swapped": (halves_swapped, lambda net, x: x.roll(2, 1)),
    "swapped wrongly": (halves_swapped_wrongly, lambda net, x: x[:, [2, 3, 2, 3]]),
    "detached memory": (
        in_detached_memory,
        lambda net, x: torch.cat([torch.zeros_like(x[:, 2:]), x[:, 2:].relu()], 1),
    ),
    "content": (replaced_content, lambda net, x: x.relu() + x),
    "changing constant": (
        constant_that_changes,
        lambda net, x: 4 * x * CONSTANT + 3 * CONSTANT + torch.cat([x[0, 2:], 3 * CONSTANT[2:]]),
    ),
    "other half": (other_half_of_a_memory, lambda net, x: x.roll(2, 1)),
    "view made before": (view_made_before, lambda net, x: x.relu().roll(-1, 1)),
    "expanded view made before": (expanded_view_made_before, lambda net, x: 2 * x[[0, 0]]),
    "out": (
        into_out,
        lambda net, x: (
            torch.cat([torch.ones_like(x[:, :1]), 2 * x[:, :3]], 1)
            + x
            + torch.cat([torch.ones_like(x[:, :2]), 2 * x[:, :2]], 1)
        ),
    ),
    "out of constants": (constant_into_out, lambda net, x: torch.stack([x[0], 2 * CONSTANT])),
    "two outs": (two_outs, lambda net, x: x + x.amax(1, keepdim=True)),
    "squeezed": (
        lambda net, x: x.unsqueeze_(0).transpose_(0, 1).squeeze_(1),
        lambda net, x: x * 1,
    ),
    "tuple of tensors": (
        lambda net, x: torch.cat(torch.return_types.max((x[:, 2:], x[:, :2])), 1),
        lambda net, x: x.roll(2, 1),
    ),
}


def set_item(x, where, what, whole=False):
    x[(..., where) if whole else where] = what
    return x


def sum_of_augmented(x):
    x.relu_()
    y = x * 1
    y += x
    y += x
    return y


@pytest.mark.parametrize("own", [True, False], ids=["own pass", "recorded pass"])
@pytest.mark.parametrize("bodies", IN_PLACE.values(), ids=list(IN_PLACE))
def test_a_write_in_place_is_as_one_out_of_place(bodies, own):
    written, plain = map(seeded, bodies)
    inputs = X if own else None
    expected = Deconvnet(plain).project("head", inputs=X, position="all")
    with Deconvnet(written) as deconv, torch.no_grad():  # autograd refuses some of these writes
        output = written(X)
        written.scratch.zero_()
        assert_same([deconv.project("head", inputs=inputs, position="all")], [expected])
        assert_same([output], [plain(X)])
        tape = deconv._recorded()
        assert_same([tape.replay(find_call(tape, "head", 1).outputs[0])], [output])


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(3),
        lambda x: x.view(-1).mul_(3),
        lambda x: x[:, 2:].add_(x[:, :2]),
        lambda x: x.data.mul_(3),
        lambda x: setattr(x, "data", x * 3),
        lambda x: x.__setitem__((0, 1), x[1, 1]),
    ],
)
def test_a_model_may_write_to_its_own_input(write):
    """The tape keeps the input as it was given."""

    def model(x):
        write(x)
        return 2 * x

    tape, signal, back = projected(model, X)
    assert_same(back, by_columns(model, [X], signal))
    assert_same([tape.replay(tape.calls[-1].outputs[0])], [model(X.clone())])

    module, given = Applied(model), X.clone()
    with Deconvnet(module) as deconv:
        expected = module(given)
        tape = deconv._recorded()
        assert_same([tape.replay(tape.calls[-1].outputs[0])], [expected])
        assert torch.equal(deconv._recorded().tensors[0], X)


# ── replaying: the pass from the tape alone ──────────────────────────────────────────────────────────────

NETWORKS = ["resnet18", "googlenet", "mobilenet_v3_small", "convnext_tiny", "shufflenet_v2_x0_5", "alexnet"]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_replay_is_the_activation_of_every_layer(name, mode):
    model = copy.deepcopy(build(name)).train(mode == "train")
    images = random(2, 3, 64, 64).float()
    outputs = []
    for module in model.modules():
        module.register_forward_hook(lambda _, args, output: outputs.append(flatten(output)[0].clone()))
    torch.manual_seed(0)
    tape, _ = watch(model, [images])
    before, buffers = torch.get_rng_state(), copy.deepcopy(list(model.buffers()))
    of_values = {call.outputs[0]: output for call, output in zip(tape.calls, outputs, strict=True)}
    for value, output in of_values.items():
        assert torch.equal(tape.replay(value), output)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, model.buffers(), buffers))


# ── what models do besides ───────────────────────────────────────────────────────────────────────────────


def test_a_model_may_catch_its_own_errors():
    """What follows a failed call is attributed to the caller, and the next call of the layer is its first."""

    def body(net, x):
        try:
            net.head(x[0, 0])
        except RuntimeError:
            x = F.gelu(x)
        try:
            return x.view(7, -1)
        except RuntimeError:
            return net.relu(x)

    tape, _ = watch(seeded(body), [X])
    assert [(step.module, step.number) for step in tape.steps if step.operation == "gelu"] == [("", 1)]
    assert find_call(tape, "head", None).number == 1
    expected = Deconvnet(seeded(lambda net, x: F.gelu(x).relu())).project("head", inputs=X)
    model = seeded(body)
    with Deconvnet(model) as deconv:
        model(X)
        assert torch.equal(deconv.project("head"), expected)
        assert torch.equal(deconv.project("head#1", inputs=X), expected)


def test_a_failing_operation_is_the_users_own_error_in_a_recorded_pass():
    model = seeded(lambda net, x: x.view(7, -1))
    with Deconvnet(model) as deconv:
        with pytest.raises(RuntimeError) as error:
            model(X)
        assert type(error.value) is RuntimeError
        with pytest.raises(NoForwardPass):
            deconv.project("head")


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize("own", [True, False], ids=["own pass", "recorded pass"])
@pytest.mark.parametrize(
    "pack",
    [
        lambda x, y: (x, [y]),
        lambda x, y: {"x": x, "y": {"y": y}},
        lambda x, y: OrderedDict(y=[x, (y,)]),
        lambda x, y: Pair(x, y),
        lambda x, y: [x, None, "name", 3, y],
    ],
)
def test_tensors_are_found_in_nests_of_inputs_and_outputs(pack, own):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.split = Applied(lambda x: pack(x * 2, x * 3))
            self.join = Applied(lambda nest: flatten(nest)[0] + flatten(nest)[1].flip(1))

        def forward(self, x):
            return {"out": self.join(self.split(x))}

    model = Both()
    with Deconvnet(model) as deconv:
        output = model(X)["out"]
        tape = watch(model, [X])[0] if own else deconv._recorded()
    first, second = find_call(tape, "split", 1).outputs
    assert find_call(tape, "join", 1).inputs == (first, second)
    (value,) = find_call(tape, "", 1).outputs
    assert torch.equal(tape.replay(value), output)
    assert torch.equal(tape.replay(first), 2 * X) and torch.equal(tape.replay(second), 3 * X)


def test_a_model_may_take_a_nest_of_tensors():
    model = Applied(lambda nest: nest["images"][0] * 2 + nest["images"][1].flip(0))
    with Deconvnet(model) as deconv:
        output = model({"images": [X, 3 * X], "names": ["a", "b"]})
        first, second = deconv.project("", [0], position="all", seed="one")
    assert torch.equal(output, 2 * X + 3 * X.flip(0))
    assert torch.equal(first[:, 0, 0], torch.full((2, 4, 3), 2.0))
    assert torch.equal(second[:, 0, 0], torch.ones(2, 4, 3))


class Counting(TorchFunctionMode):
    """A user's own mode, which counts what it sees of an operation."""

    def __init__(self, operation):
        super().__init__()
        self.operation, self.seen = operation, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen += function is self.operation
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("inside", [True, False], ids=["in the model", "around it"])
def test_the_users_own_mode_sees_what_it_would(inside):
    mode = Counting(torch.conv2d)

    def body(net, x):
        with mode:
            return net.stem(x).relu()

    model = seeded(body if inside else lambda net, x: net.stem(x).relu())
    expected = Deconvnet(seeded(lambda net, x: net.stem(x).relu())).project("head", inputs=X)
    with Deconvnet(model) as deconv:
        if inside:
            model(X)
        else:
            with mode:
                model(X)
        assert mode.seen == (1 if inside else 3)
        assert torch.equal(deconv.project("head"), expected)
        deconv.project("head", inputs=X)
        assert mode.seen == (2 if inside else 3)
    assert torch.overrides._get_current_function_mode_stack() == []


def in_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_thread_is_not_seen_by_the_pass_of_another_that_shares_a_layer():
    """Each watches its own model, the second while the first is inside its body."""
    inner, found = seeded(lambda net, x: F.silu(x) + x), []

    def body(net, x):
        in_a_thread(lambda: found.append(watch(inner, [X])[0]))
        return F.relu(x)

    outer = seeded(body)
    inner.stem = outer.stem
    found.append(watch(outer, [X])[0])
    for tape, body_operations in zip(found, (["silu", "add"], ["relu"]), strict=True):
        assert [(step.module, step.operation) for step in tape.steps] == [
            ("stem", "conv2d"),
            *[("", operation) for operation in body_operations],
            ("head", "conv2d"),
        ]
        assert tape.counts() == {"stem": 1, "head": 1, "": 1}


def test_two_threads_watch_two_models_at_once():
    models = [seeded(lambda net, x: net.relu(x)), seeded(lambda net, x: F.silu(x) + x)]
    expected = [Deconvnet(model).project("head", inputs=X) for model in models]
    barrier, found = threading.Barrier(2), [[], []]

    def work(i):
        for _ in range(10):
            barrier.wait()
            found[i].append(Deconvnet(models[i]).project("head", inputs=X))

    other = threading.Thread(target=work, args=(1,))
    other.start()
    work(0)
    other.join()
    for pixels, right in zip(found, expected, strict=True):
        assert len(pixels) == 10 and all(torch.equal(each, right) for each in pixels)


# ── custom autograd functions ────────────────────────────────────────────────────────────────────────────


def custom(forward):
    """``apply`` of a custom autograd function, whose backward is not a deconvnet's."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            return forward(*inputs)

        @staticmethod
        def backward(ctx, *signals):
            return -7 * signals[0]

    return Custom.apply


def in_numpy(x):
    return torch.from_numpy(np.maximum(x.numpy(), 0))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x * torch.arange(4).view(4, 1, 1),
        lambda x: x,
        lambda x: x.view_as(x),
        lambda x: F.conv2d(x, CONSTANT[None, :, :3, :3], padding=1),
        lambda x: torch.cat([x[:, :2], 2 * x], 1),
    ],
    ids=["scaled", "identity", "view", "filtered", "concatenated"],
)
def test_a_custom_function_goes_back_by_the_operations_of_its_forward(forward):
    for function in (custom(forward), lambda x: custom(forward)(2 * x).sum(1, keepdim=True) + x):
        _, signal, back = projected(function, X)
        assert_same(back, by_columns(function, [X], signal))


def test_a_custom_function_that_rectifies_is_a_rectifier():
    _, signal, (back,) = projected(custom(F.relu), X)
    assert torch.equal(back, signal.relu())


@pytest.mark.parametrize("skip", [False, True])
def test_a_layer_that_hides_its_operations_is_refused_not_ignored(skip):
    model = seeded(lambda net, x: net.relu(x) + x if skip else net.relu(x))
    model.relu = Applied(custom(in_numpy))
    with pytest.raises(UnsupportedOperation, match="'hidden code' in layer 'relu'"):
        Deconvnet(model).project("head", inputs=X)
    assert Deconvnet(model).project("stem", inputs=X).any(), "up to there all is well"
    with Deconvnet(model) as deconv:
        model(X)
        with pytest.raises(NoForwardPass, match="hides its operations"):
            deconv.project("head")


def test_a_constant_that_a_layer_holds_is_not_hidden_code():
    held = {"grid": random(2, 4, 4, 3)}
    model = seeded(lambda net, x: net.positions(x) + x)
    model.positions = Applied(lambda x: held["grid"])
    model.positions.cache = held
    expected = Deconvnet(seeded(lambda net, x: x)).project("head", inputs=X, position=(1, 1), seed="one")
    pixels = Deconvnet(model).project("head", inputs=X, position=(1, 1), seed="one")
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("gradient", ["raise", "gradient"])
@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: custom(in_numpy)(x) + x,
        lambda net, x: custom(in_numpy)(x),
        lambda net, x: in_numpy(x.detach()),
        lambda net, x: torch.as_tensor(np.abs(x)).view_as(x),
        lambda net, x: torch.tensor(np.asarray(x.relu())) * 2,
        lambda net, x: net.relu(torch.from_numpy(x.numpy() ** 2)),
        lambda net, x: x.index_copy(1, torch.tensor([2]), torch.from_dlpack(np.sqrt(np.from_dlpack(x**2)))[:, :1]),
    ],
)
def test_hidden_code_in_the_middle_of_a_forward_is_refused(body, gradient):
    model = seeded(body)
    with torch.no_grad(), Deconvnet(model, on_unsupported=gradient) as deconv:
        with pytest.raises(UnsupportedOperation, match="'hidden code' in (layer|the model)") as error:
            deconv.project("head", inputs=X)
        assert "gradient" not in str(error.value)
        assert deconv.project("stem", inputs=X).any(), "up to there all is well"
        model(X)
        with pytest.raises(NoForwardPass, match="hides its operations"):
            deconv.project("head")


@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: x * x.max().item(),
        lambda net, x: x * float(x.numpy().mean()),
        lambda net, x: x * torch.tensor([1.0, 2, 3]) if x.tolist() else x,
        lambda net, x: (x.detach().numpy(), net.relu(x) * torch.ones(3) + net.scratch)[1],
        lambda net, x: x.index_select(1, torch.from_numpy(x[0].numpy().sum((1, 2)).argsort().copy())),
        lambda net, x: (net.scratch.numpy(), x * CONSTANT)[1],
    ],
    ids=["item", "number", "tolist", "logged", "index", "constant"],
)
def test_numbers_and_indices_read_in_a_forward_are_constants_of_the_pass(body):
    assert Deconvnet(seeded(body)).project("head", inputs=X).any()
