"""Bytes that a client downloads and uploads: predicted in the paper's conventions, or counted exactly.

Paper: arXiv 2401.11647. Two conventions predict, from the stage plans, the bytes of a client that takes part in every
round. Neither charges the transfer of a block at the start of a stage, nor a late client's catch-up.

  paper_v4  versions 4 and 5, Table 2: blocks, heads, final norm and embedding.
  paper_v1  versions 1 to 3: encoder blocks only.

`actual` is a ledger of the version of each component that each client holds: a sampled client is charged the components
that it requires and lacks. `expected` is its mean over all draws. Bytes are those of float32 parameters, without a
transport's framing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lwfedssl_jax.catalog import PAPER_CONVENTIONS
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.resources.parameters import component_params, trace_shapes
from lwfedssl_jax.stages import (
  StagePlan,
  make_plans,
  modified_components,
  required_components,
  uploaded_components,
)

BYTES_PER_PARAM = 4  # float32, for any compute dtype
PAPER_GB_BYTES = 1000 * 2**20  # the paper's "GB" is 1000 MiB: only so do its numbers come out


def paper_gb(num_bytes: int) -> float:
  """Converts bytes to the paper's GB of 1000 MiB."""
  return num_bytes / PAPER_GB_BYTES


class Payload(NamedTuple):
  """The components that a run can exchange.

  Attributes:
    sizes_bytes: {component: bytes}, in the order of the columns of every per-component array here. All 0 for a run
      without exchange (`centralized`).
    head_names: the heads among them.
  """

  sizes_bytes: dict[str, int]
  head_names: tuple[str, ...]


def make_payload(config: Config, image_size: int) -> Payload:
  """Builds the payload of a run; `image_size` in pixels."""
  per_param = BYTES_PER_PARAM if config.is_federated else 0
  sizes = {name: per_param * count for name, count in component_params(config, image_size).items()}
  return Payload(sizes, trace_shapes(config, image_size).model.objective.head_names)


# The paper's conventions.


class StageTraffic(NamedTuple):
  """The bytes of a client that takes part in all rounds of a stage.

  Attributes:
    stage: 0-based.
    num_rounds: rounds in the stage.
    round_downloads: {component: bytes} downloaded each round.
    round_uploads: {component: bytes} uploaded each round.
  """

  stage: int
  num_rounds: int
  round_downloads: dict[str, int]
  round_uploads: dict[str, int]

  @property
  def download_bytes(self) -> int:
    """Bytes downloaded in the stage."""
    return self.num_rounds * sum(self.round_downloads.values())

  @property
  def upload_bytes(self) -> int:
    """Bytes uploaded in the stage."""
    return self.num_rounds * sum(self.round_uploads.values())


class Traffic(NamedTuple):
  """Bytes of one client over a run."""

  download_bytes: int
  upload_bytes: int

  @property
  def total_bytes(self) -> int:
    """Both directions."""
    return self.download_bytes + self.upload_bytes

  @property
  def total_paper_gb(self) -> float:
    """Both directions, in the paper's GB of 1000 MiB."""
    return paper_gb(self.total_bytes)


def stage_traffic(
  config: Config, image_size: int, convention: str, *, worst_case_download: bool = False
) -> tuple[StageTraffic, ...]:
  """Predicts a client's traffic, stage by stage, in one of the paper's conventions.

  Args:
    config: the run.
    image_size: side of the images, pixels.
    convention: one of PAPER_CONVENTIONS.
    worst_case_download: the client downloads all components that exist at the stage in every round, not only those
      that the round before modified. Uploads are the same.

  Raises:
    UsageError: the convention is not one of PAPER_CONVENTIONS.
  """
  if convention not in PAPER_CONVENTIONS:
    raise UsageError(f'--convention: expected one of {", ".join(PAPER_CONVENTIONS)}, got {convention!r}')
  payload = make_payload(config, image_size)
  blocks_only = convention == 'paper_v1'
  sizes = {k: v for k, v in payload.sizes_bytes.items() if k.startswith('block_') or not blocks_only}

  def pick(names):
    return {name: sizes[name] for name in names if name in sizes}

  downloads = required_components if worst_case_download else modified_components
  return tuple(
    StageTraffic(
      stage=plan.stage,
      num_rounds=plan.num_rounds,
      round_downloads=pick(downloads(plan, payload.head_names)),
      round_uploads=pick(uploaded_components(plan, payload.head_names)),
    )
    for plan in make_plans(config)
  )


def total_traffic(stages: Sequence[StageTraffic]) -> Traffic:
  """Sums a client's traffic over stages."""
  return Traffic(sum(s.download_bytes for s in stages), sum(s.upload_bytes for s in stages))


# The exact account.


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


def full_participation(config: Config) -> tuple[np.ndarray, np.ndarray]:
  """Returns (client ids, returned) of shape (rounds, clients) for a run whose clients all take part and return."""
  shape = (sum(plan.num_rounds for plan in make_plans(config)), config.effective_num_clients)
  return np.broadcast_to(np.arange(shape[1]), shape), np.ones(shape, bool)
