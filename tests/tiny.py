"""The tiny library of the tests: sizes, settings, and rounds that are compiled once a session."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lwfedssl_jax import catalog, stages
from lwfedssl_jax import config as configs
from lwfedssl_jax.data import augment
from lwfedssl_jax.federated import aggregation, calibration, client_update, depth_dropout, server_optimizer
from lwfedssl_jax.federated import round as rounds
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.federated.placement import Placement

TINY = catalog.VitTraits(width=8, depth=4, num_heads=2, mlp_ratio=2)
IMAGE_SIZE = 8

# Images of the clients of a round: two batches of 6 and a rest, one, three and a rest, and less than one. Over two or
# three samples that happen to be alike, batch normalization would divide by next to nothing and amplify rounding.
CLIENT_SIZES = (13, 6, 20, 5)
SERVER_IMAGES = 15  # two batches of 7 and a rest

# Numbers far from the defaults, so that each of them shows in the result: a weight of 1, one epoch or a decay of
# nearly 1 would hide that it is ignored. The step is small and the temperature high, so that a round of seven steps on
# batches of three or four does not amplify rounding.
VALUES = {
  'num_clients': 9,
  'clients_per_round': 4,
  'batch_size': 6,
  'local_epochs': 2,
  'rounds_per_stage': 2,
  'learning_rate': 0.1,
  'weight_decay': 0.5,
  'temperature': 0.5,
  'target_decay': 0.6,
  'alignment_weight': 0.7,
  'calibration_epochs': 2,
  'calibration_batch_size': 7,
  'calibration_learning_rate': 0.15,
}

# Values of the rounds of an objective, besides VALUES. A round depends on the method only through the stage plan, so
# only moco_v3 builds (and compiles) a round for each method. For the others, the plans of all methods run on one
# round, of which `layerwise` is only the name.
OBJECTIVE_VALUES = {
  'byol': {'client_chunk': 4, 'representation_alignment': True},
  'simclr': {
    'client_chunk': 2,
    'representation_alignment': True,
    'alignment_kind': 'cosine',
    'block_learning_rate_decay': 0.5,
    'server_calibration': False,
  },
  'simsiam': {'client_chunk': 2, 'representation_alignment': True},
}
METHOD_VALUES = {
  ('end_to_end', 'moco_v3'): {},
  ('layerwise', 'moco_v3'): {'client_chunk': 2},
  ('lw_fedssl', 'moco_v3'): {},
  ('prog_fedssl', 'moco_v3'): {'representation_alignment': True, 'alignment_kind': 'cosine'},
  ('centralized', 'moco_v3'): {'clients_per_round': 0},
  ('lw_fedssl', 'byol'): {'server_calibration': False},
  ('layerwise', 'simclr'): {'blocks_per_stage': 2},
  ('lw_fedssl', 'simclr'): {'blocks_per_stage': 2},
  ('centralized', 'byol'): {'clients_per_round': 0},
  ('lw_fedssl', 'simsiam'): {'server_calibration': False},
  ('centralized', 'simclr'): {'clients_per_round': 0},
  ('centralized', 'simsiam'): {'clients_per_round': 0},
}

# Stage of each case, 0-based, of 4 (layer-wise stages of simclr: of 2). A method of one stage has stage 0.
STAGES = {
  ('layerwise', 'moco_v3'): 1,
  ('lw_fedssl', 'moco_v3'): 2,
  ('prog_fedssl', 'moco_v3'): 1,
  ('layerwise', 'byol'): 0,
  ('lw_fedssl', 'byol'): 0,
  ('prog_fedssl', 'byol'): 3,
  ('layerwise', 'simclr'): 1,
  ('lw_fedssl', 'simclr'): 1,
  ('prog_fedssl', 'simclr'): 3,
  ('layerwise', 'simsiam'): 2,
  ('lw_fedssl', 'simsiam'): 3,
  ('prog_fedssl', 'simsiam'): 1,
}

# Adam divides by |gradient| + epsilon. With 1e-8 an element whose gradient is rounding noise moves by a full step in
# a random direction, and no two correct programs agree on it. With 0.1 (gradients here are of order 1) the update is a
# smooth function of the gradient, so rounding stays rounding. test_naive_round also runs the library's own epsilon.
SMOOTH_EPSILON = 0.1


class TinyRound(NamedTuple):
  config: configs.Config
  plans: tuple[stages.StagePlan, ...]
  stage: int  # the one of this method and objective that is tested
  init: Any  # seed -> params
  apply: Any  # as FederatedRound.apply, but keeps the parameters that are passed in
  round: Any  # FederatedRound
  traces: list[Any]  # grows when a client update is traced
  epsilon: float  # Adam's


def cheap_two_views(key, images, config, piece=None):
  """Stands in for `augment.two_views`, a third of what there is to compile: random gains and offsets."""
  del config
  draws = jax.random.uniform(key, (2, 2, images.shape[0], 1, 1, 3))
  views = jnp.clip(augment.to_float(images) * (0.5 + draws[0]) + 0.4 * (draws[1] - 0.5), 0, 1)
  return views if piece is None else jax.lax.dynamic_slice_in_dim(views, *piece, axis=1)


CHEAP_PIPELINE = client_update.Pipeline(two_views=cheap_two_views)
# For commands: crops and flips only, so that there is a third less to compile.
PLAIN_VIEWS = (
  '--jitter_probability=0',
  '--grayscale_probability=0',
  '--blur_probability=0,0',
  '--solarize_probability=0,0',
)


def make_parts(config, epsilon=SMOOTH_EPSILON, placement=Placement(), pipeline=CHEAP_PIPELINE):
  """Builds a round's parts with a cheap pipeline and an Adam that does not amplify rounding."""
  scale = optax.scale_by_adam(eps=epsilon)
  calibrate = None
  if config.uses_calibration:
    calibrate = calibration.make_calibration(config, IMAGE_SIZE, placement, pipeline, scale)
  return rounds.RoundParts(
    client_update.make_client_update(config, IMAGE_SIZE, pipeline, scale),
    aggregation.make_aggregator(config.method, placement.axis),
    calibrate,
    server_optimizer.make_server_optimizer(config.method),
  )


