"""Shards: the same rows as from texts in memory, made once, and never half a set taken for a whole one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lrt_core.tokenizer import Tokenizer
from tests.helpers import tiny_tokenizer
from tests.training.helpers import tiny_run
from training.data import DataError, ShardedCorpus, load_corpus, sharding
from training.data.documents import Sources
from training.data.encode import Encoder
from training.data.opening import open_corpus
from training.data.sample import sample_texts
from training.data.sharding import Recipe, open_shards
from training.packing import Packer, evaluation_rows
from training.trainer import Trainer

TOKENIZER = tiny_tokenizer()
FRACTION, PIECE = 0.3, 120


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with a text file of many pieces and records, some of them alike, one corrupt."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "long.txt").write_text("\n\n".join(f"paragraph {index} in the long one" for index in range(900)))
    lines = [json.dumps({"text": f"record {index % 37}\n\n" + "and more words. " * (index % 9)}) for index in range(60)]
    (folder / "records.jsonl").write_text("\n".join([*lines[:7], "broken", *lines[7:]]))
    return folder


def recipe(folder: Path, **changes: Any) -> Recipe:
    return replace(Recipe(Sources.find([str(folder)]), TOKENIZER, FRACTION, PIECE), **changes)


def corpus(root: Path, folder: Path, num_processes: int = 1) -> ShardedCorpus:
    """With cuts at half of the places."""
    return ShardedCorpus(*(open_shards(root, recipe(folder, cut_share=share), num_processes) for share in (0.0, 0.5)))


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards and batches of a few documents."""
    for name, value in {"SHARD_BYTES": 2000, "BATCH_CHARACTERS": 1000, "SMALL_CHARACTERS": 2000}.items():
        monkeypatch.setattr(sharding, name, value)


