"""The Latent Recurrent Transformer: model, checkpoints, tokenizer, sampling. Knows no HTTP and no scheduler."""
