"""The runtime type checker of the test session: beartype, for which an int is a float, as in PEP 484."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
  """Checks every function and class but the configuration's groups, which check the values that a user gives."""
  is_configuration = function.__module__ in ('lwfedssl_jax.config', 'lwfedssl_jax.config_groups')
  validates_itself = is_configuration and function.__qualname__.endswith('.__init__')
  return function if validates_itself else _check(function)
