"""Pictures in, pictures out: from a file to a network's input, from a projection to pixels.

The idea: a projection is a *signed* map in input space, so zero is shown as mid-grey and the sign as
brighter or darker, symmetrically::

    pixel = 128 + round(127 * clip(projection / scale, -1, 1))

where ``scale`` is a high percentile of the non-zero magnitudes: a few bright pixels do not darken the
rest, and the few pixels of a small receptive field are still visible.

The caveat: each map has its own scale unless one is given, so brightness compares within a map, not
between maps. State the scale beside the picture, or share one.

>>> import torch
>>> projection = torch.tensor([[[-2.0, 0.0, 1.0, 9.0]]])  # (C, H, W) = (1, 1, 4)
>>> displayable(projection, scale=2.0)[0, :, 0].tolist()
[1, 128, 192, 255]

Axes: C channels, H rows, W columns. Pixels are ``uint8`` (H, W, 3), RGB, 0..255. Whatever takes a tensor
takes any dtype and device, and raises ``InvalidInput`` for another shape and for NaN or infinite values.
"""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from deconvviz.errors import InvalidInput, PictureError
from deconvviz.files import replaced

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Pillow reads more, but some of its plugins start programs (EPS runs Ghostscript).
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
# Pillow only warns above this and refuses above twice this. As RGB it is 256 MiB.
MAX_PIXELS = 89_478_485
# What white may be in the modes deeper than 8 bits: the first that the picture does not exceed.
WHITES = {"I;16": (65535,), "I": (65535,), "F": (1, 255)}

_one_decoding = threading.Lock()


def load_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture of any mode upright, whole and as 8-bit RGB; colour profiles are ignored.

    EXIF orientation is applied, transparency is laid on white, an animation gives its first frame. Deep
    greys are scaled, not clipped: integers from 0..65535, floats from 0..1 or 0..255, and values beyond
    from the range that they and zero span.

    Raises:
        PictureError: the file is missing, unreadable, empty, damaged, cut short, in none of ``FORMATS``,
            or claims more than ``MAX_PIXELS`` pixels.
    """
    try:
        file = Path(path).open("rb")  # noqa: SIM115 (closed below: errors from here on are the picture's)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{path} cannot be opened ({reason}): give the path of a readable file.") from error
    with file:
        try:
            return _decode(file)
        except UnidentifiedImageError as error:
            file.seek(0)
            start = file.read(8)
            problem = f"is not a picture (it {f'starts with {start!r}' if start else 'is empty'})"
            remedy = f"expected one of {', '.join(FORMATS)}. Convert it to PNG, or download it again."
            raise PictureError(f"{path} {problem}: {remedy}") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            remedy = f"expected at most {MAX_PIXELS} pixels. Downscale it first."
            raise PictureError(f"{path} is too large ({error}): {remedy}") from error
        except Exception as error:  # on damaged files Pillow's plugins raise almost anything
            problem = f"cannot be decoded ({type(error).__name__}: {error})"
            remedy = "damaged, cut short or of a rare kind. Download it again, or save it as an RGB PNG."
            raise PictureError(f"{path} {problem}: {remedy}") from error


def _decode(file: BinaryIO) -> Image.Image:
    with _strict_decoding(), Image.open(file, formats=FORMATS) as image:
        if math.prod(image.size) > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        image.load()
        return _rgb(ImageOps.exif_transpose(image))


@contextmanager
def _strict_decoding() -> Iterator[None]:
    """Hold Pillow's process-wide tolerance of truncated files off, then put it back as it was."""
    with _one_decoding:
        tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _rgb(image: Image.Image) -> Image.Image:
    depth = "I;16" if image.mode.startswith("I;16") else image.mode  # I;16B and I;16L are byte orders
    if depth in WHITES:
        return Image.fromarray(_eight_bits(np.asarray(image), WHITES[depth])).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _eight_bits(grey: NDArray[np.generic], whites: Sequence[int]) -> NDArray[np.uint8]:
    """Scale (H, W) ``grey`` from black..white to 0..255."""
    values = grey.astype(np.float64)
    if not np.isfinite(values).all():
        raise InvalidInput("picture holds NaN or infinite values, expected finite ones: replace them.")
    black, top = min(values.min(), 0.0), max(values.max(), 0.0)
    white = next((white for white in whites if black == 0 and top <= white), top)
    return np.rint((values - black) * (255 / (white - black))).astype(np.uint8)


