"""The columns of a described data set (TFDS, Hugging Face) that hold the image and its label.

`kinds` maps columns to the names of their types.
"""

from collections.abc import Mapping


def find_image(kinds: Mapping[str, str]) -> str | None:
  """Returns `image`, else the first column of type Image, else None."""
  return 'image' if 'image' in kinds else next((name for name, kind in kinds.items() if kind == 'Image'), None)


def find_label(kinds: Mapping[str, str]) -> str | None:
  """Returns `label` if its type is ClassLabel, else the only column of that type, else None."""
  labels = [name for name, kind in kinds.items() if kind == 'ClassLabel']
  return 'label' if 'label' in labels else labels[0] if len(labels) == 1 else None
