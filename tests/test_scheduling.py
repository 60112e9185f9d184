"""Client slots: every client has one, neighbors take similar numbers of steps, devices have similar loads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwfedssl_jax.federated import scheduling


@pytest.mark.parametrize(
  ('clients', 'limit', 'num_devices', 'chunk', 'slots'),
  [
    (10, 1, 1, 1, 10),
    (10, 10, 1, 10, 10),
    (10, 8, 1, 5, 10),
    (11, 4, 1, 4, 12),
    (997, 10, 1, 10, 1000),
    (10, 1, 8, 1, 16),
    (10, 4, 2, 3, 12),
    (3, 4, 8, 1, 8),
  ],
)
def test_layout(clients, limit, num_devices, chunk, slots):
  assert scheduling.make_layout(clients, limit, num_devices) == (chunk, num_devices, slots)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 8))
def test_every_client_has_one_slot_with_little_padding(steps, limit, num_devices):
  steps = np.array(steps)
  layout = scheduling.make_layout(len(steps), limit, num_devices)
  assert layout.chunk <= limit
  order = scheduling.assign_slots(steps, layout)
  assert sorted(order[order >= 0]) == list(range(len(steps)))
  assert len(order) == layout.slots
  wasted = scheduling.padding_fraction(steps, order, layout)
  as_they_come = np.full(layout.slots, -1)
  as_they_come[: len(steps)] = np.arange(len(steps))
  assert 0 <= wasted <= max(scheduling.padding_fraction(steps, as_they_come, layout), 1e-9) or num_devices > 1
  if layout.chunk == 1:
    assert wasted == 0


def test_devices_have_equal_work_and_neighbors_similar_steps():
  steps = np.array([1, 9, 2, 8, 3, 7, 4, 6])
  layout = scheduling.make_layout(8, 2, 2)
  order = scheduling.assign_slots(steps, layout)
  assert steps[order].tolist() == [9, 7, 4, 2, 8, 6, 3, 1]  # the first device's four, in two chunks, then the second's
  assert scheduling.padding_fraction(steps, order, layout) == pytest.approx(1 - 40 / 48)
  assert scheduling.padding_fraction(steps, np.arange(8), layout) == pytest.approx(1 - 40 / 60)


def test_clients_of_one_size_stay_in_order_on_one_device():
  """So that sums of floating-point numbers keep their order."""
  assert scheduling.assign_slots(np.array([3, 3, 3]), scheduling.make_layout(3, 2)).tolist() == [0, 1, 2, -1]
