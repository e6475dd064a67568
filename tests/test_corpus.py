from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, random_words
from hypothesis import given, settings
from hypothesis import strategies as st

from nnato.corpus import FRACTIONS, PASSAGE, SPLITS, Corpus, python_docs
from nnato.errors import PositionError, TextError


def test_a_hand_count_on_three_documents(tmp_path, tokenizer):
    texts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10", "w20 w21", "w30"]  # with BOS: blocks of 8 and 4; 3; too short
    for number, text in enumerate(texts * 20):
        (tmp_path / f"{number:02}.txt").write_text(text.replace("w1 ", f"w{number} "))
    blocks = Corpus(str(tmp_path), context=8).tokenize(tokenizer)
    lengths = sorted(blocks.index[:, 1].tolist())
    assert lengths == [3] * 20 + [4] * 20 + [8] * 20
    batch = blocks.batch(np.flatnonzero((blocks.index[:, 1] == 4) | (blocks.index[:, 1] == 8))[:1])
    assert batch.ids[0, 0] == tokenizer.bos_token_id
    assert batch.special.tolist() == [[True] + [False] * 7]
    assert sum(blocks.fingerprint["split_tokens"].values()) == sum(lengths)


def test_batches_hold_the_tokens_of_the_text_padded_on_the_right(corpus, tokenizer):
    blocks = corpus.tokenize(tokenizer)
    seen = []
    for rows in blocks.plan(7):
        batch = blocks.batch(rows)
        assert batch.ids.shape == batch.mask.shape == batch.special.shape
        assert torch.equal(batch.mask, batch.mask.sort(dim=1, descending=True).values)
        assert not bool(batch.ids[~batch.mask].any())
        assert torch.equal(batch.special, (batch.ids == tokenizer.bos_token_id) & batch.mask)
        seen += [ids[mask][1:].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    want = []
    for text in corpus.documents():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        want += [ids[start : start + 31] for start in range(0, len(ids), 31)]
    assert sorted(seen) == sorted(piece for piece in want if len(piece) >= 2)


def test_a_batch_is_of_one_split_and_long_blocks_come_first(corpus, tokenizer):
    blocks = corpus.tokenize(tokenizer)
    plan = blocks.plan(4)
    assert sorted(row for rows in plan for row in rows) == list(range(len(blocks.index)))
    for rows in plan:
        assert len(set(blocks.index[rows, 2].tolist())) == 1
        lengths = blocks.index[rows, 1].tolist()
        assert lengths == sorted(lengths, reverse=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_no_document_is_in_two_splits_and_order_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    texts = [random_words(rng, 40) for _ in range(60)]
    texts += texts[:10]  # exact duplicates stay together
    tokenizer = make_tokenizer()

    class Fixed(Corpus):
        def documents(self):
            yield from texts

    def splits():
        index = Fixed(context=16).tokenize(tokenizer).index
        found: dict[int, set[int]] = {}
        for document, split in index[:, [3, 2]].tolist():
            found.setdefault(document, set()).add(split)
        return found

    first = splits()
    assert all(len(split) == 1 for split in first.values())
    assert len(first) == len(set(texts))
    texts.reverse()
    assert splits() == first


def test_shares_of_the_splits(tokenizer):
    rng = np.random.default_rng(0)

    class Fixed(Corpus):
        def documents(self):
            for _ in range(3000):
                yield random_words(rng, 7)

    counts = Fixed(context=8).tokenize(tokenizer).fingerprint["split_tokens"]
    for split, share in zip(SPLITS, FRACTIONS, strict=True):
        assert counts[split] / sum(counts.values()) == pytest.approx(share, abs=0.04)


def test_limits(text, tokenizer):
    some = Corpus(str(text), context=32, tokens=2000, per_document=None).tokenize(tokenizer)
    assert 2000 <= some.index[:, 1].sum() < 2000 + 32
    capped = Corpus(str(text), context=16, per_document=1).tokenize(tokenizer)
    assert len(capped.index) == len(np.unique(capped.index[:, 3])) == 60


def test_fingerprints_follow_the_contents(text, corpus, tokenizer):
    def digest(**changes):
        return Corpus(**{"source": str(text), "context": 32, "per_document": None, **changes}).tokenize(tokenizer).fingerprint["digest"]

    same = corpus.tokenize(tokenizer).fingerprint["digest"]
    assert digest() == same
    assert len({same, digest(context=31), digest(tokens=1500), digest(per_document=1)}) == 4


def test_full_blocks_take_each_document_once_before_any_twice(corpus, tokenizer):
    blocks = corpus.tokenize(tokenizer)
    available = blocks.index[(blocks.index[:, 2] == 2) & (blocks.index[:, 1] == 32)]
    rows = blocks.full_blocks("test", len(available))
    documents = blocks.index[rows, 3].tolist()
    distinct = len(set(documents))
    assert len(set(documents[:distinct])) == distinct
    assert set(blocks.index[rows, 1]) == {32}
    assert set(blocks.index[rows, 2]) == {2}
    with pytest.raises(TextError, match=rf"{len(available) + 1} sequences of 32 tokens were asked for, but the test documents hold"):
        blocks.full_blocks("test", len(available) + 1)


def test_tokenizers_without_bos(text):
    blocks = Corpus(str(text), context=32).tokenize(make_tokenizer(bos=False))
    batch = blocks.batch(blocks.plan(4)[0])
    assert not bool(batch.special.any())


# ---- sources -----------------------------------------------------------------------------------------------------------


def words(n, seed=0):
    return random_words(np.random.default_rng(seed), n)


@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_a_single_file_is_cut_into_passages(tmp_path, separator):
    file = tmp_path / "novel.txt"
    contents = separator.join(words(100, seed) for seed in range(200))
    file.write_text(contents)
    passages = list(Corpus(str(file)).documents())
    assert "".join(passages) == contents
    assert all(PASSAGE <= len(passage) < 2 * PASSAGE + 1000 for passage in passages[:-1])
    assert len(passages) > 5
    if separator == "\n\n":
        assert all(passage.endswith("\n\n") for passage in passages[:-1])


def test_jsonl_folders_and_encodings(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": words(30, i)}) for i in range(3)) + "\n\n")
    assert list(Corpus(str(tmp_path / "a.jsonl"), column="body").documents()) == [words(30, i) for i in range(3)]
    (tmp_path / "b.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "c.txt").write_text("naïve")
    assert list(Corpus(str(tmp_path)).documents()) == ["naïve", "naïve"]


def test_data_sets_stream(tmp_path, tokenizer):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": words(40, i), "n": i}) for i in range(40)))
    corpus = Corpus(f"datasets:{tmp_path}", context=16)
    assert list(corpus.documents()) == [words(40, i) for i in range(40)]
    assert corpus.tokenize(tokenizer).fingerprint["documents"] == 40
    with pytest.raises(TextError, match="has no text in field 'n'"):
        list(Corpus(f"datasets:{tmp_path}", column="n").documents())
    (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text() + "\n{broken")
    with pytest.raises(TextError, match=r"cannot stream the data set .* \(record \d+\)"):
        list(corpus.documents())


def test_the_embedded_text_is_english_and_the_same_each_time():
    documents = list(python_docs())
    assert len(documents) > 100
    assert sum(map(len, documents)) > 500_000
    assert documents == list(python_docs())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.txt", "no text 'no/such/file.txt': not 'python-docs', a .txt or .jsonl file"),
        ("nothing", "no text 'nothing'"),
        ("./a/b", r"no text '\./a/b'"),
        ("nobody/nothing", "cannot stream the data set 'nobody/nothing'"),
    ],
)
def test_unknown_sources_are_refused(source, message):
    with pytest.raises(TextError, match=message):
        list(Corpus(source).documents())


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(TextError, match="holds no .txt file"):
        list(Corpus(str(tmp_path)).documents())
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(TextError, match="line 2, is not JSON in UTF-8"):
        list(Corpus(str(bad)).documents())
    (tmp_path / "latin.jsonl").write_bytes('{"text": "naïve"}'.encode("latin-1"))
    with pytest.raises(TextError, match="line 1, is not JSON in UTF-8"):
        list(Corpus(str(tmp_path / "latin.jsonl")).documents())
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01")
    with pytest.raises(TextError, match="is no text: it holds NUL bytes"):
        list(Corpus(str(tmp_path / "binary.txt")).documents())
    with pytest.raises(TextError, match=r"line 1 has no text in field 'body' \(it has: text\); name it with --column"):
        list(Corpus(str(bad), column="body").documents())


@pytest.mark.parametrize("contents", ["", "w1", "w1 w2 w3 w4 w5 w6 w7 w8 w9"])
def test_too_short_text_is_refused(tmp_path, tokenizer, contents):
    file = tmp_path / "short.txt"
    file.write_text(contents)
    with pytest.raises(TextError, match=r"is too short: \d documents? with \d+ tokens leave nothing for .* give more text"):
        Corpus(str(file), context=8).tokenize(tokenizer)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"context": 7}, PositionError, "context 7: a block needs at least 8 tokens"),
        ({"tokens": 0}, TextError, "tokens 0"),
        ({"per_document": 0}, TextError, "per_document 0"),
    ],
)
def test_bad_settings_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Corpus(**arguments)


def test_a_source_is_seen_to_be_there_without_reading_it(text, tmp_path):
    assert len(list(Corpus(str(text)).open()())) == 60
    Corpus("owner/name").open()  # asks no network
    with pytest.raises(TextError, match="no text 'nosuch/'"):
        Corpus("nosuch/").open()
    with pytest.raises(TextError, match=r"holds no \.txt file"):
        Corpus(str(tmp_path)).open()
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(TextError, match=r"cannot read .*link\.txt: it is gone, or you may not read it"):
        Corpus(str(tmp_path)).open()


def test_how_many_documents_there_are(text, tokenizer, tmp_path):
    """All of a text that is read to its end; else those of a folder, and unknown of what would have to be read for it."""
    documents = sorted(text.glob("*.txt"))
    lines = tmp_path / "text.jsonl"
    lines.write_text("\n".join(json.dumps({"text": one.read_text()}) for one in documents))
    for source, limit, there in ((text, None, 60), (text, 2000, 60), (lines, None, 60), (lines, 2000, None)):
        found = Corpus(str(source), context=32, per_document=None, tokens=limit).tokenize(tokenizer).fingerprint
        assert found["documents_there"] == there
        assert (found["documents"] < 60) == (limit is not None)
