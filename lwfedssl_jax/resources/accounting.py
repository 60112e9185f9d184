"""The exact account of a run's bytes: which version of each component each client holds.

A sampled client is charged the components that it requires and lacks (convention `actual`). `expected` is the mean over
all draws of participants and returns. Bytes are those of float32 parameters, without a transport's framing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lwfedssl_jax.config import Config
from lwfedssl_jax.resources.communication import Payload, make_payload
from lwfedssl_jax.stages import StagePlan, make_plans, modified_components, required_components, uploaded_components


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
    download_bytes: int64 (stages, clients).
    upload_bytes: int64 (stages, clients).
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


def charge_round(
  ledger: Ledger,
  payload: Payload,
  plan: StagePlan,
  client_ids: Sequence[int] | np.ndarray,
  returned: Sequence[bool] | np.ndarray,
) -> tuple[Ledger, RoundTraffic]:
  """Accounts for one round.

  A sampled client downloads the required components whose global version differs from the one it holds; from then on it
  holds them, whether or not it returns. A client that returns uploads the active components. If any client returns, the
  modified components have a new version; otherwise the global model is unchanged. A new block's initial weights are
  downloaded like any other component.

  Args:
    ledger: before the round; not modified.
    payload: the components.
    plan: of the round's stage.
    client_ids: int (K,), the sampled clients, each at most once.
    returned: bool (K,), whether each uploads its update.

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
  required = _is_among(payload, required_components(plan, payload.head_names))
  stale = required & (ledger.held[client_ids] != ledger.version)
  active = _is_among(payload, uploaded_components(plan, payload.head_names))
  held = ledger.held.copy()
  held[client_ids] = np.where(stale, ledger.version, held[client_ids])
  changed = _is_among(payload, modified_components(plan, payload.head_names)) & returned.any()
  return Ledger(held, ledger.version + changed), RoundTraffic(stale * sizes, (returned[:, None] & active) * sizes)


def second_attempt(payload: Payload, plan: StagePlan, returned: Sequence[bool] | np.ndarray) -> RoundTraffic:
  """Returns the traffic of a second attempt at a round: clients hold what they require, and upload again.

  Args:
    payload: the components.
    plan: of the round's stage.
    returned: bool (K,), whether each sampled client uploads its update.
  """
  sizes = np.array(list(payload.sizes_bytes.values()), np.int64)
  active = _is_among(payload, uploaded_components(plan, payload.head_names))
  uploads = (np.asarray(returned, bool)[:, None] & active) * sizes
  return RoundTraffic(np.zeros_like(uploads), uploads)


def charge_run(
  payload: Payload,
  plans: Sequence[StagePlan],
  num_clients: int,
  client_ids: np.ndarray,
  returned: np.ndarray,
) -> RunTraffic:
  """Accounts for a run's rounds, from the first on.

  Args:
    payload: the components.
    plans: of all stages.
    num_clients: clients in all.
    client_ids: int (rounds, K), the clients sampled in each round; a run may stop before its last round.
    returned: bool (rounds, K), whether each uploads its update.

  Raises:
    ValueError: more rounds than the plans have, or as `charge_round`.
  """
  rounds = [plan for plan in plans for _ in range(plan.num_rounds)]
  if len(client_ids) > len(rounds) or len(client_ids) != len(returned):
    raise ValueError(f'expected ids and returned of up to {len(rounds)} rounds, got {len(client_ids)}, {len(returned)}')
  downloads = np.zeros((len(plans), num_clients), np.int64)
  sent = np.zeros_like(downloads)
  ledger = start_ledger(payload, num_clients)
  for plan, ids, back in zip(rounds, client_ids, returned):
    ledger, traffic = charge_round(ledger, payload, plan, ids, back)
    downloads[plan.stage, ids] += traffic.download_bytes.sum(axis=1)
    sent[plan.stage, ids] += traffic.upload_bytes.sum(axis=1)
  return RunTraffic(downloads, sent, ledger)


class ExpectedTraffic(NamedTuple):
  """Mean bytes of one client over all seeds, float64 (stages, components)."""

  download_bytes: np.ndarray
  upload_bytes: np.ndarray


def expected_traffic(config: Config, image_size: int) -> ExpectedTraffic:
  """Returns the expectation of `charge_run` over the draws of participants and of their returns, per client; exact.

  A client is sampled with probability K / N, independently per round. Before every round it holds the newest version of
  a component with some probability. That becomes 1 if the client is sampled and requires the component, and 0 if the
  round modifies it, which requires that at least one of the K clients returns.

  Args:
    config: the run.
    image_size: side of the images, pixels.
  """
  payload, plans = make_payload(config, image_size), make_plans(config)
  sizes = np.array(list(payload.sizes_bytes.values()), np.float64)
  sampled = config.effective_clients_per_round / config.effective_num_clients
  changed = 1 - config.client.client_dropout**config.effective_clients_per_round
  returns = sampled * (1 - config.client.client_dropout)
  downloads = np.zeros((len(plans), len(sizes)))
  sent = np.zeros_like(downloads)
  current = np.zeros(len(sizes))  # probability that a client holds the newest version
  for plan in plans:
    needed = _is_among(payload, required_components(plan, payload.head_names))
    active = _is_among(payload, uploaded_components(plan, payload.head_names))
    kept = 1 - changed * _is_among(payload, modified_components(plan, payload.head_names))
    for _ in range(plan.num_rounds):
      missing = sampled * needed * (1 - current)
      downloads[plan.stage] += missing * sizes
      sent[plan.stage] += returns * active * sizes
      current = (current + missing) * kept
  return ExpectedTraffic(downloads, sent)
