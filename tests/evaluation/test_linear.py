"""The linear probe: how its penalty is chosen, and on what."""

import numpy as np
import pytest

from lwfedssl_jax.evaluation import linear


def test_probe_chooses_its_penalty_without_the_queries():
  """A weak signal in many dimensions: a strong penalty is right, and the choice is the same whatever is asked."""
  generator = np.random.default_rng(0)
  labels = np.repeat([0, 1], 60)
  rows = generator.normal(size=(120, 60)).astype(np.float32) + 0.3 * labels[:, None]
  queries = generator.normal(size=(200, 60)).astype(np.float32)
  _, chosen = linear.predict(rows, labels, queries, seed=0)
  _, again = linear.predict(rows, labels, -queries[:50], seed=0)
  assert chosen == again < linear.DEFAULT_INVERSE_PENALTY
  assert linear.choose_inverse_penalty(rows[::30], labels[::30], seed=0) == linear.DEFAULT_INVERSE_PENALTY
  assert linear.predict(rows[:5], labels[:5], queries, seed=0)[0].tolist() == [0] * 200  # one class is all there is


@pytest.fixture
def fits(monkeypatch):
  """Records what is fitted and what is scored, in place of fitting; every penalty scores alike."""
  recorded = []

  class Recorder:
    def __init__(self, inverse_penalty, rows, labels):
      self.fitted = inverse_penalty, rows, labels

    def score(self, rows, labels):
      recorded.append((*self.fitted, rows, labels))
      return 0.5

  monkeypatch.setattr(linear, '_fit', Recorder)
  return recorded


def test_penalty_is_chosen_on_a_fifth_of_each_class_that_is_not_fitted(fits):
  rows, labels = np.arange(250, dtype=np.float32)[:, None], np.repeat([0, 1, 2], [200, 40, 10])
  chosen = linear.choose_inverse_penalty(rows, labels, seed=0)
  assert [fit[0] for fit in fits] == list(linear.INVERSE_PENALTIES)
  assert chosen == min(linear.INVERSE_PENALTIES)  # of equal ones the strongest penalty
  for _, fitted, fitted_labels, held, held_labels in fits:
    assert sorted([*fitted[:, 0], *held[:, 0]]) == list(range(250))
    np.testing.assert_array_equal(labels[fitted[:, 0].astype(int)], fitted_labels)
    np.testing.assert_array_equal(labels[held[:, 0].astype(int)], held_labels)
    assert np.bincount(held_labels).tolist() == [40, 8, 2]


def test_another_seed_holds_out_another_part(fits):
  rows, labels = np.arange(50, dtype=np.float32)[:, None], np.arange(50) % 2
  for seed in (0, 0, 1):
    linear.choose_inverse_penalty(rows, labels, seed)
  first, again, other = (sorted(fit[3][:, 0]) for fit in fits[:: len(linear.INVERSE_PENALTIES)])
  assert first == again != other


def test_probe_does_not_depend_on_the_scale_of_an_embedding():
  generator = np.random.default_rng(0)
  labels = np.arange(120) % 3
  rows = generator.normal(size=(120, 6)) + np.eye(6)[labels]
  queries = generator.normal(size=(300, 6)) + np.eye(6)[np.arange(300) % 3]
  scale, shift = np.array([1e-3, 1, 1e3, 1, 10, 1e-2]), np.array([5, -1, 100, 0, 3, 0])
  predicted, penalty = linear.predict(rows, labels, queries, seed=0)
  again, same_penalty = linear.predict(rows * scale + shift, labels, queries * scale + shift, seed=0)
  assert penalty == same_penalty
  assert (predicted == again).mean() > 0.99
