"""Trainable models and how they begin."""
