"""Arrays and a JSON header in one file that is never half written, and fingerprints of what it belongs to.

The file is a NumPy ``.npz`` without pickles: it can hold arrays and no code. Every entry has a CRC, so a
truncated or altered file is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from deconvviz.errors import CheckpointError
from deconvviz.files import replaced

FORMAT = 1
_HEADER = "header"


def save_archive(path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write ``header`` (whatever JSON can hold) and ``arrays``, replacing the file if there is one.

    Raises:
        CheckpointError: the file cannot be written (no space, no permission); the old one is as it was.
    """
    path = Path(path)
    text = json.dumps({"format": FORMAT, **header}, allow_nan=False)
    entries: dict[str, Any] = {**arrays, _HEADER: np.frombuffer(text.encode(), np.uint8)}
    try:
        with replaced(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **entries)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror or error}): make space or choose another place"
        ) from error


def load_archive(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read a file of :func:`save_archive` whole.

    Raises:
        CheckpointError: it is missing, damaged, of another kind or of a newer format.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop(_HEADER).tobytes())
        version = header["format"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except Exception as error:  # on damaged files zipfile and NumPy raise almost anything
        raise CheckpointError(
            f"{path} is damaged or no file of deconvviz ({type(error).__name__}: {error}): delete it to start afresh"
        ) from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}; this version of deconvviz reads {FORMAT}: update it")
    return header, arrays


def model_fingerprint(model: nn.Module) -> str:
    """The structure, and every parameter's and buffer's name, shape and content, as one hash."""
    state = model.state_dict(keep_vars=True).items()
    return hash_of(structure(model), *(part for item in state for part in item))


def structure(model: nn.Module) -> str:
    """Every module's name, class and settings; not the dropouts' rates, which change in training and nothing else."""
    modules = "\n".join(
        f"{name} {type(module).__name__}({'' if isinstance(module, _DropoutNd) else module.extra_repr()})"
        for name, module in model.named_modules()
    )
    return without_addresses(modules)


def without_addresses(text: str) -> str:
    """A ``repr`` as any process would give it."""
    return re.sub(r" at 0x\w+", "", text)


def hash_of(*items: object) -> str:
    """SHA-256 of texts and tensors, the latter by shape, dtype and content."""
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, Tensor):
            for part in _bytes(item):
                digest.update(part)
        else:
            digest.update(f"{item}\0".encode(errors="surrogateescape"))  # a file's name may be no UTF-8
    return digest.hexdigest()


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's shape, dtype and content: some times faster than its hash."""
    kind, content = _bytes(tensor)
    return zlib.crc32(content, zlib.crc32(kind))


def _bytes(tensor: Tensor) -> tuple[bytes, memoryview]:
    plain = tensor.detach().cpu().contiguous()
    return f"{tuple(plain.shape)} {plain.dtype}".encode(), plain.view(-1).view(torch.uint8).numpy().data
