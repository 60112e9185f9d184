"""Server-side calibration: end-to-end training on the server's own unlabeled images (arXiv 2401.11647 v1-v3).

The purpose and the trained part (all blocks that exist, embedding, norm and heads) are the paper's; the schedule is our
choice.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from lwfedssl_jax import rng, stages
from lwfedssl_jax.base import Images, Integer, Key, Params, Scalar
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import batching
from lwfedssl_jax.federated import aggregation, client_update, execution
from lwfedssl_jax.federated.client_update import Batches, ClientKeys, Pipeline
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.federated.placement import Placement
from lwfedssl_jax.federated.training_step import Losses, StepOptions


class CalibrationBatches(NamedTuple):
  """Batches of the server's images: images per step, and steps per epoch."""

  batch_size: int
  steps_per_epoch: int


def plan_batches(config: Config, num_images: int) -> CalibrationBatches:
  """Returns the batches of a calibration on `num_images` images, which may be fewer than the configured batch."""
  batch_size = min(config.method.calibration_batch_size or config.client.batch_size, num_images)
  return CalibrationBatches(batch_size, batching.steps_per_epoch(num_images, batch_size))


def largest_divisor(count: int, limit: int) -> int:
  """Returns the largest divisor of `count` that is at most `limit`."""
  return next(size for size in range(min(count, limit), 0, -1) if count % size == 0)


def make_step_options(
  config: Config,
  image_size: int,
  batch_size: int,
  axis: str | None = None,
  num_devices: int = 1,
  scale: optax.GradientTransformation | None = None,
) -> StepOptions:
  """Builds the options of a calibration step on `batch_size` images, which `num_devices` share along `axis`, if any."""
  on_device = batch_size // num_devices if axis else batch_size
  return client_update.make_step_options(config, image_size, scale)._replace(
    model=make_model(config.model, config.objective, image_size, execution.server_execution(config)),
    alignment=None,
    proximal_weight=0.0,
    learning_rate=config.method.calibration_learning_rate or config.client.learning_rate,
    batch_size=batch_size,
    micro_batch_size=largest_divisor(on_device, config.method.calibration_micro_batch_size or on_device),
    axis=axis,
  )


def draw_keys(seed_key: Key, round_num: Integer) -> ClientKeys:
  """Draws the server's keys of a round."""
  streams = (rng.Stream.CALIBRATION_SHUFFLE, rng.Stream.CALIBRATION_AUGMENT)
  return client_update.draw_keys(seed_key, round_num, streams=streams)


def make_calibration(
  config: Config,
  image_size: int,
  placement: Placement = Placement(),
  pipeline: Pipeline = Pipeline(),
  scale: optax.GradientTransformation | None = None,
) -> Callable[..., tuple[Params, Losses]]:
  """Builds the server's calibration.

  Args:
    config: the run.
    image_size: side of the images, pixels.
    placement: the devices over which each batch is sharded, if its size is a multiple of their number and the encoder
      takes no statistics of a batch; else every device takes the full batch.
    pipeline: how images are shuffled and augmented.
    scale: as in StepOptions.

  Returns:
    (params, stop, images, keys) -> (params, mean losses). `stop` (may be traced if the blocks are equal) is the number
    of blocks that exist; the others are bit-identical. The learning rate is scaled by the actual batch size.
  """
  method = config.method

  def calibrate(params: Params, stop: Integer, images: Images, keys: ClientKeys) -> tuple[Params, Losses]:
    batch_size, steps = plan_batches(config, len(images))
    divides = batch_size % placement.num_devices == 0 and not config.model.uses_batch_statistics
    shared_axis = placement.axis if divides else None
    options = make_step_options(config, image_size, batch_size, shared_axis, placement.num_devices, scale)
    ids, mask = pipeline.plan_epochs(
      keys.shuffle, jnp.arange(len(images)), jnp.int32(len(images)), method.calibration_epochs, steps, batch_size
    )
    global_params = stages.split_existing(params, stop)
    draw_views = client_update.make_view_drawer(pipeline, config.augment, shared_axis)
    batches = Batches(images, ids, mask, keys.augment)
    trained, losses = client_update.run_steps(options, global_params, batches, draw_views)
    active = options.model.raveler.unravel(trained.params, global_params.active)
    return stages.merge(params, active, 0), losses

  return calibrate


def calibrate_or_keep(
  calibrate: Callable[..., tuple[Params, Losses]],
  params: Params,
  stop: Integer,
  images: Images,
  keys: ClientKeys,
  num_accepted: Scalar,
) -> tuple[Params, Losses]:
  """Calibrates the aggregated model; it is unchanged if no client is accepted or the result is invalid."""
  calibrated, losses = calibrate(params, stop, images, keys)
  valid = aggregation.is_valid_update(calibrated, losses.total, jnp.inf)
  return optax.tree.where((num_accepted > 0) & valid, calibrated, params), losses
