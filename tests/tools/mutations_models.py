"""Mistakes in models, above all in bfloat16, and in loading and exporting them: path, what, old, new, tests."""

VIT, HEADS, EXPORT = ('test_vit.py',), ('test_heads.py',), ('test_export.py',)
ENCODERS = ('test_encoders.py',)

ROWS = (
    ('models/vit.py', 'attention scores in bfloat16', ', preferred_element_type=jnp.float32', '', VIT),
    ('models/vit.py', 'softmax in bfloat16', 'jax.nn.softmax(scores, axis=-1)',
     'jax.nn.softmax(scores.astype(self.dtype), axis=-1)', VIT),
    ('models/vit.py', 'final norm in bfloat16', 'epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32)',
     'epsilon=LAYER_NORM_EPSILON, dtype=dtype)', VIT),
    ('models/vit.py', 'blocks in float32 whatever is asked for', 'Block(size.num_heads, size.mlp_ratio, dtype)',
     'Block(size.num_heads, size.mlp_ratio, jnp.float32)', VIT),
    ('models/vit.py', 'GELU by tanh', '0.5 * (1 + jax.lax.erf(wide * 0.5**0.5))',
     '0.5 * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (wide + 0.044715 * wide**3)))', VIT),
    ('models/vit.py', 'scores not scaled', ' * (d // self.num_heads) ** -0.5', '', VIT),
    ('models/vit.py', 'position table never added', 'tokens.astype(table.dtype) + table', 'tokens.astype(table.dtype)',
     VIT),
    ('models/vit.py', 'rows and columns of the sines exchanged',
     'np.repeat(angle, grid, axis=0), np.tile(angle, (grid, 1))',
     'np.tile(angle, (grid, 1)), np.repeat(angle, grid, axis=0)', VIT),
    ('models/vit.py', 'frequencies of the sines too low', '10_000 **', '1_000 **', VIT),
    ('models/__init__.py', 'sines are never used', "config.position_init == 'sincos'", 'False', VIT),
    ('models/heads.py', 'statistics of a batch in bfloat16', '    x = x.astype(jnp.float32)\n', '', HEADS),
    ('models/heads.py', 'products of the heads in float32', 'dtype=self.dtype, name', 'dtype=jnp.float32, name', HEADS),
    ('models/heads.py', 'variance too small', 'BATCH_NORM_EPSILON = 1e-5', 'BATCH_NORM_EPSILON = 1e-3', HEADS),

    ('pretrained.py', 'loaded encoder forgets to normalize', 'augment.normalize(inputs)', 'inputs', EXPORT),
    ('pretrained.py', 'random weights of one seed', 'rng.key(seed, rng.Stream.INIT)', 'rng.key(0, rng.Stream.INIT)',
     EXPORT),
    ('models/vit_export.py', 'patches transposed', 'transpose(3, 2, 0, 1)', 'transpose(3, 2, 1, 0)', EXPORT),
    ('export.py', 'normalized by another deviation', "'std': [0.5] * 3", "'std': [1.0] * 3", EXPORT),
    ('models/vit_export.py', 'timm normalizes after the pooling', "'fc_norm': False", "'fc_norm': None", EXPORT),
    ('models/vit_export.py', 'as deep as the configuration', "'depth': depth", "'depth': size.depth", EXPORT),
    ('models/vit_export.py', 'a class token', "'class_token': False", "'class_token': True", EXPORT),
    ('export.py', 'rounds of the configuration, not those done', "'rounds_done': loaded.rounds_done",
     "'rounds_done': loaded.config.method.rounds_per_stage", EXPORT),
    ('models/vit_export.py', 'another epsilon is written down', "'layer_norm_epsilon': LAYER_NORM_EPSILON",
     "'layer_norm_epsilon': 1e-5", EXPORT),
    ('models/__init__.py', 'a name that is taken is replaced', 'if name in ENCODERS:', 'if not name:',
     ('test_extending.py::test_a_name_that_is_taken_is_refused',)),
    ('config.py', 'every encoder has whole patches',
     'self.traits.whole_patches and image_size', 'image_size', ENCODERS),
)
