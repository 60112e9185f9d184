"""The round loader: the client of each slot, its images, and what a budget refuses."""

import numpy as np
import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax.data.federated_dataset import FederatedDataset
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.federated import round_loader, sampling
from lwfedssl_jax.federated.round_loader import RoundLoader

SIZES = (9, 4, 14, 3, 8, 6) * 5
IMAGE_BYTES = 16 * 16 * 3


def make_dataset():
  """Image i is filled with i; clients hold disjoint ones in an order that is not theirs."""
  count = sum(SIZES)
  images = np.tile(np.arange(count, dtype=np.uint8)[:, None, None, None], (1, 16, 16, 3))
  order = np.random.default_rng(0).permutation(count)
  parts = [np.sort(part) for part in np.split(order, np.cumsum(SIZES)[:-1])]
  return FederatedDataset(ImageDataset('x', images, None, images[:0], None, ()), parts, np.arange(0), images[:0])


def config_of(**values):
  return configs.configure(
    num_clients=30,
    clients_per_round=4,
    batch_size=4,
    local_epochs=2,
    method='layerwise',
    client_dropout=0.3,
    image_size=16,
    **values,
  )


def make(budget_bytes=0.0, chunk=2):
  config = config_of(device_data_budget_mb=budget_bytes / 1e6, client_chunk=chunk)
  data = make_dataset()
  participation = sampling.plan_participation(0, 8, 30, 4, 0.3)
  placement = round_loader.choose_placement(config, data, participation)
  return RoundLoader(config, data, participation, placement), data, participation, placement


@pytest.mark.parametrize('share', [0, 0.9, 1])  # of what all images take; 0: no limit
def test_a_client_s_images_are_its_own_in_their_order_wherever_they_come_from(share):
  source, data, participation, placement = make(share * sum(SIZES) * IMAGE_BYTES)
  assert placement.streams == (share == 0.9)
  for round_num in (0, 1, 2, 5):  # the last is not the one that was copied ahead
    batch = source.load(round_num)
    images = np.asarray(batch.images)
    present = batch.client_ids[batch.client_ids >= 0]
    assert sorted(present) == participation.client_ids[round_num].tolist()
    sizes = [SIZES[client] for client in present]
    steps = [max(1, size // 4) for size in sizes]
    assert steps == sorted(steps, reverse=True)
    for slot, client in enumerate(batch.client_ids):
      own = np.asarray(batch.clients.image_ids)[slot, : int(batch.clients.num_images[slot])]
      assert images[own, 0].tolist() == data.client_images[client].tolist()
      position = participation.client_ids[round_num].tolist().index(client)
      assert bool(batch.clients.returned[slot]) == participation.returned[round_num][position]
  source.close()


def smallest_budget():
  with pytest.raises(UsageError, match='--device_data_budget_mb: expected at least') as refused:
    make(1.0)
  return float(str(refused.value).split('at least ')[1].split(',')[0]) * 1e6


def test_streaming_holds_twice_the_most_images_of_a_round_and_no_more():
  source, _, participation, placement = make(smallest_budget())
  assert placement.streams
  most = max(sum(SIZES[client] for client in ids) for ids in participation.client_ids)
  assert source.load(0).images.shape == (most, IMAGE_BYTES)
  assert 0 <= smallest_budget() - 2 * most * IMAGE_BYTES < 1000
  source.close()


def test_the_steps_of_all_clients_are_known_only_where_they_are_the_same():
  source, data, participation, placement = make()
  assert source.client_steps() == 0
  alike = data._replace(client_images=[ids[:3] for ids in data.client_images])  # one masked step an epoch
  assert RoundLoader(config_of(), alike, participation, placement).client_steps() == 2
  eights = data._replace(client_images=[np.arange(8 + i % 4) for i in range(30)])
  assert RoundLoader(config_of(), eights, participation, placement).client_steps() == 4


def test_an_empty_slot_has_no_image_and_does_not_return():
  source, _, _, _ = make(chunk=3)
  batch = source.load(0)
  empty = batch.client_ids < 0
  assert empty.sum() == 0  # four clients: two chunks of two
  source.close()
  config = config_of(client_chunk=3)
  config = configs.with_values(config, {'clients_per_round': 5})
  participation = sampling.plan_participation(0, 2, 30, 5, 0.0)
  source = RoundLoader(
    config, make_dataset(), participation, round_loader.choose_placement(config, make_dataset(), participation)
  )
  batch = source.load(1)
  empty = batch.client_ids < 0
  assert empty.sum() == 1
  assert np.asarray(batch.clients.num_images)[empty].tolist() == [0]
  assert np.asarray(batch.clients.returned).tolist() == (~empty).tolist()
  assert 0 < batch.padding_fraction < 0.5
  source.close()
