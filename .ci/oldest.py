"""Prints constraints: the oldest version that setup.cfg allows of every direct dependency."""

import configparser
import pathlib
import re

EXTRAS = ('tfds', 'hf', 'wandb', 'mlflow', 'privacy', 'lint', 'test')


def constraints() -> list[str]:
  """Returns NAME==VERSION for every requirement NAME>=VERSION of setup.cfg, in its order."""
  setup = configparser.ConfigParser()
  setup.read(pathlib.Path(__file__).parents[1] / 'setup.cfg')
  lists = [setup['options']['install_requires'], *(setup['options.extras_require'][extra] for extra in EXTRAS)]
  found = [re.fullmatch(r'([\w.-]+)>=([\w.]+)', line.strip()) for text in lists for line in text.split('\n')]
  return [f'{match[1]}=={match[2]}' for match in found if match]


if __name__ == '__main__':
  print('\n'.join(constraints()))
