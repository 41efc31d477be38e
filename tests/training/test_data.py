"""Corpora: kinds of files, corrupt records, the split, and which Python files count as written by hand."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from training.data import Corpus, DataError, Document, load_corpus, python_sources, records
from training.data.documents import Sources, pieces

CODE = "def add(first, second):\n    '''The sum of two numbers.'''\n    return first + second\n\n\n" * 5


def whole(name: str) -> str:
    """The document that a training piece was cut from."""
    return name.partition("@")[0]


def write_files(folder: Path, count: int) -> None:
    for index in range(count):
        path = folder / f"part{index % 3}" / f"file{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text number {index}\n")


def names(documents: list[Document]) -> set[str]:
    return {whole(document.name) for document in documents}


def test_folder_of_text(tmp_path: Path) -> None:
    write_files(tmp_path, 40)
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    corpus = load_corpus([str(tmp_path)], 0.2, 4096)
    assert len(corpus.train) + len(corpus.validation) == 40
    assert 2 <= len(corpus.validation) <= 16
    assert "part0/file0.txt#0" in names(corpus.train) | names(corpus.validation)


def test_split_depends_on_relative_names_alone(tmp_path: Path) -> None:
    """The same files elsewhere, with others beside them, stay on their sides."""
    write_files(tmp_path / "here", 30)
    write_files(tmp_path / "there" / "deeper", 45)
    small = load_corpus([str(tmp_path / "here")], 0.2, 4096)
    large = load_corpus([str(tmp_path / "there" / "deeper")], 0.2, 4096)
    assert names(small.train) <= names(large.train)
    assert names(small.validation) <= names(large.validation)
    assert not names(large.train) & names(large.validation)


def test_training_documents_are_cut_after_the_split(tmp_path: Path) -> None:
    paragraphs = [f"value_{index} = {index}" for index in range(100)]
    lines = [json.dumps({"text": f"# {index}\n\n" + "\n\n".join(paragraphs)}) for index in range(20)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    corpus = load_corpus([str(path)], 0.3, 200)
    assert len(names(corpus.train)) + len(corpus.validation) == 20
    assert not names(corpus.train) & names(corpus.validation)
    assert all(document.text.endswith(paragraphs[-1]) for document in corpus.validation)
    assert len(corpus.train) > 5 * len(names(corpus.train))
    assert all(len(document.text) < 250 for document in corpus.train)
    first = [document.text for document in corpus.train if whole(document.name) == whole(corpus.train[0].name)]
    assert "\n\n".join(first).split("\n\n")[1:] == paragraphs


def test_both_sides_get_something(tmp_path: Path) -> None:
    write_files(tmp_path, 2)
    for fraction in (0.0001, 0.9999):
        corpus = load_corpus([str(tmp_path)], fraction, 4096)
        assert len(corpus.train) == len(corpus.validation) == 1


def test_equal_texts_count_once(tmp_path: Path) -> None:
    for index in range(5):
        (tmp_path / f"{index}.txt").write_text("same" if index else "other")
    corpus = load_corpus([str(tmp_path)], 0.5, 4096)
    assert len(corpus.train) + len(corpus.validation) == 2


def test_one_document_is_too_few(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("text")
    with pytest.raises(DataError, match="two different documents, got 1"):
        load_corpus([str(tmp_path)], 0.5, 4096)


def test_long_text_is_cut_at_blank_lines() -> None:
    paragraphs = [f"{index} " * 1000 for index in range(30)]
    found = list(pieces(["\n\n".join(paragraphs)], 16_384))
    assert len(found) > 2
    assert "\n\n".join(found).split("\n\n") == paragraphs


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": lambda data: gzip.compress(data, mtime=0),
    ".jsonl.zst": zstandard.compress,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_records(tmp_path: Path, suffix: str) -> None:
    """A file may be made of several compressed ones, one after the other."""
    lines = [json.dumps({"text": f"record {index}", "source": "test"}) for index in range(20)]
    path = tmp_path / f"data{suffix}"
    path.write_bytes(b"".join(COMPRESS[suffix]("\n".join([*part, "", ""]).encode()) for part in (lines[:10], lines[10:])))
    corpus = load_corpus([str(path)], 0.3, 4096)
    assert {document.text for document in corpus.train + corpus.validation} == {f"record {index}" for index in range(20)}
    assert corpus.skipped == []


def test_parquet(tmp_path: Path) -> None:
    """Rows in several groups, one without text, beside a column that is not read."""
    texts = [*(f"record {index}" for index in range(20)), None]
    table = pyarrow.table({"id": list(range(21)), "text": texts})
    parquet.write_table(table, tmp_path / "data.parquet", row_group_size=6)
    corpus = load_corpus([str(tmp_path)], 0.3, 4096)
    assert {document.text for document in corpus.train + corpus.validation} == set(texts[:20])
    assert names(corpus.train + corpus.validation) == {f"data.parquet#{number}" for number in range(1, 21)}
    assert corpus.skipped == [f"{tmp_path / 'data.parquet'}: row 21: not an object with a non-empty string `text`"]
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data\.parquet: has no column `text`, only body"):
        load_corpus([str(tmp_path)], 0.3, 4096)


@pytest.mark.parametrize(("name", "package"), [("data.jsonl.zst", "zstandard"), ("data.parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(records, "import_module", missing)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name}: needs the package {package}: pip install 'lrt-server\[data\]'"):
        load_corpus([str(tmp_path)], 0.3, 4096)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_large_file_is_never_whole_in_memory(tmp_path: Path, suffix: str) -> None:
    data = b"".join(b'{"text": "%07d %s"}\n' % (index, b"word " * 200) for index in range(20_000))
    (tmp_path / f"data{suffix}").write_bytes(COMPRESS[suffix](data))
    documents = Sources.find([str(tmp_path)]).documents(pytest.fail)
    next(documents)
    tracemalloc.start()
    assert sum(1 for _ in documents) == 19_999
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(data) / 4


def test_lines_that_are_too_long_are_corrupt_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 5)
    lines = [b"12345", b"", b"123456", b"1", b"1234567890", b"12"]
    for size in (1, 2, 3, 7, 100):
        data = b"\n".join(lines)
        blocks = (data[start : start + size] for start in range(0, len(data), size))
        assert list(records.numbered_lines(blocks)) == [(1, b"12345"), (2, b""), (3, None), (4, b"1"), (5, None), (6, b"12")]


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_pieces_do_not_depend_on_how_a_text_comes(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\n\n\nbc\n\n\n\nd\ne\n\n" * 9
    blocks = [text[start : start + size] for start in range(0, len(text), size)]
    assert list(pieces(blocks, 12)) == list(pieces([text], 12))
    monkeypatch.setattr("training.data.documents.MAX_PARAGRAPH_CHARACTERS", 8)
    found = list(pieces([("x" * 5 + "\n") * 3 + "y" * 20], 1))
    assert found == ["xxxxx\n"] * 3 + ["y" * 8, "y" * 8, "yyyy"]


def test_corrupt_records_are_skipped_and_named(tmp_path: Path) -> None:
    good = [json.dumps({"text": f"record {index}"}).encode() for index in range(5)]
    bad = [
        b'{"text": "cut',
        b'{"text": 3}',
        b'["text"]',
        b'{"text":' + b"[" * 100_000,
        b'{"body": "x"}',
        b"\xff\xfe",
        b'{"text": "\\ud800"}',
        b'{"text": ""}',
    ]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([*bad, *good]))
    corpus = load_corpus([str(path)], 0.3, 4096)
    assert len(corpus.train) + len(corpus.validation) == 5
    assert len(corpus.skipped) == len(bad)
    for number, message in enumerate(corpus.skipped, start=1):
        assert message.startswith(f"{path}: line {number}: ")


def test_a_file_without_any_record_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("no json\n")
    with pytest.raises(DataError, match=r"data\.jsonl: no line is a JSON object"):
        load_corpus([str(path)], 0.3, 4096)


def test_empty_files_among_others_are_counted_and_named(tmp_path: Path) -> None:
    good = [json.dumps({"text": f"record {index}"}) for index in range(5)]
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n \n"))
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "c.parquet")
    parquet.write_table(pyarrow.table({"other": pyarrow.array([], pyarrow.null())}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("")
    corpus = load_corpus([str(tmp_path)], 0.3, 4096)
    assert len(corpus.train) + len(corpus.validation) == 5
    assert corpus.skipped == [f"{tmp_path / name}: empty" for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.parquet")]
    (tmp_path / "good.jsonl").write_text("")
    with pytest.raises(DataError, match=rf"{tmp_path}: no text in 6 file\(s\), the first {tmp_path}/a\.jsonl"):
        load_corpus([str(tmp_path)], 0.3, 4096)


def test_a_byte_order_mark_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first"}\n{"text": "\xef\xbb\xbfsecond"}\n')
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfthird")
    corpus = load_corpus([str(tmp_path)], 0.3, 4096)
    found = {document.text for document in corpus.train + corpus.validation}
    assert found == {"first", "\ufeffsecond", "third"} and corpus.skipped == []


def test_hidden_files_are_read_only_when_they_are_named(tmp_path: Path) -> None:
    folder = tmp_path / ".hidden"  # named itself, so what is hidden in there counts
    for name in ("a.txt", "b/c.txt", ".d.txt", ".git/e.txt", "b/.f/g.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    assert [file.name for file in Sources.find([str(folder)]).files] == ["a.txt", "b/c.txt"]
    named = Sources.find([str(folder / ".d.txt"), str(folder / ".git"), str(folder / "b")])
    assert [file.name for file in named.files] == [".d.txt", "e.txt", "c.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.txt", b"\xff\xfe\x00", "cannot be read"),
        ("data.jsonl.gz", b"not gzip", "cannot be read"),
        ("data.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:-12], "cannot be read"),
        ("data.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 40, "cannot be read"),
        ("data.jsonl.zst", b"not zstd", "cannot be read"),
        ("data.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * 1000)[:-2], "cannot be read: .*too early"),
        ("data.parquet", b"PAR1", "cannot be read"),
        ("data.csv", b"text", "unknown kind of file"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        load_corpus([str(path)], 0.3, 4096)


def test_missing_and_empty_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_corpus([str(tmp_path / "nowhere")], 0.3, 4096)
    with pytest.raises(DataError, match="no text in any"):
        load_corpus([str(tmp_path)], 0.3, 4096)


def test_fingerprint_sees_every_change() -> None:
    first = Document("a", "text")
    corpora = [
        Corpus([first]),
        Corpus([], [first]),
        Corpus([first, Document("b", "text")]),
        Corpus([Document("b", "text")]),
        Corpus([Document("a", "texts")]),
    ]
    assert len({corpus.fingerprint() for corpus in corpora}) == len(corpora)
    assert Corpus([first]).fingerprint() == Corpus([Document("a", "text")]).fingerprint()


def write_source(root: Path, name: str, text: str | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def test_python_sources_keep_what_people_wrote(tmp_path: Path) -> None:
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    write_source(library, "json/tool.py", CODE)
    write_source(library, "json/data.txt", CODE)
    write_source(packages, "numbers/core.py", CODE + "# core\n")
    left_out = {
        "numbers/short.py": "import os\n",
        "numbers/huge.py": CODE * 500,
        "numbers/table.py": "TABLE = [\n" + "    1234567, 1234567, 1234567,\n" * 40 + "]\n",
        "numbers/minified.py": CODE + "x = '" + "a" * 400 + "'\n",
        "numbers/foreign.py": CODE + "# жжжжжжжжжжжжжж\n" * 4,
        "numbers/made.py": "# This file was automatically generated.\n" + CODE,
        "numbers/tests/core.py": CODE,
        "numbers/test_core.py": CODE,
        "numbers/latin.py": CODE.encode() + b"# \xe9\n",
    }
    for name, text in left_out.items():
        write_source(packages, name, text)
    found = python_sources([library, packages])
    assert {document.name: document.text for document in found} == {
        "json/tool.py": CODE,
        "numbers/core.py": CODE + "# core\n",
    }


def test_a_package_installed_twice_counts_once(tmp_path: Path) -> None:
    """Two versions of one module in two places have one name, so that they cannot land on both sides of the split."""
    write_source(tmp_path / "one", "numbers/core.py", CODE + "# version 1\n")
    write_source(tmp_path / "two", "numbers/core.py", CODE + "# version 2\n")
    found = python_sources([tmp_path / "one", tmp_path / "two"])
    assert [(document.name, document.text) for document in found] == [("numbers/core.py", CODE + "# version 2\n")]
