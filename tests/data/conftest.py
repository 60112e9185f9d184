"""Fixtures of the data tests."""

import pytest

from lwfedssl_jax.data import cache, images


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
  """No test touches the user's cache, TFDS folder or temporary folder (TFDS builders leave empty folders there)."""
  (tmp_path / '.temporary').mkdir()
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path / '.temporary'))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds_default'))


@pytest.fixture
def decodes(monkeypatch):
  """Counts decoded images, and caches even the smallest data set."""
  monkeypatch.setattr(cache, 'MIN_BYTES', 0)
  counted, decode = [], images.decode_image

  def counting(raw, image_size=0):
    counted.append(raw)
    return decode(raw, image_size)

  monkeypatch.setattr(images, 'decode_image', counting)
  return counted
