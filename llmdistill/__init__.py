"""Makes small models from large ones: causal language models, encoder classifiers and search models.

Nothing heavy is imported here: `import llmdistill` and `llmdistill --help` stay under a second.
"""

__version__ = "0.1.0"
