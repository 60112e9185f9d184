"""A loaded encoder refuses images that it was not made for, in one line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import UsageError, pretrained
from lwfedssl_jax import config as configs


@pytest.fixture(scope='module')
def loaded():
  return pretrained.random_encoder(configs.configure(encoder='vit_micro', image_size=8), 0)


@pytest.mark.parametrize(
  ('shape', 'dtype', 'expected'),
  [
    ((2, 8, 8), 'uint8', 'the shape (B, 8, 8, 3), got (2, 8, 8)'),
    ((8, 8, 3), 'uint8', 'the shape (B, 8, 8, 3), got (8, 8, 3)'),
    ((2, 8, 8, 1), 'uint8', 'the shape (B, 8, 8, 3), got (2, 8, 8, 1)'),
    ((2, 16, 16, 3), 'float32', 'the shape (B, 8, 8, 3), got (2, 16, 16, 3)'),
    ((2, 8, 8, 3), 'int32', 'uint8, or floating point in [0, 1], got int32'),
  ],
)
def test_images_of_another_shape_or_type_are_refused(loaded, shape, dtype, expected):
  for images in (np.ones(shape, dtype), jnp.ones(shape, dtype)):
    for apply in (loaded.apply, jax.jit(loaded.apply)):
      with pytest.raises(UsageError) as raised:
        apply(loaded.params, images)
      assert str(raised.value) == f'images: expected {expected}'


@pytest.mark.parametrize('dtype', ['uint8', 'float32', 'float16', 'bfloat16'])
def test_other_images_have_embeddings(loaded, dtype):
  images = jax.ShapeDtypeStruct((2, 8, 8, 3), dtype)
  found = jax.eval_shape(functools.partial(loaded.apply, loaded.params), images)
  assert (found.shape, found.dtype) == ((2, loaded.encoder.width), jnp.float32)
