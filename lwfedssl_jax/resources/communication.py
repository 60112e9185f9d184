"""Bytes that a client downloads and uploads, predicted in the paper's conventions.

Paper: arXiv 2401.11647. Both conventions follow from the stage plans, for a client that takes part in every round.
Neither charges the transfer of a block at the start of a stage, nor a late client's catch-up; `accounting.py` does.

  paper_v4  versions 4 and 5, Table 2: blocks, heads, final norm and embedding.
  paper_v1  versions 1 to 3: encoder blocks only.

Bytes are those of float32 parameters, without a transport's framing.
"""

from typing import NamedTuple

from lwfedssl_jax.catalog import PAPER_CONVENTIONS
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.resources.parameters import component_params, trace_shapes
from lwfedssl_jax.stages import kept_share, make_plans, modified_components, required_components, uploaded_components

BYTES_PER_PARAM = 4  # float32, for any compute dtype
PAPER_GB_BYTES = 1000 * 2**20  # the paper's "GB" is 1000 MiB: only so do its numbers come out


class Payload(NamedTuple):
  """The components that a run can exchange.

  Attributes:
    sizes_bytes: {component: bytes}, in the order of the columns of the ledger's per-component arrays. All 0 for a run
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


class StageTraffic(NamedTuple):
  """The bytes of a client that takes part in all rounds of a stage.

  Attributes:
    stage: 0-based.
    num_rounds: rounds in the stage.
    round_downloads: {component: bytes} downloaded each round; with depth dropout, of an earlier block the mean.
    round_uploads: {component: bytes} uploaded each round; the same.
  """

  stage: int
  num_rounds: int
  round_downloads: dict[str, float]
  round_uploads: dict[str, float]

  @property
  def download_bytes(self) -> float:
    """Bytes downloaded in the stage."""
    return self.num_rounds * sum(self.round_downloads.values())

  @property
  def upload_bytes(self) -> float:
    """Bytes uploaded in the stage."""
    return self.num_rounds * sum(self.round_uploads.values())


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

  def pick(plan, names):
    return {name: kept_share(plan, name) * sizes[name] for name in names if name in sizes}

  downloads = required_components if worst_case_download else modified_components
  return tuple(
    StageTraffic(
      stage=plan.stage,
      num_rounds=plan.num_rounds,
      round_downloads=pick(plan, downloads(plan, payload.head_names)),
      round_uploads=pick(plan, uploaded_components(plan, payload.head_names)),
    )
    for plan in make_plans(config)
  )
