"""What an operation is called, and which argument it overwrites."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


ALIASES = {
    "__add__": "add", "__radd__": "add", "__iadd__": "add", "__sub__": "sub", "__isub__": "sub",
    "__rsub__": "rsub", "__mul__": "mul", "__rmul__": "mul", "__imul__": "mul", "multiply": "mul",
    "__truediv__": "div", "__itruediv__": "div", "__div__": "div", "__idiv__": "div", "__neg__": "neg",
    "__matmul__": "matmul", "__imatmul__": "matmul", "__getitem__": "getitem", "__setitem__": "setitem",
    "_threshold": "threshold",
}  # fmt: skip
_OTHER_SIGNATURE = (torch.batch_norm, torch.instance_norm)
QUERIES = _names(
    "shape size dim ndim ndimension numel nelement dtype device layout is_cuda is_mps is_contiguous stride "
    "requires_grad is_floating_point is_complex element_size storage_offset names grad_fn is_leaf _version "
    "has_names is_sparse is_sparse_csr is_nested is_quantized is_mkldnn is_meta is_cpu is_xla is_xpu is_signed is_conj "
    "is_neg is_shared is_pinned is_same_size is_inference result_type get_device dim_order data_ptr untyped_storage "
    "__len__ __format__ __repr__ __hash__ register_hook retain_grad retains_grad output_nr itemsize nbytes"
)
DETACHED = frozenset(("detach", "data"))
TO_NUMPY = frozenset(("numpy", "__array__", "__dlpack__"))
"""Operations that let content out, to where no operation is seen. Single numbers (``item``) are constants."""
FRESH = _names(
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones "
    "new_empty new_full new_tensor new_empty_strided"
)
LIKE = _names("expand_as view_as reshape_as type_as to")
"""Operations whose second tensor lends them its shape or dtype, and no signal."""


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """What a function is called in the table, and what to expect of it."""

    name: str
    query: bool
    """It asks for a shape or a flag, and gives no content."""
    sets_data: bool
    """It is ``x.data = y``."""
    like: bool
    """Its second tensor lends it a shape or dtype, and no signal."""
    detached: bool
    """It gives content without its signal."""
    cut: bool
    """No signal goes through it: it is detached, new, or NumPy's."""
    to_numpy: bool
    """It lets content out."""
    writes: bool
    """It writes in place."""
    inplace: int | None
    """The position of its argument ``inplace``, which says whether it writes."""


@functools.cache
def operation(function: Callable[..., Any]) -> Operation:
    """What there is to know of a function; ``Tensor.relu_`` and ``F.relu`` have one name, ``relu``."""
    name, (writes, inplace) = _name(function), _writing(function)
    return Operation(
        name=name,
        query=name in QUERIES,
        sets_data=name == "set_data",
        like=name in LIKE,
        detached=name in DETACHED,
        cut=name in DETACHED | FRESH | TO_NUMPY,
        to_numpy=name in TO_NUMPY,
        writes=writes,
        inplace=inplace,
    )


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):
        attribute: str = function.__self__.__name__  # type: ignore[attr-defined]
        return attribute if name == "__get__" else f"set_{attribute}"
    if function in _OTHER_SIGNATURE:
        return f"torch.{name}"
    return ALIASES.get(name) or (name if name.startswith("__") else name.rstrip("_"))


def _writing(function: Callable[..., Any]) -> tuple[bool, int | None]:
    """Whether a function always writes in place, and the position of its ``inplace`` if it has one."""
    name = getattr(function, "__name__", "")
    dunder = name.startswith("__")
    always = name == "__setitem__" or (dunder and name.startswith("__i") and name in ALIASES)
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # one of C++, whose names end in _ where they write in place
        parameters = []
    position = parameters.index("inplace") if "inplace" in parameters else None
    return always or (not dunder and name.endswith("_")), position


def written(what: Operation, args: Any, kwargs: dict[str, Any]) -> tuple[int | str | None, Tensor | None]:
    """The argument that an operation overwrites: its position or keyword (none for ``out``, whose content
    plays no part), and the tensor."""
    if kwargs and "out" in kwargs:
        return None, kwargs["out"] if isinstance(kwargs["out"], Tensor) else None
    position = what.inplace
    asked = position is not None and position < len(args) and args[position]
    if not (what.writes or asked or (kwargs and kwargs.get("inplace"))):
        return None, None
    if args:
        return (0, args[0]) if isinstance(args[0], Tensor) else (None, None)
    for key in ("input", "self"):
        if isinstance(kwargs.get(key), Tensor):
            return key, kwargs[key]
    return None, None


def outline(item: Any) -> Any:
    """What has the shape, dtype and device of a tensor, and no content; other items as they are."""
    return item.new_empty(()).expand(item.shape) if isinstance(item, Tensor) else item


def replaced(arguments: Any, keywords: Any, where: Any, item: Any) -> tuple[Any, Any]:
    """Arguments and keywords with ``item`` at the place ``where``."""
    if isinstance(where, int):
        return (*arguments[:where], item, *arguments[where + 1 :]), keywords
    return arguments, {**keywords, where: item}
