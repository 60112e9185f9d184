"""The exact account of a run's bytes: which version of each component each client holds.

A sampled client is charged the components that it requires and lacks (convention `actual`). `expected` is the mean over
all draws of participants and returns. Bytes are those of float32 parameters, without a transport's framing.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lwfedssl_jax.block_trees import block_name
from lwfedssl_jax.config import Config
from lwfedssl_jax.resources.communication import Payload, make_payload
from lwfedssl_jax.stages import (
  StagePlan,
  kept_share,
  make_plans,
  modified_components,
  required_components,
  uploaded_components,
)


class Ledger(NamedTuple):
  """The versions that clients hold. Columns follow `Payload.sizes_bytes`.

  Attributes:
    held: int64 (clients, components), the version that each client holds; -1: none.
    version: int64 (components,), the global model's version; 0 as initialized.
  """

  held: np.ndarray
  version: np.ndarray


class RoundTraffic(NamedTuple):
  """Traffic of one round's K sampled clients, bytes, int64 (K, components); rows in the order of the client ids."""

  download_bytes: np.ndarray
  upload_bytes: np.ndarray


class RunTraffic(NamedTuple):
  """Traffic of a run's rounds.

  Attributes:
    download_bytes: int64 (plans, clients).
    upload_bytes: int64 (plans, clients).
    ledger: after the last round; further rounds can be charged to it.
  """

  download_bytes: np.ndarray
  upload_bytes: np.ndarray
  ledger: Ledger


def start_ledger(payload: Payload, num_clients: int) -> Ledger:
  """Returns the ledger before the first round: no client holds anything."""
  components = len(payload.sizes_bytes)
  return Ledger(np.full((num_clients, components), -1, np.int64), np.zeros(components, np.int64))


def _is_among(payload: Payload, names: Sequence[str]) -> np.ndarray:
  return np.array([name in names for name in payload.sizes_bytes])


def _keep_columns(payload: Payload, keeps: np.ndarray | None) -> np.ndarray:
  """Returns bool (K, components), or (components,): what a client has of the components that exist."""
  names = list(payload.sizes_bytes)
  if keeps is None:
    return np.ones(len(names), bool)
  numbers = {block_name(index): index for index in range(keeps.shape[1])}
  return np.stack([keeps[:, numbers[name]] if name in numbers else np.ones(len(keeps), bool) for name in names], axis=1)


def charge_round(
  ledger: Ledger,
  payload: Payload,
  plan: StagePlan,
  client_ids: Sequence[int] | np.ndarray,
  returned: Sequence[bool] | np.ndarray,
  keeps: np.ndarray | None = None,
) -> tuple[Ledger, RoundTraffic]:
  """Accounts for one round.

  A sampled client downloads the required components whose global version differs from the one it holds; from then on it
  holds them, whether or not it returns. A client that returns uploads the active components. If any client returns, the
  modified components have a new version; otherwise the global model is unchanged. A new block's initial weights are
  downloaded like any other component. A block that clients train has a new version if one that trained it returns.

  Args:
    ledger: before the round; not modified.
    payload: the components.
    plan: of the round's stage.
    client_ids: int (K,), the sampled clients, each at most once.
    returned: bool (K,), whether each uploads its update.
    keeps: bool (K, L), the blocks that each keeps with depth dropout; it exchanges no others. None: all.

  Returns:
    The ledger after the round, and its traffic.

  Raises:
    ValueError: a client occurs twice, is not in the ledger, or the shapes differ.
  """
  client_ids, returned = np.asarray(client_ids, np.int64), np.asarray(returned, bool)
  if client_ids.ndim != 1 or client_ids.shape != returned.shape:
    raise ValueError(f'expected (K,) ids and (K,) returned, got {client_ids.shape} and {returned.shape}')
  if len(np.unique(client_ids)) != len(client_ids):
    raise ValueError(f'a client is sampled twice in one round: {client_ids.tolist()}')
  if client_ids.size and not 0 <= client_ids.min() <= client_ids.max() < len(ledger.held):
    raise ValueError(f'expected client ids from 0 to {len(ledger.held) - 1}, got {client_ids.tolist()}')
  sizes = np.array(list(payload.sizes_bytes.values()), np.int64)
  has = _keep_columns(payload, keeps)
  required = has & _is_among(payload, required_components(plan, payload.head_names))
  stale = required & (ledger.held[client_ids] != ledger.version)
  sent = returned[:, None] & has & _is_among(payload, uploaded_components(plan, payload.head_names))
  held = ledger.held.copy()
  held[client_ids] = np.where(stale, ledger.version, held[client_ids])
  calibrated = plan.calibrates & _is_among(payload, modified_components(plan, payload.head_names)) & returned.any()
  return Ledger(held, ledger.version + (sent.any(axis=0) | calibrated)), RoundTraffic(stale * sizes, sent * sizes)


