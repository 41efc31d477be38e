"""What there is to train on: documents and conversations from files of many kinds, in memory or as shards of ids."""

from training.data.corpus import Corpus, load_corpus, python_sources, read_texts
from training.data.documents import Document
from training.data.records import DataError
from training.data.shards import ShardedCorpus

__all__ = ["Corpus", "DataError", "Document", "ShardedCorpus", "load_corpus", "python_sources", "read_texts"]
