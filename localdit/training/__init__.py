"""Training: objectives, the one loop, its configuration and its checkpoints."""
