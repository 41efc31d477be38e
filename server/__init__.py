"""Serve Latent Recurrent Transformers over an OpenAI-compatible HTTP API."""