def to_input(
    picture: Image.Image,
    size: int = 224,
    resize: int = 256,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
) -> Tensor:
    """Turn a picture into a classifier's input, as torchvision's ``ImageClassification`` preset does.

    Args:
        picture: of any mode; made RGB as by :func:`load_picture`.
        size: side of the centre crop in pixels.
        resize: short side before the crop in pixels.
        mean, std: of each channel, on the 0..1 scale; of one number each, the picture is made grey.
        interpolation: of the resizing, antialiased.

    Returns:
        ``float32`` (3, size, size), or (1, size, size) of grey, without batch axis; -2.1..2.6 with ImageNet's mean
        and deviation.

    Raises:
        InvalidInput: not a PIL picture, too thin to resize, not ``1 <= size <= resize``, or as
            :func:`require_normalisation`.
    """
    require_normalisation(mean, std)
    if not isinstance(picture, Image.Image):
        remedy = "use load_picture(path), or PIL.Image.fromarray(array)."
        raise InvalidInput(f"picture is a {type(picture).__name__}, expected a PIL image: {remedy}")
    if not 1 <= size <= resize:  # torchvision would pad with black, whose edge excites features
        remedy = f"expected 1 <= size <= resize: try resize={max(1, round(size * 8 / 7))}."
        raise InvalidInput(f"size is {size} and resize is {resize}, {remedy}")
    if max(picture.size) * resize**2 >= MAX_PIXELS * min(picture.size):
        found = f"picture is {picture.width} x {picture.height} pixels, too thin or empty"
        raise InvalidInput(f"{found}: expected under {MAX_PIXELS} with a short side of {resize}. Crop it.")
    prepare = ImageClassification(crop_size=size, resize_size=resize, mean=mean, std=std, interpolation=interpolation)
    return prepare(_rgb(picture) if len(mean) == 3 else _rgb(picture).convert("L"))


