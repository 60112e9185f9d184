"""A residual network in float64 NumPy, read by timm's names: plain loops over layers, one view at a time."""

import numpy as np

EPSILON = 1e-5


def convolve(x, weight, stride):
  """(N, C, H, W) by (O, C, k, k), padded by half of the kernel."""
  side = weight.shape[-1]
  x = np.pad(x, ((0, 0), (0, 0), (side // 2,) * 2, (side // 2,) * 2))
  windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(2, 3))[:, :, ::stride, ::stride]
  return np.einsum('nchwij,ocij->nohw', windows, weight)


def max_pool(x):
  x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
  return np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2].max((-1, -2))


class NumpyResnet:
  """Reads `export_timm`'s tensors. `training` normalizes by the batch and moves `running`, {name: array}."""

  def __init__(self, tensors, *, large_stem, norm):
    self.tensors = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    self.running = {name: tensor for name, tensor in self.tensors.items() if 'running' in name}
    self.large_stem, self.norm = large_stem, norm

  def normalize(self, name, x, training):
    shape = (1, -1, 1, 1)
    if self.norm == 'group':
      groups = x.reshape(len(x), np.gcd(32, x.shape[1]), -1)
      groups = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + EPSILON)
      x = groups.reshape(x.shape)
    else:
      mean, variance = self.running[f'{name}.running_mean'], self.running[f'{name}.running_var']
      if training:
        count = x.size / x.shape[1]
        of_batch, of_spread = x.mean((0, 2, 3)), x.var((0, 2, 3))
        self.running[f'{name}.running_mean'] = 0.9 * mean + 0.1 * of_batch
        self.running[f'{name}.running_var'] = 0.9 * variance + 0.1 * of_spread * count / (count - 1)
        mean, variance = of_batch, of_spread
      x = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + EPSILON)
    return x * self.tensors[f'{name}.weight'].reshape(shape) + self.tensors[f'{name}.bias'].reshape(shape)

  def __call__(self, images, *, training=False):
    """(N, H, W, 3) -> pooled features (N, D)."""
    relu, tensors = (lambda x: np.maximum(x, 0)), self.tensors
    x = convolve(images.transpose(0, 3, 1, 2).astype(np.float64), tensors['conv1.weight'], 2 if self.large_stem else 1)
    x = relu(self.normalize('bn1', x, training))
    x = max_pool(x) if self.large_stem else x
    for unit in sorted({name.rsplit('.', 2)[0] for name in tensors if name.endswith('bn2.weight')}):
      stride = 2 if unit.endswith('.0') and not unit.startswith('layer1') else 1
      hidden = convolve(x, tensors[f'{unit}.conv1.weight'], stride)
      hidden = convolve(relu(self.normalize(f'{unit}.bn1', hidden, training)), tensors[f'{unit}.conv2.weight'], 1)
      hidden = self.normalize(f'{unit}.bn2', hidden, training)
      if f'{unit}.downsample.0.weight' in tensors:
        x = self.normalize(
          f'{unit}.downsample.1', convolve(x, tensors[f'{unit}.downsample.0.weight'], stride), training
        )
      x = relu(hidden + x)
    return x.mean((2, 3))
