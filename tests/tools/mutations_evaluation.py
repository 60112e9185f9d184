"""Mistakes in models, evaluation and export: path, what, old, new, tests."""

PROTOCOLS = ('evaluation/test_protocols.py',)

ROWS = (
    ('evaluation/protocols.py', 'queries keep what all embeddings have in common',
     'queries - origin', 'queries', PROTOCOLS),
)
