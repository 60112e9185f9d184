"""The types of trees that the test session's checker asks for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import trees
from lwfedssl_jax.base import Labels, Params


@pytest.mark.parametrize('leaf', [jnp.zeros(2), np.zeros(2, np.float32), jnp.zeros(2, jnp.bfloat16)], ids=str)
def test_a_tree_of_floating_arrays_is_parameters(leaf):
  assert isinstance({'a': {'b': leaf}, 'c': jnp.ones(())}, Params)
  assert not isinstance({'a': leaf}, Labels)


@pytest.mark.parametrize('leaf', [jnp.zeros(2, jnp.int32), 1.0, 'x', jax.ShapeDtypeStruct((2,), jnp.float32)], ids=str)
def test_a_tree_with_another_leaf_is_not(leaf):
  assert not isinstance({'a': jnp.zeros(2), 'b': leaf}, Params)


def test_functions_refuse_what_is_no_parameters():
  with pytest.raises(Exception, match='Type-check error'):
    trees.overlay({'a': 'x'}, {})
