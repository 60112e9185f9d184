"""Partitions: each image to exactly one client, nobody empty, seeded, ending even in the extremes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwfedssl_jax.config_groups import PartitionConfig
from lwfedssl_jax.data import partition
from lwfedssl_jax.data.partition import class_counts, partition_images
from lwfedssl_jax.errors import UsageError

LABELS = np.random.default_rng(0).integers(0, 10, 600)


def split_images(labels=LABELS, num_clients=10, seed=0, num_images=None, **values):
  config = PartitionConfig(num_clients=num_clients, **values)
  return partition_images(labels, num_images or len(labels), num_clients, config, seed)


def check_cover(parts, num_images, num_clients):
  assert len(parts) == num_clients
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(num_images))
  assert min(map(len, parts)) >= 2
  assert all((np.diff(part) > 0).all() for part in parts)


KINDS = [
  {'partition': 'iid'},
  {'partition': 'iid', 'client_size_sigma': 2.0},
  {'partition': 'dirichlet', 'dirichlet_beta': 0.5},
  {'partition': 'dirichlet', 'dirichlet_beta': 1e-6},
  {'partition': 'dirichlet', 'dirichlet_beta': 1e6},
  {'partition': 'dirichlet_clients', 'dirichlet_beta': 0.5},
  {'partition': 'dirichlet_clients', 'dirichlet_beta': 1e-300},
  {'partition': 'shards', 'shards_per_client': 2},
]


@pytest.mark.parametrize('kind', KINDS)
def test_covers_all_images_once_and_is_seeded(kind):
  parts = split_images(**kind)
  check_cover(parts, 600, 10)
  again, other = split_images(**kind), split_images(seed=1, **kind)
  assert all(np.array_equal(a, b) for a, b in zip(parts, again))
  assert not all(np.array_equal(a, b) for a, b in zip(parts, other))


@pytest.mark.parametrize('kind', KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_size(kind, data):
  num_clients = data.draw(st.integers(1, 12))
  num_images = data.draw(st.integers(2 * num_clients, 80))
  classes = data.draw(st.integers(1, 5))
  labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=num_images, max_size=num_images)))
  seed = data.draw(st.integers(0, 2**31 - 1))
  check_cover(split_images(labels, num_clients, seed=seed, **kind), num_images, num_clients)


@pytest.mark.parametrize('kind', KINDS)
def test_a_thousand_clients_with_two_images_each(kind):
  labels = np.arange(2000) % 10
  check_cover(split_images(labels, 1000, **kind), 2000, 1000)


@pytest.mark.parametrize('beta', [1e-300, 1e-6, 1e-3])
def test_extreme_dirichlet_with_one_class_and_with_many(beta):
  check_cover(split_images(np.zeros(300, int), 100, partition='dirichlet', dirichlet_beta=beta), 300, 100)
  check_cover(split_images(np.arange(300), 100, partition='dirichlet', dirichlet_beta=beta), 300, 100)


def test_iid_sizes_are_equal_up_to_one():
  assert {len(part) for part in split_images(num_clients=7)} == {600 // 7, 600 // 7 + 1}


def test_what_cannot_be_split_goes_to_the_largest_remainders():
  """2.6, 2.6 and 4.8 images beside the two that each gets."""
  assert partition._sizes(16, np.array([2.6, 2.6, 4.8])).tolist() == [5, 4, 7]


def test_size_sigma_increases_the_deviation_of_sizes():
  deviations = [
    np.std([len(p) for p in split_images(num_clients=20, client_size_sigma=sigma)]) for sigma in (0.0, 0.5, 1.5)
  ]
  assert deviations[0] < 1 < deviations[1] < deviations[2]


def test_smaller_beta_is_more_skewed():
  def skew(beta):
    counts = class_counts(split_images(partition='dirichlet', dirichlet_beta=beta), LABELS, 10)
    return (counts.max(axis=0) / counts.sum(axis=0)).mean()  # the share of a class that its main client holds

  assert skew(100.0) < 0.25 < skew(0.5) < 0.8 < skew(1e-4)


def test_dirichlet_proportions_are_drawn_per_class():
  counts = class_counts(split_images(partition='dirichlet', dirichlet_beta=0.1), LABELS, 10)
  assert len(set(counts.argmax(axis=0))) > 3  # not the same clients rich in every class


@pytest.mark.parametrize('shards', [1, 2, 3])
def test_a_shard_spans_few_classes(shards):
  labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 60))
  counts = class_counts(split_images(labels, partition='shards', shards_per_client=shards), labels, 10)
  assert ((counts > 0).sum(axis=1) <= 2 * shards).all()
  assert (counts.sum(axis=1) == 60).all()


def test_shards_do_not_follow_the_order_of_images():
  """Images of one class are shuffled before they are cut into shards."""
  parts = split_images(np.zeros(100, int), 2, partition='shards')
  assert 20 < np.mean(parts[0]) < 80 and np.diff(parts[0]).max() > 1


def test_class_counts():
  labels = np.array([0, 1, 1, 3, 3, 3])
  counts = class_counts([np.array([0, 1, 3]), np.array([2, 4, 5])], labels, 5)
  np.testing.assert_array_equal(counts, [[1, 1, 0, 1, 0], [0, 1, 0, 2, 0]])


def test_without_labels():
  check_cover(split_images(None, num_images=50), 50, 10)
  for kind in ('dirichlet', 'dirichlet_clients', 'shards'):
    with pytest.raises(UsageError, match='--partition'):
      split_images(None, num_images=50, partition=kind)


def test_too_few_images():
  check_cover(split_images(None, num_images=20), 20, 10)
  with pytest.raises(UsageError, match='--num_clients'):
    split_images(None, num_images=19)
  with pytest.raises(UsageError, match='--shards_per_client'):
    split_images(np.zeros(30, int), partition='shards', shards_per_client=4)


@pytest.mark.parametrize('beta', [1e-6, 0.5, 100.0])
def test_dirichlet_clients_have_equal_sizes_and_shares_of_their_own(beta):
  """Hsu et al.: a client's shares are Dir(beta * prior), of variance p (1 - p) / (beta + 1), while classes last."""
  labels = np.repeat(np.arange(10), [1000] * 9 + [3000])
  parts = split_images(labels, num_clients=60, partition='dirichlet_clients', dirichlet_beta=beta)
  assert {len(part) for part in parts} == {200}
  counts = class_counts(parts, labels, 10)[:30]  # before the first class has run out
  prior = np.bincount(labels) / len(labels)
  shares = counts / 200
  sampling = prior * (1 - prior) / 200
  expected = prior * (1 - prior) / (beta + 1) * (1 - 1 / 200) + sampling
  assert shares.var(axis=0).sum() == pytest.approx(expected.sum(), rel=0.3)
  if beta == 1e-6:  # one class each
    assert (counts.max(axis=1) >= 199).mean() > 0.9


def test_the_two_dirichlet_schemes_differ():
  sizes = [
    np.std([len(part) for part in split_images(partition=kind, dirichlet_beta=0.5)])
    for kind in ('dirichlet', 'dirichlet_clients')
  ]
  assert sizes[0] > 20 and sizes[1] == 0
