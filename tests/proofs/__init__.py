"""Claims at full scale, as commands: `make proofs`. The normal tests run the same functions at a small scale."""
