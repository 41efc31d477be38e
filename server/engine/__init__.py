"""Continuous batching over a paged cache of keys, values and latents."""
