"""An encoder and an objective that the library does not know: counted, costed and exported by what they say."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags as absl_flags
from flax import linen as nn
from safetensors.numpy import load_file

from experiments import flags as config_flags
from lwfedssl_jax import UsageError, configure, export, models, objectives, pretrained, stages, trees
from lwfedssl_jax.base import Encoder, EncoderFlops, Objective, PartFlops
from lwfedssl_jax.catalog import EncoderTraits, ObjectiveTraits
from lwfedssl_jax.data import federated_dataset
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.models.blocks import stack_blocks
from lwfedssl_jax.objectives import branches
from lwfedssl_jax.resources import communication, flops, parameters
from tests.resources.test_flops import product_flops
from tests.tiny import random_params

WIDTH, DEPTH, SIDE, IMAGE_SIZE, BATCH = 8, 6, 4, 10, 6
TOKENS = 2 * 2  # whole patches of 4 pixels in 10; the rest of the image is not looked at


class TinyMlp(nn.Module):
  """A residual MLP behind a norm."""

  @nn.compact
  def __call__(self, tokens):
    return tokens + nn.Dense(WIDTH)(nn.relu(nn.Dense(3 * WIDTH)(nn.LayerNorm()(tokens))))


def make_toy(config, image_size, execution):
  """Patches without overlap, MLPs, and a pool with a product of its own."""
  patch, block, out = nn.Dense(WIDTH), TinyMlp(), nn.Dense(WIDTH)
  count = image_size // config.patch_size
  token = jnp.zeros((1, 1, WIDTH))
  stack = stack_blocks(
    lambda key: block.init(key, token)['params'],
    lambda params, tokens: block.apply({'params': params}, tokens),
    DEPTH,
    execution,
  )

  def embed(params, images):
    p = config.patch_size
    cut = images[:, : count * p, : count * p].reshape(len(images), count, p, count, p, 3).transpose(0, 1, 3, 2, 4, 5)
    return patch.apply({'params': params}, cut.reshape(len(images), count**2, p * p * 3))

  def init(key):
    patches = jnp.zeros((1, 1, 3 * config.patch_size**2))
    return {
      'embedding': patch.init(key, patches)['params'],
      'blocks': stack.init(key),
      'norm': out.init(key, token)['params'],
    }

  def pool(params, tokens):
    return out.apply({'params': params}, tokens).mean(axis=1)

  work = EncoderFlops(
    PartFlops(count**2 * 3 * config.patch_size**2 * WIDTH),
    (PartFlops(count**2 * 6 * WIDTH**2, count**2 * WIDTH),) * DEPTH,
    PartFlops(count**2 * WIDTH**2),
  )
  return Encoder(init, embed, stack.prefix, stack.blocks, pool, DEPTH, WIDTH, work)


def make_two_predictors(config, projector, predictor):
  """Two predictors of different width, in the online branch alone."""
  wide = predictor.clone(hidden=(40,))
  heads = {'first': predictor, 'second': wide}

  def init(key, width):
    online = {name: branches.init_head(head, key, projector.output) for name, head in heads.items()}
    return {'projector': branches.init_head(projector, key, width), **online}

  def project(params, embeddings, mask):
    return projector.apply({'params': params['projector']}, embeddings, mask)

  def loss(params, projections, targets, mask):
    predicted = sum(head.apply({'params': params[name]}, projections, mask) for name, head in heads.items())
    return jnp.where(mask[:, None], jnp.square(predicted - targets[::-1]), 0).sum()

  def update_target(target, online):
    return trees.interpolate(config.target_decay, target, {name: online[name] for name in target})

  return Objective('two_predictors', init, project, loss, update_target, ('projector', *heads), tuple(heads))


@pytest.fixture(autouse=True)
def registered(registries):
  models.register_encoder('toy', EncoderTraits(depth=DEPTH), make_toy)
  objectives.register_objective('two_predictors', ObjectiveTraits(similarity_products=0), make_two_predictors)


def test_a_registered_encoder_is_a_choice_of_the_flag():
  values = absl_flags.FlagValues()
  config_flags.define_config_flags(values)
  assert 'toy' in values['encoder'].parser.enum_values
  values(['program', '--encoder=toy'])
  assert config_flags.config_from_flags(values).model.traits.depth == DEPTH


def test_stages_divide_the_encoder_s_own_blocks():
  assert len(stages.make_plans(configure(encoder='toy', blocks_per_stage=3))) == 2
  with pytest.raises(UsageError, match='--blocks_per_stage: expected a divisor of the 6 blocks of toy, got 4'):
    configure(encoder='toy', blocks_per_stage=4)


def test_the_encoder_s_traits_require_that_patches_divide_the_image():
  images = np.zeros((20, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
  dataset = ImageDataset('made', images, None, images[:0], None, ())
  given = {'image_size': IMAGE_SIZE, 'patch_size': SIDE}
  some = {'num_clients': 2, 'batch_size': 4, 'patch_size': SIDE}
  configure(encoder='toy', **given)
  assert federated_dataset.partition_dataset(dataset, configure(encoder='toy', **some)).image_size == IMAGE_SIZE
  with pytest.raises(UsageError, match='--patch_size: expected a divisor of --image_size=10, got 4'):
    configure(encoder='vit_micro', **given)
  with pytest.raises(UsageError, match='--patch_size: expected a divisor of the image size 10 of made, got 4'):
    federated_dataset.partition_dataset(dataset, configure(encoder='vit_micro', **some))
  with pytest.raises(UsageError, match='--patch_size: expected a divisor of the image size 10, got 4'):
    models.make_encoder(configure(encoder='vit_micro', patch_size=SIDE).model, IMAGE_SIZE)


def test_parameters_are_those_of_encoder_and_heads():
  config = configure(encoder='toy', objective='two_predictors', patch_size=SIDE)
  assert communication.component_params(config, IMAGE_SIZE) == {
    'embedding': (48 + 1) * 8,
    **{f'block_{i:02d}': 2 * 8 + (8 + 1) * 24 + (24 + 1) * 8 for i in range(DEPTH)},
    'norm': (8 + 1) * 8,
    'projector': 8 * 512 + 512 * 512 + 512 * 256 + 2 * (512 + 512),
    'first': 256 * 512 + 512 * 256 + 2 * 512,
    'second': 256 * 40 + 40 * 256 + 2 * 40,
  }
  payload = communication.make_payload(config, IMAGE_SIZE)
  assert payload.head_names == ('projector', 'first', 'second')
  assert payload.sizes_bytes['second'] == 4 * 20_560


@pytest.mark.parametrize('objective', ['moco_v3', 'two_predictors'])
@pytest.mark.parametrize(('method', 'stage'), [('end_to_end', 0), ('layerwise', 0), ('layerwise', 2)])
def test_executed_flops_are_the_products_of_the_traced_step(objective, method, stage):
  """Prefix, online branch with gradient, target branch; a pool that is no norm alone."""
  config = configure(encoder='toy', objective=objective, method=method, patch_size=SIDE)
  plan = stages.make_plans(config)[stage]
  model = make_model(config.model, config.objective, IMAGE_SIZE)
  mask = jnp.ones(BATCH, bool)

  def branch(active, tokens):
    tokens = model.encoder.embed(active['embedding'], tokens) if plan.trains_embedding else tokens
    pooled = model.encoder.pool(active['norm'], model.encoder.blocks(active['blocks'], tokens))
    return model.objective.project(active, pooled.reshape(2, BATCH, -1), mask)

  def step(params, target, images):
    part = stages.split(params, plan.shape, plan.start)
    tokens = images
    if not plan.trains_embedding:
      tokens = model.encoder.embed(part.frozen['embedding'], images)
      tokens = model.encoder.prefix(part.frozen['blocks'], tokens, plan.start)
    keys = branch(stages.split(target, plan.shape, plan.start).active, tokens)
    return jax.grad(lambda active: model.objective.loss(active, branch(active, tokens), keys, mask))(part.active)

  params = parameters.trace_shapes(config, IMAGE_SIZE).params
  images = jax.ShapeDtypeStruct((2 * BATCH, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
  traced = product_flops(jax.make_jaxpr(step)(params, params, images).jaxpr)
  assert flops.executed_flops(config, IMAGE_SIZE, plan, BATCH).total_flops == traced


def test_the_paper_s_convention_counts_the_encoder_s_own_parts():
  """Multiply-adds once, and 5 per element of a norm: one in each block, none in the pool."""
  config = configure(encoder='toy', method='layerwise', patch_size=SIDE)
  block, embedding = TOKENS * (6 * 8 * 8 + 5 * 8), TOKENS * 48 * 8
  ends = TOKENS * 8 * 8 + 8 * 512 + 512 * 512 + 512 * 256 + 2 * 256 * 512
  first, second, *_ = flops.paper_stage_flops(config, IMAGE_SIZE)
  assert first[2:] == (embedding + block + ends, 2 * (embedding + block + ends))
  assert second[2:] == (embedding + 2 * block + ends, 2 * (block + ends))


def test_a_target_branch_lacks_every_online_only_head():
  config = configure(encoder='toy', objective='two_predictors', patch_size=SIDE)
  model, shapes, _ = parameters.trace_shapes(config, IMAGE_SIZE)
  params = random_params(shapes, 0)
  vectors = model.raveler.ravel(params)
  whole = model.raveler.unravel(vectors, params)
  jax.tree.map(np.testing.assert_array_equal, whole, params)
  target = model.raveler.unravel(trees.without_online_only(vectors), params)
  assert set(params) - set(target) == {'first', 'second'}
  jax.tree.map(np.testing.assert_array_equal, target, {name: params[name] for name in target})


def test_heads_that_the_objective_does_not_name_are_refused():
  def build(*arguments):
    return make_two_predictors(*arguments)._replace(head_names=('projector', 'first'))

  objectives.register_objective('forgetful', ObjectiveTraits(similarity_products=0), build)
  with pytest.raises(ValueError, match=r'two_predictors: expected parameters .*, got .*second'):
    communication.make_payload(configure(encoder='toy', objective='forgetful'), IMAGE_SIZE)


def test_without_names_of_its_own_an_encoder_is_exported_by_its_tree_s_paths(tmp_path):
  config = configure(encoder='toy', image_size=IMAGE_SIZE, patch_size=SIDE)
  encoder = models.make_encoder(config.model, IMAGE_SIZE)
  params = random_params(jax.eval_shape(encoder.init, jax.random.key(0)), 0)
  loaded = pretrained.LoadedEncoder(lambda params, images: None, params, encoder, config, 0)
  path = tmp_path / 'toy.safetensors'
  description = json.loads(pathlib.Path(export.export_encoder(loaded, str(path))).read_text())
  assert description['model'] == 'lwfedssl_jax, encoder toy' and 'layer_norm_epsilon' not in description
  assert models.ModelConfig(**description['arguments']) == config.model
  expected = {trees.path_name(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(loaded.params)}
  tensors = load_file(str(path))
  assert tensors.keys() == expected.keys() >= {'blocks/Dense_1/bias', 'embedding/kernel', 'norm/kernel'}
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(tensor, expected[name])