def require_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ``InvalidInput`` unless both are finite numbers, each one (grey) or three (RGB), and ``std`` is above 0."""
    try:
        given = np.asarray([mean, std], np.float64)
    except (TypeError, ValueError):  # of two lengths, or no numbers
        given = np.zeros(0)
    if given.shape not in ((2, 1), (2, 3)) or not np.isfinite(given).all() or not (given[1] > 0).all():
        raise InvalidInput(
            f"mean is {mean} and std {std}; expected one number each for grey pictures or three for RGB, std above 0"
        )


def to_pixels(
    inputs: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> NDArray[np.uint8]:
    """Undo the normalisation of :func:`to_input`: a (3, H, W) tensor becomes pixels, clipped to 0..255.

    Any other number of channels is shown as grey, by their mean: of a mean and deviation of its own, one number each;
    without (ImageNet's are of three) it is stretched from its least value, black, to its greatest, white.
    """
    require_normalisation(mean, std)
    values = _shown(_finite(inputs, "inputs"))
    if len(values) < len(mean):
        low, high = values.min(), values.max()
        mean, std = (0.5,), (1.0,)
        values = (values - (low + high) / 2) / ((high - low) or 1.0)
    unit = values.transpose(1, 2, 0) * np.asarray(std) + np.asarray(mean)
    return np.rint(255 * unit.clip(0, 1)).astype(np.uint8).repeat(3 // len(values), axis=2)


def display_scale(projection: Tensor, percentile: float = 99.5) -> float:
    """Return the magnitude to show at full contrast, in the projection's unit; 0.0 for an all-zero map.

    Args:
        projection: (C, H, W), or (..., C, H, W) for one scale shared by several maps. Unless C is 3,
            the magnitudes are those of the mean over C, which is what :func:`displayable` shows.
        percentile: of the non-zero magnitudes, 0..100; beyond, ``InvalidInput``.
    """
    if not 0 <= percentile <= 100:
        raise InvalidInput(f"percentile is {percentile}, expected 0..100: 99.5 suits most maps.")
    values = _shown(_finite(projection, "projection", stacked=True))
    magnitudes = np.abs(values[values != 0])
    return float(np.percentile(magnitudes, percentile)) if magnitudes.size else 0.0


def displayable(projection: Tensor, scale: float | None = None, percentile: float = 99.5) -> NDArray[np.uint8]:
    """Show a signed (C, H, W) map about mid-grey: 0 as 128, ``scale`` as 255, ``-scale`` as 1, clipped.

    Three channels are shown as RGB, any other number as grey, by their mean. An all-zero map is plain 128
    at any scale; otherwise ``InvalidInput`` unless the scale is positive and finite.

    Args:
        projection: (C, H, W).
        scale: in the projection's unit; ``None`` for ``display_scale(projection, percentile)``.
        percentile: used only without ``scale``.
    """
    values = _shown(_finite(projection, "projection"))
    if scale is None:
        scale = display_scale(projection, percentile)
    if not values.any():
        scale = 1.0
    if not 0 < scale < math.inf:
        raise InvalidInput(f"scale is {scale}, expected positive and finite: use None for the map's own.")
    contrast = np.rint(127 * (values.clip(-scale, scale) / scale))  # rounded about zero, hence odd
    grey = np.broadcast_to(128 + contrast, (3, *values.shape[1:]))
    return np.ascontiguousarray(grey.transpose(1, 2, 0), dtype=np.uint8)


def crop_to_signal(projection: Tensor, margin: int = 8) -> tuple[int, int, int, int]:
    """Find the box of the non-zero pixels of a (C, H, W) map; the whole map if all are zero.

    Returns:
        ``(y0, y1, x0, x1)`` in pixels, ends excluded: the part is ``projection[:, y0:y1, x0:x1]``. The box
        is grown by ``margin`` pixels on each side, as far as the map reaches.
    """
    if margin < 0:
        raise InvalidInput(f"margin is {margin}, expected 0 pixels or more: use 0 for the tight box.")
    values = _finite(projection, "projection")
    height, width = values.shape[1:]
    rows, columns = np.nonzero((values != 0).any(axis=0))
    if not len(rows):
        return 0, height, 0, width
    y0, y1 = max(int(rows.min()) - margin, 0), min(int(rows.max()) + 1 + margin, height)
    x0, x1 = max(int(columns.min()) - margin, 0), min(int(columns.max()) + 1 + margin, width)
    return y0, y1, x0, x1


def _finite(tensor: Tensor, name: str, stacked: bool = False) -> NDArray[np.float64]:
    """Return the values of a (C, H, W) tensor, or (..., C, H, W) if ``stacked``, or raise InvalidInput."""
    shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
    if len(shape) < 3 or (len(shape) > 3 and not stacked) or 0 in shape:
        found = f"{type(tensor).__name__} {shape or ''}".strip()
        remedy = f"take one of a batch with {name}[0]."
        raise InvalidInput(f"{name} is a {found}, expected a non-empty tensor (C, H, W): {remedy}")
    values = tensor.detach().cpu().double().numpy()
    if bad := int((~np.isfinite(values)).sum()):
        remedy = "check the weights and the input, and compute in float32."
        raise InvalidInput(f"{name} holds {bad} NaN or infinite of {values.size} values: {remedy}")
    return values


def _shown(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Reduce (..., C, H, W) to the channels that are shown: RGB, or one of grey."""
    return values if values.shape[-3] == 3 else values.mean(axis=-3, keepdims=True)


def save_picture(array: NDArray[np.uint8], path: str | os.PathLike[str]) -> None:
    """Write (H, W, 3) pixels as PNG or JPEG, by the suffix, as :func:`atomic_write` does."""
    check_pixels(array, "array")
    with atomic_write(path, PICTURE_SUFFIXES) as temporary:
        Image.fromarray(array).save(temporary, quality=95)


def check_pixels(array: NDArray[np.uint8], name: str) -> None:
    """Raise ``InvalidInput``, calling the array ``name``, unless it is non-empty ``uint8`` (H, W, 3)."""
    dtype, shape = getattr(array, "dtype", None), tuple(getattr(array, "shape", ()))
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        found = f"{type(array).__name__} of {dtype} {shape}"
        raise InvalidInput(f"{name} is a {found}, expected uint8 (H, W, 3): use displayable or to_pixels.")


@contextmanager
def atomic_write(path: str | os.PathLike[str], suffixes: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it if the block succeeds, and goes if not.

    Parent folders are made as needed.

    Raises:
        InvalidInput: the suffix of ``path``, in small letters, is not one of ``suffixes``.
        PictureError: the path cannot be written; what was there is as it was.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise InvalidInput(f"{path} ends in {path.suffix!r}, expected {', '.join(suffixes)}: rename it.")
    try:
        with replaced(path) as temporary:
            yield temporary
    except OSError as error:
        reason = error.strerror or error
        raise PictureError(f"{path} cannot be written ({reason}): choose another folder or format.") from error
