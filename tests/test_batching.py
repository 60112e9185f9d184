"""Batch plans: every image once an epoch up to the dropped remainder, masks, steps, randomness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwfedssl_jax.data import batching

plan_epochs = functools.partial(jax.jit, static_argnums=(3, 4, 5))(batching.plan_epochs)


def plan(num_images, batch_size=4, epochs=3, steps=None, capacity=None, seed=0):
  """Ids 100, 101, .. for a client's images and -1 for padding; returns ids and mask of its own steps, (E, S, B)."""
  steps = steps or max(1, num_images // batch_size)
  image_ids = np.full(capacity or num_images, -1, np.int32)
  image_ids[:num_images] = 100 + np.arange(num_images)
  ids, mask = plan_epochs(
    jax.random.key(seed), jnp.asarray(image_ids), jnp.int32(num_images), epochs, steps, batch_size
  )
  assert ids.shape == mask.shape == (epochs * steps, batch_size)
  assert mask.dtype == bool
  own = epochs * max(1, num_images // batch_size)
  assert not mask[own:].any()  # its own steps come first, without gaps
  assert mask[:own].any(axis=1).all()
  return tuple(np.asarray(steps[:own]).reshape(epochs, -1, batch_size) for steps in (ids, mask))


@pytest.mark.parametrize(
  ('num_images', 'batch_size', 'steps'),
  [(1, 4, 1), (3, 4, 1), (4, 4, 1), (7, 4, 1), (8, 4, 2), (9, 4, 2), (512, 512, 1), (1023, 512, 1), (1024, 512, 2)],
)
def test_steps_per_epoch(num_images, batch_size, steps):
  assert batching.steps_per_epoch(num_images, batch_size) == steps


@settings(max_examples=15, deadline=None)
@given(num_images=st.integers(1, 14), more_steps=st.integers(0, 2), seed=st.integers(0, 99))
def test_every_image_at_most_once_an_epoch_and_only_a_remainder_is_dropped(num_images, more_steps, seed):
  own_steps = max(1, num_images // 4)
  ids, mask = plan(num_images, steps=own_steps + more_steps, capacity=16, seed=seed)
  for epoch_ids, epoch_mask in zip(ids, mask):
    seen = epoch_ids[epoch_mask]
    assert len(set(seen)) == len(seen) == (num_images if num_images < 4 else num_images // 4 * 4)
    assert set(seen) <= set(range(100, 100 + num_images))
    # Only a client smaller than a batch has a step in which some samples are masked.
    assert epoch_mask.all() == (num_images >= 4)


def test_client_smaller_than_a_batch_sees_all_its_images_each_epoch():
  ids, mask = plan(3, batch_size=8, steps=2, capacity=20)
  for epoch_ids, epoch_mask in zip(ids, mask):
    assert sorted(epoch_ids[epoch_mask]) == [100, 101, 102]


def test_fewer_ids_than_slots():
  """The widest client has fewer images than a batch: the array of ids is smaller than one batch."""
  ids, mask = plan(3, batch_size=8, steps=1, capacity=3)
  assert all(sorted(i[m]) == [100, 101, 102] for i, m in zip(ids, mask, strict=True))


def test_every_image_is_used_over_many_epochs():
  """What an epoch drops is drawn anew, so no image is left out for ever."""
  ids, mask = plan(7, epochs=30)
  assert set(ids[mask]) == set(range(100, 107))


def test_epochs_and_keys_differ_and_a_key_repeats():
  ids, _ = plan(64, batch_size=8)
  assert not np.array_equal(ids[0], ids[1])
  assert not np.array_equal(ids[0], plan(64, batch_size=8, seed=1)[0][0])
  np.testing.assert_array_equal(ids, plan(64, batch_size=8)[0])
  assert not np.array_equal(ids[0].ravel(), np.sort(ids[0].ravel()))


def test_order_is_uniform():
  """Each image stands first about equally often: 400 epochs of 8 images, 50 +- 6.6 each."""
  ids, _ = plan(8, epochs=400)
  counts = np.bincount(ids[:, 0, 0] - 100, minlength=8)
  assert counts.min() > 20 and counts.max() < 80


def test_a_client_s_batches_do_not_depend_on_the_capacity():
  ids, mask = plan(9, steps=2, capacity=9)
  more_ids, more_mask = plan(9, steps=9, capacity=40)
  np.testing.assert_array_equal(mask, more_mask)
  np.testing.assert_array_equal(ids, more_ids)


def test_no_image_no_step():
  _, mask = plan_epochs(jax.random.key(0), jnp.zeros(8, jnp.int32), jnp.int32(0), 2, 2, 4)
  assert not mask.any()
