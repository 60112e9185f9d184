"""Participation: pure functions of (seed, round, client), and the keys behind all randomness."""

import functools

import jax
import numpy as np
import pytest

from lwfedssl_jax import rng
from lwfedssl_jax.federated.sampling import plan_participation


@functools.cache
def plan(seed=0, num_rounds=30, num_clients=10, clients_per_round=4, client_dropout=0.0):
  return plan_participation(seed, num_rounds, num_clients, clients_per_round, client_dropout)


@pytest.mark.parametrize(('num_clients', 'clients_per_round'), [(1, 1), (10, 4), (11, 10), (1000, 3)])
@pytest.mark.parametrize('seed', [0, 2**31 - 1])
def test_rows_are_sorted_without_repetition(seed, num_clients, clients_per_round):
  ids, returned, _ = plan(seed, 30, num_clients, clients_per_round)
  assert ids.shape == returned.shape == (30, clients_per_round)
  assert (np.diff(ids, axis=1) > 0).all()
  assert ids.min() >= 0 and ids.max() < num_clients
  assert returned.all()


def test_all_take_part_when_all_are_sampled():
  np.testing.assert_array_equal(plan(clients_per_round=10).client_ids, np.tile(np.arange(10), (30, 1)))


def test_is_reproducible_and_depends_on_seed_and_round():
  first = plan(client_dropout=0.4)
  again, other = plan.__wrapped__(client_dropout=0.4), plan(seed=1, client_dropout=0.4)
  assert again is not first
  np.testing.assert_array_equal(first.client_ids, again.client_ids)
  np.testing.assert_array_equal(first.returned, again.returned)
  assert not np.array_equal(first.client_ids, other.client_ids)
  assert not np.array_equal(first.returned, other.returned)
  assert len({tuple(row) for row in first.client_ids}) > 10


def test_a_longer_run_starts_like_a_shorter_one():
  short, long = plan(num_rounds=7, client_dropout=0.3), plan(num_rounds=30, client_dropout=0.3)
  np.testing.assert_array_equal(short.client_ids, long.client_ids[:7])
  np.testing.assert_array_equal(short.returned, long.returned[:7])


def test_every_client_is_sampled_about_equally_often():
  counts = np.bincount(plan(num_rounds=500).client_ids.ravel(), minlength=10)
  assert counts.min() > 150 and counts.max() < 250  # 200 +- 11


@pytest.mark.parametrize('dropout', [0.0, 0.1, 0.7, 1.0])
def test_dropout_leaves_the_sample_alone_and_has_its_rate(dropout):
  dropped = plan(num_rounds=500, client_dropout=dropout)
  np.testing.assert_array_equal(dropped.client_ids, plan(num_rounds=500).client_ids)
  assert abs((~dropped.returned).mean() - dropout) < 0.04
  if dropout in (0.0, 1.0):
    assert dropped.returned.all() == (dropout == 0) and dropped.returned.any() == (dropout == 0)


def test_return_of_a_client_does_not_depend_on_who_else_is_sampled():
  some, everyone = plan(client_dropout=0.5), plan(clients_per_round=10, client_dropout=0.5)
  for row, (ids, returned) in enumerate(zip(some.client_ids, some.returned)):
    np.testing.assert_array_equal(returned, everyone.returned[row, ids])


def test_a_higher_dropout_loses_a_superset():
  low, high = plan(client_dropout=0.2), plan(client_dropout=0.6)
  assert (high.returned <= low.returned).all()


def test_keys_differ_by_seed_stream_and_index_order():
  def data(*arguments):
    return tuple(np.asarray(jax.random.key_data(rng.key(*arguments))))

  keys = [
    data(seed, stream, *indices)
    for seed in (0, 1)
    for stream in rng.Stream
    for indices in ((), (0,), (1,), (0, 1), (1, 0), (2, 1), (1, 2))
  ]
  assert len(set(keys)) == len(keys)


def test_key_from_a_key_is_key_from_the_seed():
  from_seed, from_key = rng.key(5, rng.Stream.AUGMENT, 3), rng.key(jax.random.key(5), rng.Stream.AUGMENT, 3)
  np.testing.assert_array_equal(jax.random.key_data(from_seed), jax.random.key_data(from_key))
