"""Frozen models that answer."""
