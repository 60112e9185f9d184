"""Prints requirements.txt: the installed version of everything that the package depends on directly."""

import configparser
import importlib.metadata
import pathlib
import re

EXTRAS = ('tfds',)
HEADER = """\
# What produced the figures in docs/. Install with `pip install -r requirements.txt`, then `pip install --no-deps -e .`
# Written by `make requirements` from the environment that it runs in. jax 0.11 and newer need Python 3.12; on an
# accelerator, install jax as its documentation says first.
"""


def pins() -> list[str]:
  """Returns NAME==VERSION of the dependencies and of those of EXTRAS, in the order of setup.cfg."""
  setup = configparser.ConfigParser()
  setup.read(pathlib.Path(__file__).parents[1] / 'setup.cfg')
  lists = [setup['options']['install_requires'], *(setup['options.extras_require'][extra] for extra in EXTRAS)]
  names = [re.split(r'[^\w.-]', line)[0] for text in lists for line in text.split('\n') if line]
  return [f'{name}=={importlib.metadata.version(name)}' for name in names]


if __name__ == '__main__':
  print(HEADER + '\n'.join(pins()))
