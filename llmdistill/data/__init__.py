"""Rows: where they come from, what they must hold, and how they become tokens."""
