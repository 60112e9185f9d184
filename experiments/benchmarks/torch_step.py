"""The same client step in plain PyTorch, the reference of `experiments.benchmark`.

ViT and MoCo v3 as in lwfedssl_jax (arXiv 2010.11929, 2104.02057, 2401.11647), with PyTorch's fused attention and
fused AdamW. Parts without gradient (frozen blocks, target branch) run under no_grad, frozen blocks once for both
branches.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lwfedssl_jax.catalog import HEAD_HIDDEN, PROJECTION_SIZE, VitTraits
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.stages import StagePlan


class Block(nn.Module):
  """Pre-norm transformer block."""

  def __init__(self, width: int, heads: int, ratio: int):
    super().__init__()
    self.heads = heads
    self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
    self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
    self.mlp1, self.mlp2 = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

  def forward(self, x: Any) -> Any:
    b, t, d = x.shape
    q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
    x = x + self.projection(mixed)
    return x + self.mlp2(functional.gelu(self.mlp1(self.norm2(x))))


class Embedding(nn.Module):
  """Patch projection and position table."""

  def __init__(self, width: int, image_size: int, patch: int):
    super().__init__()
    self.patch = nn.Conv2d(3, width, patch, patch)
    self.position = nn.Parameter(0.02 * torch.randn((image_size // patch) ** 2, width))

  def forward(self, images: Any) -> Any:
    return self.patch(images).flatten(2).transpose(1, 2) + self.position


def _head(*widths: int) -> nn.Sequential:
  layers = []
  for index, (a, b) in enumerate(itertools.pairwise(widths)):
    last = index == len(widths) - 2
    layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=not last, track_running_stats=False)]
    layers += [] if last else [nn.ReLU()]
  return nn.Sequential(*layers)


def _sizes(config: Config) -> tuple[int, int, int]:
  """Returns token width, attention heads and MLP expansion of the configured vision transformer. Raises UsageError."""
  traits = config.model.traits
  if not isinstance(traits, VitTraits):
    raise UsageError(f'--encoder: expected a vision transformer to compare with PyTorch, got {config.model.encoder}')
  return traits.width, traits.num_heads, traits.mlp_ratio


class Active(nn.Module):
  """The trained part without the predictor: embedding (if trained), active blocks, norm and projector."""

  def __init__(self, config: Config, plan: StagePlan):
    super().__init__()
    d, heads, ratio = _sizes(config)
    self.embedding = Embedding(d, config.model.image_size, config.model.patch_size) if plan.trains_embedding else None
    self.blocks = nn.Sequential(*(Block(d, heads, ratio) for _ in range(plan.stop - plan.start)))
    self.norm = nn.LayerNorm(d, eps=1e-6)
    self.projector = _head(d, HEAD_HIDDEN, HEAD_HIDDEN, PROJECTION_SIZE)

  def forward(self, inputs: Any) -> Any:
    tokens = inputs if self.embedding is None else self.embedding(inputs)
    pooled = self.norm(self.blocks(tokens)).mean(1)
    return [self.projector(view) for view in pooled.chunk(2)]  # batch norm over each view, as in lwfedssl_jax


def _info_nce(queries, keys, temperature):
  logits = functional.normalize(queries) @ functional.normalize(keys).T / temperature
  return functional.cross_entropy(logits, torch.arange(len(queries)))


class Client:
  """A client's trained modules; `step` takes one MoCo v3 step on two views, (2B, 3, H, W), and returns its loss."""

  def __init__(self, config: Config, prefix: Any, online: Active, predictor: Any):
    self.modules = nn.ModuleList([online, predictor])
    self._prefix, self._online, self._predictor = prefix, online, predictor
    self._target = copy.deepcopy(online).requires_grad_(False)
    self._decay, self._temperature = config.objective.target_decay, config.objective.temperature
    client = config.client
    self._optimizer = torch.optim.AdamW(
      self.modules.parameters(),
      lr=client.learning_rate * client.batch_size / 256,
      weight_decay=client.weight_decay,
      fused=True,
    )

  def step(self, views: Any) -> float:
    with torch.no_grad():
      inputs = self._prefix(views)
      keys = self._target(inputs)
    queries = [self._predictor(projection) for projection in self._online(inputs)]
    loss = _info_nce(queries[0], keys[1], self._temperature) + _info_nce(queries[1], keys[0], self._temperature)
    self._optimizer.zero_grad(set_to_none=True)
    loss.backward()
    self._optimizer.step()
    with torch.no_grad():
      torch._foreach_lerp_(list(self._target.parameters()), list(self._online.parameters()), 1 - self._decay)
    return loss.item()


def make_modules(config: Config, plan: StagePlan) -> tuple[Any, Active, Any]:
  """Builds the frozen prefix (nothing, where the embedding is trained), the trained part and the predictor."""
  d, heads, ratio = _sizes(config)
  frozen = [] if plan.trains_embedding else [Embedding(d, config.model.image_size, config.model.patch_size)]
  prefix = nn.Sequential(*frozen, *(Block(d, heads, ratio) for _ in range(plan.start)))
  return prefix, Active(config, plan), _head(PROJECTION_SIZE, HEAD_HIDDEN, PROJECTION_SIZE)


def make_step(config: Config, plan: StagePlan) -> Callable[[], Any]:
  """Builds a step on random views of its own; calling it takes one optimizer step."""
  client = Client(config, *make_modules(config, plan))
  views = torch.rand(2 * config.client.batch_size, 3, config.model.image_size, config.model.image_size)
  return lambda: client.step(views)
