"""The architectures, one file each.

A model's module path is written into saved pipelines: these file names are part of a file format.
"""
