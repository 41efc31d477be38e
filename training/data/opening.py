"""From a run's configuration to its corpus. Neighbours: `sharding.py` makes what is missing, `trainer.py` trains on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lrt_core.tokenizer import Tokenizer
from training.config import TrainingConfig
from training.data.documents import Sources
from training.data.sample import sample_texts
from training.data.sharding import Recipe, open_shards
from training.data.shards import ShardedCorpus
from training.tokenizer import train_tokenizer

SHARDS_FOLDER = "shards"


def open_corpus(config: TrainingConfig, run: Path, tokenizer: Tokenizer) -> ShardedCorpus:
    """The run's data as shards: those in `config.shards`, or in the run's folder, are used as they are or made first.

    Any number of processes may ask at once: one makes them. DataError when the data cannot be read or are too little.
    """
    recipe = Recipe(
        Sources.find(config.data, config.chat),
        tokenizer,
        config.validation_fraction,
        config.piece_characters,
        conversation_tokens=config.model.sequence_len + 1 if config.chat else None,
    )
    root = run / SHARDS_FOLDER if config.shards is None else Path(config.shards)
    shards = open_shards(root, recipe)
    has_cuts = config.prompt_cuts > 0 and config.warmdown > 0
    return ShardedCorpus(shards, open_shards(root, replace(recipe, cut_share=config.prompt_cuts)) if has_cuts else None)


def learn_tokenizer(config: TrainingConfig) -> Tokenizer:
    """A tokenizer for the run's texts, of at most `config.model.vocab_size` ids."""
    sources = Sources.find(config.data)
    texts = sample_texts(sources, config.validation_fraction, config.piece_characters, config.tokenizer_bytes, config.seed)
    return train_tokenizer(texts, config.model.vocab_size, config.tokenizer_bytes)
