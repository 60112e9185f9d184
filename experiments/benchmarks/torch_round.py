"""The same round in plain PyTorch, as its user would write it, the reference of `experiments.benchmark --suite=round`.

Clients train one after another, each from a DataLoader whose images torchvision's transforms (v2, on tensors) turn into
two views. The server adds up their parameters.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import data
from torchvision.transforms import v2

from lwfedssl_jax.config import Config
from lwfedssl_jax.config_groups import AugmentConfig
from lwfedssl_jax.data import augment
from lwfedssl_jax.stages import StagePlan

from . import torch_step


def make_transform(config: AugmentConfig, view: int, size: int) -> Any:
  """Builds the augmentation of view 0 or 1, on uint8 (3, size, size): the rules of lwfedssl_jax/data/augment.py."""
  return v2.Compose(
    [
      v2.RandomResizedCrop(size, scale=config.crop_area, ratio=augment.CROP_ASPECT, antialias=True),
      v2.RandomHorizontalFlip(config.flip_probability),
      v2.RandomApply([v2.ColorJitter(*config.jitter_strength)], config.jitter_probability),
      v2.RandomGrayscale(config.grayscale_probability),
      v2.RandomApply(
        [v2.GaussianBlur(augment.blur_support(config, size), config.blur_sigma)], config.blur_probability[view]
      ),
      v2.RandomSolarize(128, config.solarize_probability[view]),
      v2.ToDtype(torch.float32, scale=True),
      v2.Normalize([0.5] * 3, [0.5] * 3),
    ]
  )


class TwoViews(data.Dataset):
  """Images (N, 3, S, S), uint8, each as its two views."""

  def __init__(self, images: Any, config: AugmentConfig):
    self._images = images
    self._transforms = [make_transform(config, view, images.shape[-1]) for view in range(2)]

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Any:
    return [transform(self._images[index]) for transform in self._transforms]


def make_round(config: Config, plan: StagePlan, images_per_client: int) -> Callable[[], Any]:
  """Builds a round of clients that hold random images; calling it trains them and aggregates."""
  size, clients = config.model.image_size, config.effective_num_clients
  batch, epochs = config.client.batch_size, config.client.local_epochs
  prefix, online, predictor = torch_step.make_modules(config, plan)
  images = torch.randint(0, 256, (clients, images_per_client, 3, size, size), dtype=torch.uint8)
  loaders = [
    data.DataLoader(TwoViews(own, config.augment), batch_size=batch, shuffle=True, drop_last=True) for own in images
  ]

  def train(loader: Any) -> list[Any]:
    client = torch_step.Client(config, prefix, copy.deepcopy(online), copy.deepcopy(predictor))
    for _ in range(epochs):
      for views in loader:
        client.step(torch.cat(views))
    return [parameter.detach() for parameter in client.modules.parameters()]

  def run() -> None:
    trained = [train(loader) for loader in loaders]
    for parameter, *uploads in zip([*online.parameters(), *predictor.parameters()], *trained, strict=True):
      parameter.data = torch.stack(uploads).mean(0)

  return run
