"""Exports a run's encoder for timm: weights as safetensors, and a JSON of how to build and feed the model.

python -m experiments.export --workdir=runs/a --output=encoder.safetensors
"""

from absl import flags as absl_flags

from experiments import flags
from lwfedssl_jax import encoders, export
from lwfedssl_jax.base import UsageError

_WORKDIR = absl_flags.DEFINE_string('workdir', '', 'folder of the run')
_OUTPUT = absl_flags.DEFINE_string('output', 'encoder.safetensors', 'file to write; its JSON goes beside it')


def main():
  """Exports and returns the paths."""
  if not _WORKDIR.value:
    raise UsageError('--workdir: expected the folder of a run')
  loaded = encoders.load_encoder(_WORKDIR.value)
  described = export.export_encoder(loaded, _OUTPUT.value)
  return {'weights': _OUTPUT.value, 'description': described, 'rounds_done': loaded.rounds_done}


if __name__ == '__main__':
  flags.run(main)