def make_round(
  config, epsilon=SMOOTH_EPSILON, placement=Placement(), client_steps=0, pipeline=CHEAP_PIPELINE, traces=None
):
  """Builds a round of `make_parts`; `traces` grows with every trace of its client update."""
  parts = make_parts(config, epsilon, placement, pipeline)
  update = parts.client_update

  def apply(*arguments):
    if traces is not None:
      traces.append(arguments)
    return update.apply(*arguments)

  parts = parts._replace(client_update=update._replace(apply=apply))
  return rounds.make_round(config, IMAGE_SIZE, placement, client_steps, parts)


@functools.cache
def param_shapes(objective: str) -> Any:
  config = configs.with_values(configs.Config(), {'objective': objective})
  return jax.eval_shape(make_model(config.model, config.objective, IMAGE_SIZE).init_params, jax.random.key(0))


def random_params(shapes: Any, seed: int) -> Any:
  """Draws parameters none of which is zero or one, of a size that keeps activations near 1."""
  generator = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    noise = generator.normal(size=leaf.shape)
    value = {'kernel': lambda: noise / np.sqrt(leaf.shape[-2]), 'scale': lambda: 1 + 0.2 * noise}.get(
      name, lambda: 0.2 * noise
    )()
    return jnp.asarray(value, jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def build_round(epsilon: float, pipeline: Any, values: tuple[tuple[str, Any], ...]) -> Any:
  traces, config = [], configs.with_values(configs.Config(), dict(values))
  return make_round(config, epsilon, pipeline=pipeline, traces=traces), traces


def with_kept(inputs, plan):
  """The inputs of a round whose clients keep what they draw."""
  keeps = depth_dropout.draw_kept(0, [plan], [int(inputs.round_num)], np.asarray(inputs.clients.client_ids)[None])[0]
  return inputs._replace(clients=inputs.clients._replace(kept=jnp.asarray(depth_dropout.select_inputs(plan, keeps))))
