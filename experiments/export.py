"""Exports a run's encoder for timm: weights as safetensors, and a JSON with architecture and normalization.

    python -m experiments.export --workdir=runs/a --output=encoder.safetensors
    python -m experiments.export --workdir=runs/a --layout=hf --license=apache-2.0 --output=my-encoder

The second one writes a folder for the Hugging Face Hub, with a model card. docs/extending.md shows how to load both
in PyTorch.
"""

from typing import Any

from absl import flags as absl_flags

from lwfedssl_jax.errors import UsageError

from . import command

FLAGS = absl_flags.FlagValues()
_WORKDIR = absl_flags.DEFINE_string('workdir', '', 'folder of the run', flag_values=FLAGS)
_LAYOUT = absl_flags.DEFINE_enum(
  'layout',
  'safetensors',
  ['safetensors', 'hf'],
  "one file and its JSON; or hf: a folder that timm's local-dir: and hf-hub: read, with a model card",
  flag_values=FLAGS,
)
_OUTPUT = absl_flags.DEFINE_string(
  'output',
  '',
  'file to write, the JSON is written beside it (empty: encoder.safetensors); with --layout=hf the folder',
  flag_values=FLAGS,
)
_LICENSE = absl_flags.DEFINE_string(
  'license', '', 'license of the weights in the model card, an identifier such as apache-2.0', flag_values=FLAGS
)


def main() -> dict[str, Any]:
  """Exports and returns the paths."""
  if not _WORKDIR.value:
    raise UsageError('--workdir: expected the folder of a run')
  if _LAYOUT.value == 'hf' and (not _OUTPUT.value or _OUTPUT.value.endswith('.safetensors')):
    raise UsageError(f'--output: expected a folder with --layout=hf, got {_OUTPUT.value!r}')

  from lwfedssl_jax import export, hub, pretrained

  command.use_compilation_cache()
  if _LAYOUT.value == 'hf':
    return {'files': hub.write_folder(_WORKDIR.value, _OUTPUT.value, _LICENSE.value)}
  loaded, path = pretrained.load_encoder(_WORKDIR.value), _OUTPUT.value or 'encoder.safetensors'
  described = export.export_encoder(loaded, path)
  return {'weights': path, 'description': described, 'rounds_done': loaded.rounds_done}


COMMAND = command.Command(__doc__, FLAGS, main)


def run() -> None:
  """Runs this command line."""
  command.run(COMMAND)


if __name__ == '__main__':
  run()
