"""Pictures against values worked out by hand, torchvision's presets, and files damaged on purpose."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.models import Inception_V3_Weights, ResNet18_Weights

from deconvviz import images
from deconvviz.errors import InvalidInput, PictureError
from deconvviz.images import (
    crop_to_signal,
    display_scale,
    displayable,
    load_picture,
    save_picture,
    to_input,
    to_pixels,
)


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def loaded(picture, path, **options):
    """Save with Pillow, load with ours: the array."""
    picture.save(path, **options)
    result = load_picture(path)
    assert result.mode == "RGB"
    return np.asarray(result)


def grey(*values):
    """One row of grey values as the (1, W, 3) pixels they should load as."""
    return np.repeat(np.array([values], dtype=np.uint8)[..., None], 3, axis=2)


def png(width, height, data=b""):
    """A grey 8-bit PNG whose header may lie."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", data),
        (b"IEND", b""),
    ]
    framed = (struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


# Loading: every mode.


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "gif", "webp"])
def test_rgb_in_every_lossless_format(rgb, tmp_path, suffix):
    rgb[:] = rgb[:1, :1]  # one colour, which a GIF palette holds exactly
    options = {"lossless": True} if suffix == "webp" else {}
    assert (loaded(Image.fromarray(rgb), tmp_path / f"a.{suffix}", **options) == rgb).all()


def test_rgb_png_is_exact(rgb, tmp_path):
    assert (loaded(Image.fromarray(rgb), tmp_path / "a.png") == rgb).all()


def test_grey_and_one_bit(tmp_path):
    ramp = Image.fromarray(np.array([[0, 7, 128, 255]], dtype=np.uint8))
    assert (loaded(ramp, tmp_path / "a.png") == grey(0, 7, 128, 255)).all()
    assert (loaded(ramp.convert("1", dither=0), tmp_path / "b.png") == grey(0, 0, 255, 255)).all()


@pytest.mark.parametrize(
    ("transparency", "expected"),
    [(None, [(200, 10, 30), (0, 90, 250)]), (1, [(200, 10, 30), (255, 255, 255)])],
)
def test_palette(tmp_path, transparency, expected):
    picture = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    picture.putpalette([200, 10, 30, 0, 90, 250])
    options = {} if transparency is None else {"transparency": transparency}
    assert loaded(picture, tmp_path / "a.png", **options).tolist() == [[list(c) for c in expected]]


