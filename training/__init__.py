"""Train Latent Recurrent Transformers."""
