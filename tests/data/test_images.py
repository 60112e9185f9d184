"""One image: orientation, depth, color, size, and what is not decoded."""

import numpy as np
import pytest
from helpers import color, encoded
from PIL import Image

from lwfedssl_jax.data import images


def test_exif_rotation_is_applied():
  pixels = np.zeros((8, 16, 3), np.uint8)
  pixels[:, :8] = 255  # left half white; orientation 6 says: turn it clockwise, so the upper half
  exif = Image.Exif()
  exif[0x0112] = 6
  image = images.decode_image(encoded(Image.fromarray(pixels), 'JPEG', exif=exif, quality=95))
  assert image.shape == (16, 8, 3)
  assert image[:6].min() > 200 and image[10:].max() < 50


def test_16_bit_is_scaled_not_clipped():
  values = np.array([[0, 257 * 10], [257 * 128, 65535]], np.uint16)
  image = images.decode_image(encoded(Image.fromarray(values)))
  np.testing.assert_array_equal(image[..., 1], [[0, 10], [128, 255]])
  big_endian = images.decode_image(encoded(Image.fromarray(values), 'TIFF'))
  np.testing.assert_array_equal(big_endian, image)


def test_palette_cmyk_gray_bilevel_and_alpha():
  assert images.decode_image(encoded(color((255, 0, 0)).quantize(4), 'GIF'))[0, 0].tolist() == [255, 0, 0]
  cmyk = images.decode_image(encoded(color((0, 255, 255, 0), mode='CMYK'), 'JPEG'))[4, 4]
  assert cmyk[0] > 200 and cmyk[1] < 60 and cmyk[2] < 60
  assert images.decode_image(encoded(color(77, mode='L')))[0, 0].tolist() == [77] * 3
  assert images.decode_image(encoded(color(1, mode='1')))[0, 0].tolist() == [255] * 3
  assert images.decode_image(encoded(color((0, 0, 0, 0), mode='RGBA')))[0, 0].tolist() == [255] * 3
  assert images.decode_image(encoded(color((0, 100), mode='LA')))[0, 0].tolist() == [155] * 3
  palette = color((255, 0, 0)).quantize(4)
  transparent = encoded(palette, 'PNG', transparency=palette.getpixel((0, 0)))
  assert images.decode_image(transparent)[0, 0].tolist() == [255] * 3


def test_first_frame_of_an_animation():
  frames = [color((255, 0, 0)), color((0, 0, 255))]
  for kind in ('GIF', 'WEBP'):
    options = {'lossless': True} if kind == 'WEBP' else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert images.decode_image(data)[0, 0].tolist() == [255, 0, 0]


def test_resize_is_central_and_antialiased():
  pixels = np.zeros((64, 128, 3), np.uint8)
  pixels[:, :32] = pixels[:, 96:] = [255, 0, 0]  # outside the central square
  pixels[::2, 32:96] = 200  # stripes of one pixel: antialiasing makes them even
  image = images.decode_image(pixels, 16)
  assert image.shape == (16, 16, 3)
  np.testing.assert_allclose(image[2:-2, 2:-2].astype(int), 100, atol=4)
  assert abs(image[..., 0].astype(int) - image[..., 1])[:, 1:-1].max() < 5


def test_large_jpeg_is_reduced_well():
  small = np.random.default_rng(0).integers(60, 196, (32, 32)).astype(np.uint8)
  photograph = Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC)
  image = images.decode_image(encoded(photograph, 'JPEG', quality=95), 64)  # decoded at half its size, then resized
  expected = np.asarray(photograph.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
  assert abs(image[..., 0] - expected).mean() < 3 and expected.std() > 20


def test_bombs_and_scripts_are_unreadable(monkeypatch):
  data = encoded(color(0, (64, 64), 'L'))
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 3000)  # 4,096 is no more than a warning to Pillow
  with pytest.warns(Image.DecompressionBombWarning), pytest.raises(images.UnreadableImageError):
    images.decode_image(data)
  with pytest.raises(images.UnreadableImageError):
    images.decode_image(encoded(color(0, (8, 8), 'L'), 'EPS'))  # would start Ghostscript
  assert '.eps' not in images.extensions() and {'.png', '.jpg', '.webp', '.bmp', '.tif'} <= images.extensions()