def test_the_rows_are_those_of_texts_in_memory(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    sharded, held = corpus(tmp_path / "root", texts), load_corpus([str(texts)], FRACTION, PIECE)
    assert len(list(sharded.shards.folder.glob("*.bin"))) > 5
    assert (len(sharded.train), len(sharded.validation)) == (len(held.train), len(held.validation))
    assert sharded.num_characters == held.num_characters
    one, other = (Packer(documents, TOKENIZER, 96, 3, seed=5) for documents in (sharded.train, held.train))
    for step in range(120):
        one.cut_share = other.cut_share = 0.5 if step >= 20 else 0.0
        for mine, theirs in zip(one.batch(), other.batch(), strict=True):
            assert torch.equal(mine, theirs)
        assert one.position == other.position
    assert one.position.epoch > 0
    rows = [evaluation_rows(documents, TOKENIZER, 24, 9) for documents in (sharded.validation, held.validation)]
    assert torch.equal(*rows)


@pytest.mark.slow
def test_several_processes_make_the_same_set(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    alone, together = (open_shards(tmp_path / str(count), recipe(texts), count) for count in (1, 2))
    assert alone.meta == together.meta
    assert alone.meta["num_documents"] > 20 and alone.meta["num_skipped"] == 1


def test_corrupt_records_are_counted_and_listed(texts: Path, tmp_path: Path) -> None:
    found = corpus(tmp_path, texts)
    (remark,) = found.remarks()
    assert "skipped 1 corrupt record(s), the first: " in remark and "records.jsonl: line 8: " in remark
    assert "records.jsonl: line 8: " in (found.shards.folder / "skipped.txt").read_text()


def test_a_set_is_made_once(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again when a file, the tokenizer or the split changed; the fingerprint follows the content alone."""
    first = open_shards(tmp_path / "root", recipe(texts))
    with monkeypatch.context() as patched:
        patched.setattr(Encoder, "encode", None)
        assert open_shards(tmp_path / "root", recipe(texts)).meta == first.meta
    other = Tokenizer(r"\S+|\s+", TOKENIZER.ranks, TOKENIZER.special_tokens, "<|bos|>", [], True, None)
    changed = [recipe(texts, tokenizer=other), recipe(texts, validation_fraction=0.5), recipe(texts, piece_characters=60)]
    (texts / "records.jsonl").touch()
    touched = open_shards(tmp_path / "root", recipe(texts))
    assert touched.folder != first.folder
    assert touched.meta["fingerprint"] == first.meta["fingerprint"]
    (texts / "new.md").write_text("a new file")
    sets = [first, touched, *(open_shards(tmp_path / "root", one) for one in [*changed, recipe(texts)])]
    assert len({one.folder for one in sets}) == len(sets)
    assert len({one.meta["fingerprint"] for one in sets}) == len(sets) - 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("00000.bin", truncate, "bytes long instead of"),
        ("00000.bin", flip, "its checksum differs"),
        ("00000.bin", Path.unlink, "missing"),
        ("train.npy", flip, "its checksum differs"),
        ("validation.npy", truncate, "bytes long instead of"),
        ("meta.json", truncate, "not valid JSON"),
        ("meta.json", Path.unlink, "file not found"),
    ],
)
def test_a_damaged_set_is_an_error_that_helps(
    texts: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    folder = open_shards(tmp_path, recipe(texts)).folder
    damage(folder / name)
    with pytest.raises(DataError, match=message) as caught:
        Packer(ShardedCorpus(open_shards(tmp_path, recipe(texts))).train, TOKENIZER, 24, 2, 0).batch()
    assert str(caught.value).startswith(f"{folder / name}: damaged: ")
    assert f"delete the folder {folder} and start again" in str(caught.value)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.test_shards import recipe
from training.data import sharding

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

place = sys.argv[3]
if place == "amid":
    sharding.BATCH_CHARACTERS, add, count = 200, sharding._Writer.add, iter(range(9))
    sharding._Writer.add = lambda writer, batch: add(writer, batch) if next(count) < 8 else die()
else:
    sharding.write_json = die
sharding.open_shards(Path(sys.argv[1]), recipe(Path(sys.argv[2])), 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["amid", "before the table"])
def test_nothing_is_left_of_a_set_whose_maker_was_killed(texts: Path, tmp_path: Path, place: str) -> None:
    root = tmp_path / "root"
    command = [sys.executable, "-c", KILLED, str(root), str(texts), place]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode == -9
    (remains,) = root.glob(".*.tmp")
    assert (remains / "00000.bin").stat().st_size > 0
    assert not list(root.glob("text-*[!k]"))
    made = open_shards(root, recipe(texts))
    assert not remains.exists()
    assert made.meta == open_shards(tmp_path / "other", recipe(texts)).meta


def test_an_error_leaves_nothing(texts: Path, tmp_path: Path) -> None:
    (texts / "z.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"z\.txt: cannot be read"):
        open_shards(tmp_path / "root", recipe(texts))
    assert [path.suffix for path in (tmp_path / "root").iterdir()] == [".lock"]


def test_large_vocabularies_have_wider_ids(texts: Path, tmp_path: Path) -> None:
    pairs = [bytes([first, second]) for first in range(256) for second in range(256)]
    ranks = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *reversed(pairs)])}
    tokenizer = Tokenizer(r"\s|\S+", ranks, {"<|bos|>": len(ranks)}, "<|bos|>", [], True, None)
    shards = ShardedCorpus(open_shards(tmp_path, recipe(texts, tokenizer=tokenizer)))
    assert shards.shards.meta["id_bytes"] == 4
    ids = shards.train.ids(3, 0.0)
    assert ids[0] == tokenizer.bos_id == 65_792
    assert "paragraph" in tokenizer.decode(ids.tolist()[1:])


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_both_sides_get_something(tmp_path: Path, fraction: float) -> None:
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(f"text {index}")
    found = ShardedCorpus(open_shards(tmp_path / "root", recipe(tmp_path, validation_fraction=fraction)))
    held = load_corpus([str(tmp_path)], fraction, PIECE)
    assert sorted([len(found.train), len(found.validation)]) == [1, 2]
    assert (len(found.train), len(found.validation)) == (len(held.train), len(held.validation))
    sample = sample_texts(Sources.find([str(tmp_path)]), fraction, PIECE, 1000, 0)
    assert sorted(sample) == [document.text for document in held.train]


def few(tmp_path: Path, count: int, text: str) -> Path:
    """A folder of small files."""
    folder = tmp_path / "few"
    folder.mkdir()
    for index in range(count):
        (folder / f"{index}.txt").write_text(f"text number {index}: {text}")
    return folder


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_validation_gets_documents_until_they_fill_a_row(tmp_path: Path, share: float) -> None:
    """In the order in which a larger fraction would give them, the same with cuts and without."""
    texts = few(tmp_path, 12, "and a few words more, of which there are not many\n" * 3)
    found = []
    for row_tokens in (0, 512):
        own = recipe(texts, validation_fraction=0.02, row_tokens=row_tokens)
        sets = [open_shards(tmp_path / str(row_tokens), replace(own, cut_share=one)) for one in {0.0: 1, share: 1}]
        found.append(ShardedCorpus(*sets))
    small, large = found
    assert len(small.validation) == 1 and len(small.train) > len(large.train)
    names = [set(one.entries["name"].tolist()) for one in (small.validation, large.validation, large.train)]
    assert names[0] < names[1] and max(names[1]) < min(names[2])
    assert evaluation_rows(large.validation, TOKENIZER, 512, 64).shape == (1, 513)


def test_text_that_fills_no_row_is_an_error_that_says_how_much_lacks(tmp_path: Path) -> None:
    short = recipe(few(tmp_path, 4, "some words " * 10), validation_fraction=0.02, row_tokens=512)
    message = r"few: too little text: to validate takes a row of 512 tokens, and all documents but one lack \d+ for it"
    with pytest.raises(DataError, match=message) as caught:
        open_shards(tmp_path / "root", short)
    lacking, characters = map(int, re.findall(r" (\d+) ", str(caught.value))[-2:])
    assert 0 < lacking < 512 and 0 < characters < 5 * lacking
    assert [path.suffix for path in (tmp_path / "root").iterdir()] == [".lock"]


def test_a_set_on_which_no_run_can_begin_is_made_anew(tmp_path: Path) -> None:
    without = recipe(few(tmp_path, 12, "some words " * 20), validation_fraction=0.02)
    before = open_shards(tmp_path / "root", without)
    assert len(before.index("validation.npy")) == 1
    after = open_shards(tmp_path / "root", replace(without, row_tokens=300))
    assert after.folder == before.folder
    assert len(after.index("validation.npy")) > 1 and before.meta["fingerprint"] != after.meta["fingerprint"]
    assert open_shards(tmp_path / "root", replace(without, row_tokens=300)).meta == after.meta


def test_one_document_is_too_few(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same")
    with pytest.raises(DataError, match="two different documents, got 1"):
        open_shards(tmp_path / "root", recipe(tmp_path))


def test_cuts_that_were_not_made(texts: Path, tmp_path: Path) -> None:
    packer = Packer(ShardedCorpus(open_shards(tmp_path, recipe(texts))).train, TOKENIZER, 24, 2, 0)
    packer.cut_share = 0.5
    with pytest.raises(ValueError, match="made without cuts"):
        packer.batch()


def test_the_sample_for_a_tokenizer_is_bounded_and_of_the_training_side(texts: Path) -> None:
    held = load_corpus([str(texts)], FRACTION, PIECE)
    sources = Sources.find([str(texts)])
    training = {document.text for document in held.train}
    everything = sample_texts(sources, FRACTION, PIECE, 10**9, 0)
    assert set(everything) == training and len(everything) == len(training)
    some, others = (sample_texts(sources, FRACTION, PIECE, 3000, seed) for seed in (0, 1))
    assert some == everything[: len(some)]
    assert set(some) != set(others)
    assert 3000 <= sum(map(len, some)) < 3000 + max(map(len, training))


def test_processes_share_a_batch(texts: Path, tmp_path: Path) -> None:
    """Each takes its rows, reads no others, and stands where one that takes all stands."""
    train = corpus(tmp_path, texts).train
    whole, *parts = (Packer(train, TOKENIZER, 24, 6, seed=1) for _ in range(4))
    slices = [slice(rank * 2, rank * 2 + 2) for rank in range(3)]
    for _ in range(40):
        tokens, targets = whole.batch()
        for packer, rows in zip(parts, slices, strict=True):
            mine = packer.batch(rows)
            assert torch.equal(mine[0], tokens[rows]) and torch.equal(mine[1], targets[rows])
            assert packer.position == whole.position


def test_rows_of_others_are_not_read(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = corpus(tmp_path, texts).train
    packer = Packer(train, TOKENIZER, 24, 4, seed=1)
    read: list[int] = []
    ids = train.ids
    monkeypatch.setattr(train, "ids", lambda index, share: (read.append(index), ids(index, share))[1])
    packer.batch(slice(1, 2))
    assert read
    count = len(read)
    packer.batch()
    assert len(read) - count > count


def test_a_run_on_shards_resumes_bit_for_bit(texts: Path, tmp_path: Path) -> None:
    """Saved at the step before cuts begin; the resumed run opens the shards itself."""
    config = tiny_run(data=(str(texts),), num_steps=6, warmdown=0.5, prompt_cuts=0.5, validation_fraction=FRACTION)

    def data(run: Path) -> ShardedCorpus:
        return open_corpus(config, run, TOKENIZER)

    whole, first = (
        Trainer.create(config, tmp_path / name, data(tmp_path / name), TOKENIZER, "") for name in ("whole", "parts")
    )
    expected = [whole.step() for _ in range(6)]
    results = [first.step() for _ in range(3)]
    first.save()
    second = Trainer.resume(tmp_path / "parts", data(tmp_path / "parts"))
    assert not second.data_changed
    results += [second.step() for _ in range(3)]
    assert results == expected
    assert second.packer.cut_share == 0.5
    (texts / "new.txt").write_text("more text")
    assert Trainer.resume(tmp_path / "parts", data(tmp_path / "parts")).data_changed


def test_who_comes_while_a_set_is_made_waits_for_it(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], sharding._make

    def slowly(*arguments: Any) -> None:
        made.append(arguments)
        time.sleep(0.2)
        make(*arguments)

    monkeypatch.setattr(sharding, "_make", slowly)
    with ThreadPoolExecutor(3) as pool:
        sets = list(pool.map(lambda _: open_shards(tmp_path / "root", recipe(texts), 1), range(3)))
    assert len(made) == 1
    assert sets[0].meta == sets[1].meta == sets[2].meta
