"""The architectures, one file each. A model's module path is written into saved pipelines: it is a file format."""
