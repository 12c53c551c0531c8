"""Encoders: built from a Shape, opened by name, resized, probed."""
