"""Exports a run's encoder for timm: weights as safetensors, and a JSON with architecture and normalization.

    python -m experiments.export --workdir=runs/a --output=encoder.safetensors

docs/extending.md shows how to load them in PyTorch.
"""

from typing import Any

from absl import flags as absl_flags

from lwfedssl_jax.errors import UsageError

from . import command

FLAGS = absl_flags.FlagValues()
_WORKDIR = absl_flags.DEFINE_string('workdir', '', 'folder of the run', flag_values=FLAGS)
_OUTPUT = absl_flags.DEFINE_string(
  'output', 'encoder.safetensors', 'file to write; the JSON is written beside it', flag_values=FLAGS
)


def main() -> dict[str, Any]:
  """Exports and returns the paths."""
  if not _WORKDIR.value:
    raise UsageError('--workdir: expected the folder of a run')

  from lwfedssl_jax import export, pretrained

  command.use_compilation_cache()
  loaded = pretrained.load_encoder(_WORKDIR.value)
  described = export.export_encoder(loaded, _OUTPUT.value)
  return {'weights': _OUTPUT.value, 'description': described, 'rounds_done': loaded.rounds_done}


COMMAND = command.Command(__doc__, FLAGS, main)


def run() -> None:
  """Runs this command line."""
  command.run(COMMAND)


if __name__ == '__main__':
  run()
