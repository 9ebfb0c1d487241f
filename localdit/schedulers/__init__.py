"""Samplers that diffusers lacks, with its interfaces."""