def test_palette_with_partial_transparency(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    picture.putpalette([200, 10, 30, 0, 100, 250])
    result = loaded(picture, tmp_path / "a.png", transparency=bytes([255, 51]))  # 51/255 = a fifth
    np.testing.assert_allclose(result, [[[200, 10, 30], [204, 224, 254]]], atol=1)


def test_alpha_is_laid_on_white(rgb, tmp_path):
    alpha = np.linspace(0, 255, 12 * 20).reshape(12, 20, 1).round().astype(np.uint8)
    result = loaded(Image.fromarray(np.concatenate([rgb, alpha], axis=2)), tmp_path / "a.png")
    opacity = alpha / 255
    np.testing.assert_allclose(result, rgb * opacity + 255 * (1 - opacity), atol=1)


def test_grey_with_alpha_is_laid_on_white(tmp_path):
    values = np.array([[[0, 255], [0, 0], [100, 51]]], dtype=np.uint8)
    picture = Image.frombytes("LA", (3, 1), values.tobytes())
    np.testing.assert_allclose(loaded(picture, tmp_path / "a.png"), grey(0, 255, 224), atol=1)


@pytest.mark.parametrize(("mode", "key", "value"), [("L", 9, 9), ("RGB", (9, 9, 9), (9, 9, 9))])
def test_a_transparent_colour_is_laid_on_white(tmp_path, mode, key, value):
    picture = Image.new(mode, (2, 1), 50 if mode == "L" else (50, 50, 50))
    picture.putpixel((0, 0), value)
    assert (loaded(picture, tmp_path / "a.png", transparency=key) == grey(255, 50)).all()


def test_cmyk(tmp_path):
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    picture = Image.frombytes("CMYK", (4, 1), inks.tobytes())
    expected = [[[255, 255, 255], [0, 255, 255], [255, 0, 0], [0, 0, 0]]]
    assert loaded(picture, tmp_path / "a.tif").tolist() == expected


def test_cmyk_jpeg(tmp_path):
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    np.testing.assert_allclose(loaded(picture, tmp_path / "a.jpg")[8, 8], [255, 0, 0], atol=4)


def test_ycbcr(tmp_path):
    y, cb, cr = 120, 90, 160  # JFIF's formula
    expected = [
        y + 1.402 * (cr - 128),
        y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
        y + 1.772 * (cb - 128),
    ]
    result = loaded(Image.new("YCbCr", (4, 4), (y, cb, cr)), tmp_path / "a.tif")
    np.testing.assert_allclose(result[0, 0], expected, atol=1)


@pytest.mark.parametrize(("dtype", "suffix"), [("<u2", "png"), ("<u2", "tif"), (">u2", "tif"), ("<i4", "tif")])
def test_a_16_bit_ramp_becomes_an_8_bit_ramp(tmp_path, dtype, suffix):
    ramp = (np.arange(256).reshape(16, 16) * 257).astype(dtype)
    mode = {"<u2": "I;16", ">u2": "I;16B", "<i4": "I"}[dtype]
    result = loaded(Image.frombytes(mode, (16, 16), ramp.tobytes()), tmp_path / f"a.{suffix}")
    assert (result == np.arange(256).reshape(16, 16, 1)).all()


def test_dark_16_bit_pictures_stay_dark(tmp_path):
    picture = Image.fromarray(np.full((2, 2), 257 * 3, dtype=np.uint16))
    assert (loaded(picture, tmp_path / "a.png") == 3).all()


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("F", [0, 0.2, 1], [0, 51, 255]),
        ("F", [0, 2, 250], [0, 2, 250]),
        ("F", [0, 250, 500], [0, 128, 255]),
        ("F", [-1, 0, 4], [0, 51, 255]),
        ("F", [0, 0, 0], [0, 0, 0]),
        ("F", [-3, -3, -3], [0, 0, 0]),
        ("F", [-4, -2, -1], [0, 128, 191]),
        ("I", [0, 100_000, 500_000], [0, 51, 255]),
        ("I", [-100, 0, 400], [0, 51, 255]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_deep_greys_are_scaled_not_clipped(tmp_path, mode, values, expected):
    picture = Image.fromarray(np.array([values], dtype=np.float32 if mode == "F" else np.int32))
    assert picture.mode == mode
    assert (loaded(picture, tmp_path / "a.tif") == grey(*expected)).all()


def test_a_float_picture_with_nan_is_refused(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(PictureError, match=r"a\.tif.*NaN"):
        load_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if suffix == "webp" else {}
    result = loaded(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert (result == (255, 0, 0)).all()


UPRIGHT = {  # how EXIF says the stored array came about is undone
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(rgb, tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    result = loaded(Image.fromarray(rgb), tmp_path / f"a.{suffix}", exif=exif, **options)
    assert (result == UPRIGHT[orientation](rgb)).all()


def test_exif_orientation_of_a_jpeg(tmp_path):
    stored = np.zeros((16, 32, 3), dtype=np.uint8)
    stored[:, :16] = 255  # white at the left; turned clockwise, at the top
    exif = Image.Exif()
    exif[0x0112] = 6
    result = loaded(Image.fromarray(stored), tmp_path / "a.jpg", exif=exif, quality=100)
    assert result.shape == (32, 16, 3)
    assert result[:14].min() > 240
    assert result[18:].max() < 15


# Loading: what is refused.


@pytest.fixture(params=[False, True], ids=["strict", "tolerant"])
def pillow_tolerance(request, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", request.param)
    return request.param


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_truncated_files_are_refused_whatever_pillow_tolerates(tmp_path, suffix, share, pillow_tolerance):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(buffer.getvalue()[: int(share * buffer.tell())])
    with pytest.raises(PictureError, match=rf"cut\.{suffix}") as caught:
        load_picture(path)
    assert caught.value.__cause__ is not None
    assert pillow_tolerance == ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("suffix", ["jpeg", "png"])
def test_at_no_length_does_a_part_pass_for_the_whole(rgb, tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    whole = loaded(Image.fromarray(rgb), path)
    content = path.read_bytes()
    refused = 0
    for length in range(len(content)):
        path.write_bytes(content[:length])
        try:
            assert (np.asarray(load_picture(path)) == whole).all()  # a PNG's end holds no pixels
        except PictureError:
            refused += 1
    assert refused > 0.95 * len(content)


def test_a_flipped_byte_in_a_png_is_refused(rgb, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(rgb).save(path)
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(PictureError, match=r"a\.png cannot be decoded"):
        load_picture(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"hello, world", "starts with b'hello, w'.*expected one of BMP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "expected one of BMP"),
        (png(50_000, 50_000), "too large.*at most 89478485 pixels"),
        (png(10_000, 10_000), "too large.*at most 89478485 pixels"),  # Pillow would only warn
        (png(8, 8), "cannot be decoded"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_are_no_whole_picture(tmp_path, content, message):
    path = tmp_path / "odd.png"
    path.write_bytes(content)
    with pytest.raises(PictureError, match=rf"odd\.png.*{message}"):
        load_picture(path)


@pytest.mark.filterwarnings("error")
def test_a_bomb_is_refused_alike_where_warnings_are_errors(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(10_000, 10_000))
    with pytest.raises(PictureError, match=r"bomb\.png is too large"):
        load_picture(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("error")
def test_the_pixel_limit_is_our_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(images, "MAX_PIXELS", 12)
    Image.new("RGB", (4, 3)).save(tmp_path / "fits.png")
    assert load_picture(tmp_path / "fits.png").size == (4, 3)
    Image.new("RGB", (13, 1)).save(tmp_path / "over.png")
    with pytest.raises(PictureError, match=r"over\.png is too large \(13 x 1 pixels\)"):
        load_picture(tmp_path / "over.png")


@pytest.mark.parametrize("name", ["missing.png", "folder", "nul\0byte.png"])
def test_paths_that_cannot_be_opened(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(PictureError, match="cannot be opened.*readable file") as caught:
        load_picture(tmp_path / name)
    assert name in str(caught.value)


def test_a_path_may_be_a_string(rgb, tmp_path):
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert (np.asarray(load_picture(str(tmp_path / "a.png"))) == rgb).all()


# To the network and back.


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (100, 90), (257, 256)])
@pytest.mark.parametrize(
    ("weights", "options"),
    [
        (ResNet18_Weights.IMAGENET1K_V1, {}),
        (Inception_V3_Weights.IMAGENET1K_V1, {"size": 299, "resize": 342}),
    ],
)
def test_to_input_equals_the_preset_of_the_weights(shape, weights, options):
    pixels = np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    result = to_input(picture, **options)
    assert result.dtype == torch.float32
    assert torch.equal(result, weights.transforms()(picture))


def test_to_input_equals_its_definition():
    pixels = np.random.default_rng(3).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    small = np.asarray(Image.fromarray(pixels).resize((48, 32), Image.Resampling.BILINEAR))
    crop = small[2:30, 10:38]  # 28 of 32 rows, 28 of 48 columns, centred
    expected = (crop / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.5]
    result = to_input(Image.fromarray(pixels), 28, 32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    np.testing.assert_allclose(result.permute(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I", "F"])
def test_to_input_takes_any_mode(mode):
    assert to_input(Image.new(mode, (30, 40)), 8, 8).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("picture", "options", "message"),
    [
        (np.zeros((4, 4, 3), dtype=np.uint8), {}, "is a ndarray.*fromarray"),
        (Image.new("RGB", (4, 4)), {"size": 299}, "size is 299 and resize is 256.*resize=342"),
        (Image.new("RGB", (4, 4)), {"size": 0}, "size is 0"),
        (Image.new("RGB", (1, 5000)), {}, "1 x 5000 pixels, too thin"),
        (Image.new("RGB", (0, 0)), {}, "0 x 0 pixels, too thin or empty"),
        (Image.new("F", (2, 2), float("nan")), {}, "NaN"),
    ],
)
def test_to_input_refuses(picture, options, message):
    with pytest.raises(InvalidInput, match=message):
        to_input(picture, **options)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        *(([0.5], [1.0, 1.0]), ([0.5, 0.5], [1.0, 1.0]), ([0.5], [0.0]), ([0.5], [-1.0]), ([float("nan")], [1.0])),
        *((0.5, 0.5), (None, None), ("abc", "abc")),
    ],
)
def test_a_normalisation_that_is_none(mean, std):
    with pytest.raises(InvalidInput, match="one number each for grey"):
        to_input(Image.new("RGB", (300, 300)), mean=mean, std=std)
    with pytest.raises(InvalidInput, match="one number each for grey"):
        to_pixels(torch.zeros(3, 4, 4), mean, std)


def test_to_pixels_undoes_to_input(rgb):
    inputs = to_input(Image.fromarray(rgb), size=12, resize=12)
    assert (to_pixels(inputs) == rgb[:, 4:16]).all()


def test_to_pixels_clips():
    assert to_pixels(torch.tensor([-99.0, 99.0, 0.0]).view(3, 1, 1)).tolist() == [[[0, 255, round(0.406 * 255)]]]


def test_to_pixels_of_one_channel():
    grey = torch.tensor([[[0.0, 0.5, 1.0, 2.0]]])
    assert to_pixels(grey)[0].tolist() == [[0] * 3, [64] * 3, [128] * 3, [255] * 3]
    assert to_pixels((grey - 0.25) / 0.5, [0.25], [0.5])[0].tolist() == [
        [0] * 3,
        [128] * 3,
        [255] * 3,
        [255] * 3,
    ]
    assert (to_pixels(torch.full((1, 2, 2), 7.0)) == 128).all()


@pytest.mark.parametrize("channels", [2, 4])
def test_to_pixels_shows_other_channels_as_grey_by_their_mean(channels):
    values = torch.rand(channels, 5, 6)
    assert (to_pixels(values) == to_pixels(values.mean(0, keepdim=True))).all()
    assert (to_pixels(values, [0.25], [0.5]) == to_pixels(values.mean(0, keepdim=True), [0.25], [0.5])).all()


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (4, 4), (3, 0, 4)])
def test_to_pixels_refuses_other_shapes(shape):
    with pytest.raises(InvalidInput, match="inputs"):
        to_pixels(torch.zeros(shape))


# Showing a projection.


def test_zero_is_plain_grey():
    for channels in (1, 3, 5):
        assert (displayable(torch.zeros(channels, 4, 6)) == np.full((4, 6, 3), 128)).all()
    assert (displayable(torch.zeros(3, 4, 6), scale=0.0) == 128).all()
    assert display_scale(torch.zeros(3, 4, 6)) == 0.0


def test_displayable_values():
    projection = torch.tensor([[[0.0, 2.0, -2.0, 1.0, -1.0, 5.0, -5.0]]])
    assert displayable(projection, scale=2.0)[0, :, 0].tolist() == [128, 255, 1, 192, 64, 255, 1]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("scale", [None, 0.3, 1e-30, 1e30])
def test_displayable_is_antisymmetric_about_grey(channels, scale):
    projection = torch.randn(channels, 9, 7, generator=torch.Generator().manual_seed(0))
    positive, negative = (displayable(x, scale).astype(int) for x in (projection, -projection))
    assert (negative == 256 - positive).all()


def test_channels():
    projection = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    shown = displayable(projection, scale=1.0)
    assert shown.shape == (5, 6, 3)
    assert shown.dtype == np.uint8
    for channel in range(3):
        assert (displayable(projection[channel : channel + 1], 1.0) == shown[..., channel : channel + 1]).all()
    four = torch.cat([projection, torch.ones(1, 5, 6)])
    assert (displayable(four, 1.0) == displayable(four.mean(0, keepdim=True), 1.0)).all()
    assert display_scale(four) == pytest.approx(display_scale(four.mean(0, keepdim=True)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_any_dtype_with_or_without_gradient(dtype):
    projection = torch.tensor([[[1, -1, 0]]], dtype=dtype, requires_grad=dtype.is_floating_point)
    assert displayable(projection)[0, :, 0].tolist() == [255, 1, 128]


def test_a_few_bright_pixels_do_not_darken_the_rest():
    projection = torch.ones(3, 100, 100)
    projection[:, 0, 0] = 1000.0
    assert display_scale(projection) == 1.0
    assert display_scale(projection, percentile=100) == 1000.0


def test_a_small_receptive_field_is_visible():
    projection = torch.zeros(3, 224, 224)
    projection[:, 100:107, 100:107] = 1e-5  # 49 of 50176 pixels: the plain 99.5th percentile is 0
    shown = displayable(projection)
    assert (shown[100:107, 100:107] == 255).all()
    assert (shown != 128).any(axis=2).sum() == 49


def test_display_scale_is_the_percentile_of_the_magnitudes():
    projection = torch.arange(-100.0, 101).view(1, 1, -1)
    for percentile in (0, 50, 99.5):
        expected = np.percentile(np.repeat(np.arange(1, 101), 2), percentile)
        assert display_scale(projection, percentile) == pytest.approx(expected)


def test_one_scale_for_several_maps():
    maps = torch.stack([torch.full((3, 4, 4), 1.0), torch.full((3, 4, 4), -8.0)])
    assert display_scale(maps, percentile=100) == 8.0


def test_large_maps_have_a_scale():
    assert display_scale(torch.ones(3, 2400, 2400)) == 1.0  # torch.quantile stops at 2**24 values


@pytest.mark.parametrize("function", [display_scale, displayable, crop_to_signal, to_pixels])
def test_nan_and_infinity_are_counted(function):
    projection = torch.zeros(3, 4, 4)
    projection[0, 0, 0], projection[1, 1, 1], projection[2, 2, 2] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(InvalidInput, match="3 NaN or infinite of 48 values"):
        function(projection)


@pytest.mark.parametrize("function", [displayable, crop_to_signal])
@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 4, 4), (3, 0, 4), (0, 4, 4), ()])
def test_other_shapes_are_refused(function, shape):
    with pytest.raises(InvalidInput, match=r"expected a non-empty tensor \(C, H, W\)"):
        function(torch.zeros(shape))


def test_arrays_are_refused():
    with pytest.raises(InvalidInput, match="projection is a ndarray"):
        displayable(np.zeros((3, 4, 4)))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_must_be_positive(scale):
    with pytest.raises(InvalidInput, match=f"scale is {scale}"):
        displayable(torch.ones(3, 2, 2), scale=scale)


@pytest.mark.parametrize("percentile", [-1, 101, float("nan")])
def test_a_percentile_is_0_to_100(percentile):
    with pytest.raises(InvalidInput, match=f"percentile is {percentile}"):
        display_scale(torch.ones(3, 2, 2), percentile)


@pytest.mark.parametrize(
    ("points", "margin", "expected"),
    [
        ([], 8, (0, 30, 0, 40)),
        ([(10, 20)], 0, (10, 11, 20, 21)),
        ([(10, 20)], 3, (7, 14, 17, 24)),
        ([(0, 39)], 8, (0, 9, 31, 40)),
        ([(12, 5), (20, 7)], 1, (11, 22, 4, 9)),
    ],
)
def test_crop_to_signal(points, margin, expected):
    projection = torch.zeros(3, 30, 40)
    for sign, (y, x) in enumerate(points):
        projection[1, y, x], projection[2, y, x] = (-1) ** sign, -((-1) ** sign)  # channels that cancel out
    assert crop_to_signal(projection, margin) == expected


def test_a_negative_margin_is_refused():
    with pytest.raises(InvalidInput, match="margin is -1"):
        crop_to_signal(torch.ones(1, 2, 2), margin=-1)


# Saving.


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "new/folder/a.png"])
def test_saved_png_is_exact_and_alone(rgb, tmp_path, name):
    path = tmp_path / name
    save_picture(rgb, path)
    assert (np.asarray(load_picture(path)) == rgb).all()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg"])
def test_saved_jpeg(tmp_path, name):
    save_picture(np.full((16, 16, 3), (200, 100, 50), dtype=np.uint8), tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert picture.format == "JPEG"
        np.testing.assert_allclose(picture.getpixel((8, 8)), (200, 100, 50), atol=3)


@pytest.mark.parametrize("name", ["a.xyz", "a", ".png"])
def test_an_unknown_suffix_names_the_known(rgb, tmp_path, name):
    with pytest.raises(InvalidInput, match=r"expected \.png, \.jpg, \.jpeg"):
        save_picture(rgb, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(4, 4, 3),
        "a",
    ],
)
def test_other_arrays_are_not_saved(tmp_path, array):
    with pytest.raises(InvalidInput, match=r"array is a .* expected uint8 \(H, W, 3\)"):
        save_picture(array, tmp_path / "a.png")


def test_unwritable_paths(rgb, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.png").mkdir()
    for name in ("file/a.png", "folder.png"):
        with pytest.raises(PictureError, match="cannot be written") as caught:
            save_picture(rgb, tmp_path / name)
        assert name in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_failed_save_leaves_the_old_file(rgb, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_picture(rgb, path)
    before = path.read_bytes()

    def half_written(self, target, **options):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half_written)
    with pytest.raises(PictureError, match=r"a\.png cannot be written \(No space left"):
        save_picture(255 - rgb, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