def second_attempt(
  payload: Payload, plan: StagePlan, returned: Sequence[bool] | np.ndarray, keeps: np.ndarray | None = None
) -> RoundTraffic:
  """Returns the traffic of a second attempt at a round: clients hold what they require, and upload again.

  Args:
    payload: the components.
    plan: of the round's stage.
    returned: bool (K,), whether each sampled client uploads its update.
    keeps: as in `charge_round`.
  """
  sizes = np.array(list(payload.sizes_bytes.values()), np.int64)
  active = _is_among(payload, uploaded_components(plan, payload.head_names))
  uploads = (np.asarray(returned, bool)[:, None] & _keep_columns(payload, keeps) & active) * sizes
  return RoundTraffic(np.zeros_like(uploads), uploads)


def charge_run(
  payload: Payload,
  plans: Sequence[StagePlan],
  num_clients: int,
  client_ids: np.ndarray,
  returned: np.ndarray,
  keeps: np.ndarray | None = None,
) -> RunTraffic:
  """Accounts for a run's rounds, from the first on.

  Args:
    payload: the components.
    plans: of all stages, as `stages.make_plans`.
    num_clients: clients in all.
    client_ids: int (rounds, K), the clients sampled in each round; a run may stop before its last round.
    returned: bool (rounds, K), whether each uploads its update.
    keeps: bool (rounds, K, L), the blocks that each keeps with depth dropout; None: all.

  Raises:
    ValueError: more rounds than the plans have, or as `charge_round`.
  """
  rounds = [(index, plan) for index, plan in enumerate(plans) for _ in range(plan.num_rounds)]
  if len(client_ids) > len(rounds) or len(client_ids) != len(returned):
    raise ValueError(f'expected ids and returned of up to {len(rounds)} rounds, got {len(client_ids)}, {len(returned)}')
  downloads = np.zeros((len(plans), num_clients), np.int64)
  sent = np.zeros_like(downloads)
  ledger = start_ledger(payload, num_clients)
  for (index, plan), ids, back, kept in zip(
    rounds, client_ids, returned, itertools.repeat(None) if keeps is None else keeps
  ):
    ledger, traffic = charge_round(ledger, payload, plan, ids, back, kept)
    downloads[index, ids] += traffic.download_bytes.sum(axis=1)
    sent[index, ids] += traffic.upload_bytes.sum(axis=1)
  return RunTraffic(downloads, sent, ledger)


class ExpectedTraffic(NamedTuple):
  """Mean bytes of one client over all seeds, float64 (plans, components)."""

  download_bytes: np.ndarray
  upload_bytes: np.ndarray


def expected_traffic(config: Config, image_size: int) -> ExpectedTraffic:
  """Returns the expectation of `charge_run` over the draws of participants and of their returns, per client; exact.

  A client is sampled with probability K / N, independently per round, and keeps a block with some probability. Before
  every round it holds the newest version of a component with some probability. That becomes 1 if the client is sampled
  and requires the component, and 0 if the round modifies it: by calibration, if at least one of the K clients returns;
  by aggregation, if one of those that keep it returns, this client among them.

  Args:
    config: the run.
    image_size: side of the images, pixels.
  """
  payload, plans = make_payload(config, image_size), make_plans(config)
  sizes = np.array(list(payload.sizes_bytes.values()), np.float64)
  count, dropout = config.effective_clients_per_round, config.client.client_dropout
  sampled = count / config.effective_num_clients
  returns = sampled * (1 - dropout)
  downloads = np.zeros((len(plans), len(sizes)))
  sent = np.zeros_like(downloads)
  current = np.zeros(len(sizes))  # probability that a client holds the newest version
  for index, plan in enumerate(plans):
    needed = _is_among(payload, required_components(plan, payload.head_names))
    active = _is_among(payload, uploaded_components(plan, payload.head_names))
    has = np.array([kept_share(plan, name) for name in payload.sizes_bytes])
    # Probabilities that the component stays as it is, if this client is not sampled, keeps it, or does not.
    if plan.calibrates:
      same = np.where(needed, dropout**count, 1.0)
      unsampled, keeping, other = same, same, same
    else:
      silent = np.where(active, 1 - has * (1 - dropout), 1.0)  # one of the other clients does not modify it
      unsampled, other = silent**count, silent ** (count - 1)
      keeping = np.where(active, dropout, 1) * other
    for _ in range(plan.num_rounds):
      downloads[index] += sampled * needed * has * (1 - current) * sizes
      sent[index] += returns * active * has * sizes
      holds = np.where(needed, has, 0)  # afterwards, if it is sampled: for sure
      current = (1 - sampled) * current * unsampled + sampled * (holds * keeping + (1 - holds) * current * other)
  return ExpectedTraffic(downloads, sent)
