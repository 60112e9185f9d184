"""The feed: who sits where, the images that go with them, and what a budget refuses."""

import numpy as np
import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax.base import UsageError
from lwfedssl_jax.data.federation import Federation
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.federated import feed, sampling

SIZES = (9, 4, 14, 3, 8, 6) * 5
IMAGE_BYTES = 16 * 16 * 3


def federation():
  """Image i is filled with i; clients hold disjoint ones in an order that is not theirs."""
  count = sum(SIZES)
  images = np.tile(np.arange(count, dtype=np.uint8)[:, None, None, None], (1, 16, 16, 3))
  order = np.random.default_rng(0).permutation(count)
  parts = [np.sort(part) for part in np.split(order, np.cumsum(SIZES)[:-1])]
  return Federation(ImageDataset('x', images, None, images[:0], None, ()), parts, np.arange(0), images[:0])


def config_of(**values):
  return configs.configure(num_clients=30, clients_per_round=4, batch_size=4, local_epochs=2, method='layerwise',
                           client_dropout=0.3, image_size=16, **values)


def make(budget_bytes=0.0, chunk=2):
  config = config_of(device_data_budget_mb=budget_bytes / 1e6, client_chunk=chunk)
  data = federation()
  participation = sampling.plan_participation(0, 8, 30, 4, 0.3)
  placement = feed.choose_placement(config, data, participation)
  return feed.Feed(config, data, participation, placement), data, participation, placement


@pytest.mark.parametrize('share', [0, 0.9, 1])  # of what all images take; 0: no limit
def test_a_client_s_images_are_its_own_in_their_order_wherever_they_come_from(share):
  source, data, participation, placement = make(share * sum(SIZES) * IMAGE_BYTES)
  assert placement.streams == (share == 0.9)
  for round_num in (0, 1, 2, 5):  # the last is not the one that was copied ahead
    fed = source.take(round_num)
    images = np.asarray(fed.images)
    seated = fed.client_ids[fed.client_ids >= 0]
    assert sorted(seated) == participation.client_ids[round_num].tolist()
    sizes = [SIZES[client] for client in seated]
    steps = [max(1, size // 4) for size in sizes]
    assert steps == sorted(steps, reverse=True)
    for seat, client in enumerate(fed.client_ids):
      own = np.asarray(fed.clients.image_ids)[seat, :int(fed.clients.num_images[seat])]
      assert images[own, 0, 0, 0].tolist() == data.client_images[client].tolist()
      position = participation.client_ids[round_num].tolist().index(client)
      assert bool(fed.clients.returned[seat]) == participation.returned[round_num][position]
  source.close()


def smallest_budget():
  with pytest.raises(UsageError, match='--device_data_budget_mb: expected at least') as refused:
    make(1.0)
  return float(str(refused.value).split('at least ')[1].split(',')[0]) * 1e6


def test_streaming_holds_twice_the_most_images_of_a_round_and_no_more():
  source, _, participation, placement = make(smallest_budget())
  assert placement.streams
  most = max(sum(SIZES[client] for client in ids) for ids in participation.client_ids)
  assert source.take(0).images.shape == (most, 16, 16, 3)
  assert 0 <= smallest_budget() - 2 * most * IMAGE_BYTES < 1000
  source.close()


def test_the_steps_of_all_clients_are_known_only_where_they_are_the_same():
  source, data, participation, placement = make()
  assert source.client_steps() == 0
  alike = data._replace(client_images=[ids[:3] for ids in data.client_images])  # one masked step an epoch
  assert feed.Feed(config_of(), alike, participation, placement).client_steps() == 2
  eights = data._replace(client_images=[np.arange(8 + i % 4) for i in range(30)])
  assert feed.Feed(config_of(), eights, participation, placement).client_steps() == 4


def test_an_empty_seat_has_no_image_and_does_not_return():
  source, _, _, _ = make(chunk=3)
  fed = source.take(0)
  empty = fed.client_ids < 0
  assert empty.sum() == 0  # four clients: two chunks of two
  source.close()
  config = config_of(client_chunk=3)
  config = configs.with_values(config, {'clients_per_round': 5})
  participation = sampling.plan_participation(0, 2, 30, 5, 0.0)
  source = feed.Feed(config, federation(), participation, feed.choose_placement(config, federation(), participation))
  fed = source.take(1)
  empty = fed.client_ids < 0
  assert empty.sum() == 1
  assert np.asarray(fed.clients.num_images)[empty].tolist() == [0]
  assert np.asarray(fed.clients.returned).tolist() == (~empty).tolist()
  assert 0 < fed.padded_share < 0.5
  source.close()
