"""From a run's configuration to its corpus. Neighbours: `sharding.py` makes what is missing, `trainer.py` trains on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lrt_core.files import CheckpointError, read_json, write_json
from lrt_core.tokenizer import Tokenizer
from training.config import TrainingConfig
from training.data.documents import Sources
from training.data.records import DataError
from training.data.sample import sample_texts
from training.data.sharding import Recipe, open_shards
from training.data.shards import ShardedCorpus, ShardSet
from training.tokenizer import train_tokenizer

SHARDS_FOLDER = "shards"
SETS_FILE = "shards.json"


def open_corpus(config: TrainingConfig, run: Path, tokenizer: Tokenizer, goes_on: bool = False) -> ShardedCorpus:
    """The run's data as shards: those in `config.shards`, or in the run's folder, are used as they are or made first.

    goes_on: with a run, whose shards will do where the files that they were made of are gone. Any number of processes may ask
    at once: one makes them. DataError when the data cannot be read or are too little.
    """
    root = run / SHARDS_FOLDER if config.shards is None else Path(config.shards)
    has_cuts = config.prompt_cuts > 0 and config.warmdown > 0
    try:
        sources = Sources.find(config.data, config.chat)
    except DataError as error:
        sets = [ShardSet(folder) for folder in _made_before(config, run, root, has_cuts)] if goes_on else []
        if not sets:
            raise
        return ShardedCorpus(*sets, note=f"{error}; going on with what was made of it, {sets[0].folder}")
    recipe = Recipe(
        sources,
        tokenizer,
        config.validation_fraction,
        config.piece_characters,
        conversation_tokens=config.model.sequence_len + 1 if config.chat else None,
        row_tokens=0 if config.chat else config.model.sequence_len,
    )
    recipes = [recipe, *([replace(recipe, cut_share=config.prompt_cuts)] if has_cuts else [])]
    sets = [open_shards(root, one) for one in recipes]
    _remember(run, sets)
    return ShardedCorpus(*sets)


def _remember(run: Path, sets: list[ShardSet]) -> None:
    """Write down which sets are the run's, unless that is written there."""
    names, path = {"sets": [one.folder.name for one in sets]}, run / SETS_FILE
    try:
        known = path.exists() and read_json(path) == names
    except CheckpointError:
        known = False  # a crash cut it off
    if not known:
        run.mkdir(parents=True, exist_ok=True)
        write_json(path, names)


def _made_before(config: TrainingConfig, run: Path, root: Path, has_cuts: bool) -> list[Path]:
    """The run's sets, [] if they are not there: those written down, or where none are the only ones in its folder."""
    if (run / SETS_FILE).exists():
        folders = [root / name for name in read_json(run / SETS_FILE)["sets"]]
        return folders if all(folder.is_dir() for folder in folders) else []
    found = sorted(path for path in root.glob("*-*") if path.is_dir()) if config.shards is None else []
    found.sort(key=lambda path: "-cuts-" in path.name)
    is_cuts = ["-cuts-" in path.name for path in found]
    return found if is_cuts == [False, *([True] if has_cuts else [])] else []


def learn_tokenizer(config: TrainingConfig) -> Tokenizer:
    """A tokenizer for the run's texts, of at most `config.model.vocab_size` ids."""
    sources = Sources.find(config.data)
    texts = sample_texts(sources, config.validation_fraction, config.piece_characters, config.tokenizer_bytes, config.seed)
    return train_tokenizer(texts, config.model.vocab_size, config.tokenizer_bytes)
