"""Differential privacy of a client's update: clipping and Gaussian noise on the client, before anything is sent.

The Gaussian mechanism, as DP-FedAvg has it (arXiv 1710.06963), but with each client's own noise: the server is not
trusted. Two cases are adjacent if a client's update is there or is zero, so that the sensitivity is the clipping norm.
The update is the difference of the active parameters; frozen blocks are not sent. Losses and image counts are sent as
they are, and Threefry's numbers are not those of a cryptographic generator.
"""

import collections
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lwfedssl_jax import rng
from lwfedssl_jax.base import Integer, Key, Raveled
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.federated.aggregation import clip_update

PACKAGE, EXTRA = 'dp_accounting', 'privacy'


def draw_noise_key(seed_key: Key, round_num: Integer, client_id: Integer) -> Key:
  """Draws a simulated client's key of a round. A real client uses one that no other machine knows."""
  return rng.key(seed_key, rng.Stream.PRIVACY, round_num, client_id)


def privatize_update(
  client_params: Raveled, global_params: Raveled, max_norm: float, noise_multiplier: float, key: Key
) -> Raveled:
  """Clips the update to the l2 norm `max_norm` and adds Gaussian noise of deviation `noise_multiplier * max_norm`.

  Args:
    client_params: active parameters after training, raveled.
    global_params: the same before training.
    max_norm: of the update, over all groups.
    noise_multiplier: standard deviation of every coordinate's noise, in units of `max_norm`.
    key: of the noise.

  Returns:
    Parameters, raveled: global + clipped update + noise.
  """
  clipped = clip_update(client_params, global_params, max_norm)
  keys = dict(zip(sorted(clipped), jax.random.split(key, len(clipped))))
  deviation = noise_multiplier * max_norm
  return {name: leaf + deviation * jax.random.normal(keys[name], leaf.shape) for name, leaf in clipped.items()}


def require_accountant(config: Config) -> None:
  """Raises UsageError where noise is asked for and the accountant's package is missing."""
  if config.client.dp_noise_multiplier and importlib.util.find_spec(PACKAGE) is None:
    raise UsageError(f"--dp_noise_multiplier: expected dp-accounting, pip install 'lwfedssl-jax[{EXTRA}]'")


def spent_epsilon(noise_multiplier: float, num_uploads: int, delta: float) -> float:
  """Returns the epsilon of a client's uploads at `delta`, by Rényi accounting (dp-accounting), without subsampling.

  The server sees every upload of a client by itself, so that sampling clients does not amplify privacy.

  Args:
    noise_multiplier: above 0.
    num_uploads: rounds in which the client sent an update.
    delta: in (0, 1).
  """
  import dp_accounting
  from dp_accounting import rdp

  accountant = rdp.RdpAccountant()
  if num_uploads:
    accountant.compose(dp_accounting.GaussianDpEvent(noise_multiplier), num_uploads)
  return float(accountant.get_epsilon(delta))


def summarize(config: Config, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Returns `dp_epsilon` and `dp_delta` of the client that sent most updates; {} without noise.

  Args:
    config: of the run.
    rows: of metrics.jsonl. A round of two attempts counts as two updates of each client that sent any.
  """
  noise, delta = config.client.dp_noise_multiplier, config.client.dp_delta
  if not noise:
    return {}
  sent: collections.Counter[int] = collections.Counter()
  for row in rows:
    for client, num_bytes in zip(row['client_ids'], row['client_upload_bytes']):
      sent[client] += row['attempts'] if num_bytes else 0
  return {'dp_epsilon': spent_epsilon(noise, max(sent.values(), default=0), delta), 'dp_delta': delta}
