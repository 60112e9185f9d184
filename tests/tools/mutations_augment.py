"""Mistakes in augmentation: path, what, old, new, tests."""

DRAWS, BLUR = ('test_augment_draws.py',), ('test_augment.py::test_sigma_is_in_pixels_of_the_image_whatever_its_size',)
BLURRED = ('test_augment.py::test_blur_is_scipy_s_and_numpy_s_with_a_limited_support_and_mirrored_edges',)
VIEWS = ('test_augment.py::test_views_are_numpy_s',)

ROWS = (
  (
    'data/augment.py',
    'sides are cut off instead of drawn again',
    'fits = ((sides > 0) & (sides <= size)).all(axis=0)',
    'sides = jnp.minimum(sides, size); fits = (sides > 0).all(axis=0)',
    DRAWS,
  ),
  ('data/augment.py', 'no limit on the sides of a crop', '(sides > 0) & (sides <= size)', '(sides > 0)', DRAWS),
  ('data/augment.py', 'sides are not whole pixels', 'jnp.round(jnp.sqrt(', '(jnp.sqrt(', DRAWS),
  ('data/augment.py', 'the last place of a crop is left out', 'size - sides + 1)', 'size - sides)', DRAWS),
  ('data/augment.py', 'sigma in pixels of a 224-pixel image', ') / sigma))', ') / (sigma * size / 224)))', BLUR),
  ('data/augment.py', 'kernel without a limit', 'max(3, 2 * (size // 20) + 1)', '2 * size - 1', VIEWS),
  ('data/augment.py', 'edge pixel repeated', "mode='reflect'", "mode='symmetric'", BLURRED),
  ('data/augment.py', 'the jitter has one order', '(draw[27] * len(JITTER_ORDERS)).astype(jnp.int32)', '0', DRAWS),
  (
    'data/augment.py',
    'the hue is always turned last',
    'place = jnp.argmax(order == HUE)',
    'place = 3 + 0 * jnp.argmax(order == HUE)',
    VIEWS,
  ),
  ('data/augment.py', 'contrast toward the pixel, not the mean', 'luma.mean()', 'luma', VIEWS),
  (
    'data/augment.py',
    'products in the default precision',
    ', columns, precision=HIGHEST)',
    ', columns)',
    ('test_augment.py::test_every_product_asks_for_full_precision',),
  ),
  (
    'data/randaugment.py',
    'products in the default precision',
    'grid, precision=augment.HIGHEST)',
    'grid)',
    ('test_augment.py::test_every_product_asks_for_full_precision',),
  ),
)
