"""What a residual network costs: the paper's figures, components, and the products of the traced step."""

import math

import jax
import jax.numpy as jnp
import pytest

from lwfedssl_jax import catalog, models, stages
from lwfedssl_jax.config import configure
from lwfedssl_jax.federated import training_step
from lwfedssl_jax.federated.client_update import make_step_options
from lwfedssl_jax.resources import accounting, communication, costs, flops, memory, parameters

PAPER = {
  'encoder': 'resnet18',
  'stem': 'large',
  'image_size': 32,
  'rounds_per_stage': 30,
  'local_epochs': 3,
  'batch_size': 512,
}


def test_the_paper_s_end_to_end_row():
  """41 GFLOPs and 11.09 GB (arXiv 2401.11647 v4). Running statistics count; without them it is 11.075."""
  config = configure(method='end_to_end', **PAPER)
  cost = costs.method_cost(config, 32, 'paper_v4')
  assert cost.total_flops / 1e9 == pytest.approx(41, abs=0.5)
  assert cost.total_bytes / costs.gb_bytes('paper_v4') == pytest.approx(11.09, abs=0.01)


def test_components_by_hand():
  """Convolutions, four numbers per channel of a normalization, and a layer with bias behind all stages but the last."""
  counts = parameters.component_params(configure(**PAPER), 32)

  def stage(below, width):
    shortcut = below * width + 4 * width if below != width else 0
    return 9 * below * width + 3 * 9 * width * width + 4 * 4 * width + shortcut

  assert counts == {
    'embedding': 7 * 7 * 3 * 64 + 4 * 64,
    'block_00': stage(64, 64),
    'block_01': stage(64, 128),
    'block_02': stage(128, 256),
    'block_03': stage(256, 512),
    'norm': 0,
    'adapter_00': (64 + 1) * 512,
    'adapter_01': (128 + 1) * 512,
    'adapter_02': (256 + 1) * 512,
    'projector': 2 * 512 * 512 + 512 * 256 + 4 * 512,
    'predictor': 2 * 256 * 512 + 2 * 512,
  }
  assert sum(counts[f'block_{i:02d}'] for i in range(4)) + counts['embedding'] == 11_176_512 + 9_600  # torchvision's
  group = parameters.component_params(configure(norm='group', **PAPER), 32)
  assert group['block_03'] == counts['block_03'] - 2 * 5 * 512


def test_an_adapter_is_exchanged_in_its_own_stage_alone():
  config = configure(method='layerwise', **PAPER)
  adapters = [
    [name for name in stage.round_uploads if name.startswith('adapter')]
    for stage in communication.stage_traffic(config, 32, 'paper_v4', worst_case_download=True)
  ]
  assert adapters == [['adapter_00'], ['adapter_01'], ['adapter_02'], []]
  found = accounting.expected_traffic(config, 32)
  payload = communication.make_payload(config, 32)
  column = list(payload.sizes_bytes).index('adapter_01')
  downloads = found.download_bytes[:, column] / payload.sizes_bytes['adapter_01']
  assert downloads.tolist() == [0, 30, 0, 0]


def convolution_flops(jaxpr):
  """Sums 2 * multiply-adds over products and convolutions; positions that a stride skips do not count."""
  total = 0
  for eqn in jaxpr.eqns:
    shapes, out = [v.aval.shape for v in eqn.invars], eqn.outvars[0].aval.shape
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      total += 2 * math.prod(out) * math.prod(shapes[0][i] for i in contracted)
    elif eqn.primitive.name == 'conv_general_dilated':
      numbers = eqn.params['dimension_numbers']
      kernel = math.prod(n for i, n in enumerate(shapes[1]) if i != numbers.rhs_spec[0])
      total += 2 * math.prod(out) * kernel // math.prod(eqn.params['lhs_dilation'])
    for inner in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
    ):
      inner = getattr(inner, 'jaxpr', inner)
      total += convolution_flops(inner) if hasattr(inner, 'eqns') else 0
  return total


@pytest.mark.usefixtures('registries')
@pytest.mark.parametrize(
  ('method', 'stage'), [('layerwise', 0), ('layerwise', 1), ('layerwise', 2), ('prog_fedssl', 1)]
)
@pytest.mark.parametrize('stem', ['small', 'large'])
def test_executed_flops_are_the_products_of_the_traced_gradient(method, stage, stem):
  models.register_encoder('resnet_tiny', catalog.ResnetTraits(width=4, units=(2, 1, 1)), models.build_resnet)
  side, batch_size = 32, 4
  config = configure(encoder='resnet_tiny', method=method, stem=stem, batch_size=batch_size, rematerialize='none')
  plan, options = stages.make_plans(config)[stage], make_step_options(config, side)
  params = jax.eval_shape(options.model.init_params, jax.random.key(0))
  batch = training_step.Batch(
    jax.ShapeDtypeStruct((2, batch_size, side, side, 3), jnp.float32), jax.ShapeDtypeStruct((batch_size,), jnp.bool_)
  )

  def gradient(params, batch):
    global_params = stages.split(params, plan.shape, plan.start)
    return training_step.gradient(options, memory.init_step_state(options, global_params), global_params, batch)

  traced = convolution_flops(jax.make_jaxpr(gradient)(params, batch).jaxpr)
  assert flops.executed_flops(config, side, plan, batch_size).total_flops == traced
