"""Pictures and captions in, batches out."""
