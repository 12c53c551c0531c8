"""Drawn scenes without end."""
