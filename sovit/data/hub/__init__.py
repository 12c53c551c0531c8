"""Folders, parquet files, archives and hub sets of images."""
