"""Drawings of icons."""
