"""Bytes on disk -> `Batch`: the file format, conversion, draws, order and the loaders."""
