"""Corpora, tokens and the sampler; bad input gets one sentence that says what to do."""

import json
import subprocess
import sys

import numpy as np
import pytest

from train import corpora, data
from train.model import IGNORED

TEXT = "The quick brown fox jumps over the lazy dog. Ünïcödé 🦊!\n" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LBW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def directory(tmp_path):
    place = tmp_path / "text"
    place.mkdir()
    for number, split in enumerate(data.SPLITS):
        (place / f"{split}.txt").write_text(f"{number} {split}: {TEXT}", encoding="utf-8")
    return place


def test_a_batch_is_a_function_of_seed_and_step():
    tokens = np.arange(1000, dtype=np.int32)

    def draw(seed, step):
        return data.sample(tokens, seed, step, batch_size=4, length=9).tolist()

    forth = [draw(seed, step) for seed in range(3) for step in range(5)]
    back = [draw(seed, step) for seed in reversed(range(3)) for step in reversed(range(5))]
    assert forth == back[::-1]
    assert len({json.dumps(batch) for batch in forth}) == 15


@pytest.mark.parametrize("size", [10, 11, 500])
def test_samples_are_runs_of_the_text_and_reach_both_ends(size):
    tokens = np.arange(size, dtype=np.int32) + 7
    drawn = np.concatenate(
        [data.sample(tokens, 0, step, batch_size=64, length=9) for step in range(200)]
    )
    assert drawn.dtype == np.int32
    assert drawn.shape[1] == 10
    assert np.all(np.diff(drawn) == 1)
    assert (drawn.min(), drawn.max()) == (7, size + 6)


@pytest.mark.parametrize("limit", [None, 1, 12, 13])
@pytest.mark.parametrize("size", [2, 12, 13, 14, 49])
def test_windows_predict_every_token_once(size, limit):
    tokens = np.arange(size)
    cut = data.windows(tokens, batch_size=3, length=4, limit=limit)
    assert cut.shape[1:] == (3, 5)
    targets = cut[..., 1:][cut[..., 1:] != IGNORED]
    assert targets.tolist() == list(range(1, size))[:limit]
    before = cut[..., :-1][cut[..., 1:] != IGNORED]
    assert before.tolist() == [target - 1 for target in targets]


def test_standard_library_is_read_the_same_twice_and_its_splits_are_disjoint():
    once, again = data.standard_library(), data.standard_library()
    assert once == again
    splits = [set(once[split]) for split in data.SPLITS]
    assert len(set.union(*splits)) == sum(len(once[split]) for split in data.SPLITS)
    sizes = [sum(map(len, texts)) for texts in splits]
    assert 0.8 * corpora.STANDARD_LIBRARY_BYTES < sum(sizes) <= corpora.STANDARD_LIBRARY_BYTES
    assert min(sizes) > 0.05 * sum(sizes)


def test_tokens_decode_to_the_text(directory):
    corpus = data.load(directory, vocab_size=300)
    for split in data.SPLITS:
        tokens = getattr(corpus, split)
        assert tokens.dtype == np.int32
        assert tokens.max() < 300
        assert tokens[-1] == corpus.tokenizer.token_to_id(data.END) == 0
        text = (directory / f"{split}.txt").read_text(encoding="utf-8")
        assert corpus.tokenizer.decode(tokens.tolist()) == text


def test_long_documents_are_encoded_without_loss():
    text = TEXT * 40
    assert len(list(data._chunks(text))) > 1
    tokenizer = data.train_tokenizer([TEXT], 300)
    assert tokenizer.decode(data.encode(tokenizer, [text]).tolist()) == text


def test_the_tokenizer_learns_from_train_alone(directory):
    learned = data.load(directory, vocab_size=300).tokenizer.to_str()
    (directory / "test.txt").write_text("zzzzzz " * 1000)
    assert data.load(directory, vocab_size=300).tokenizer.to_str() == learned


def test_cached_tokens_are_those_of_the_first_time(directory, cache):
    first = [np.array(getattr(data.load(directory, vocab_size=300), s)) for s in data.SPLITS]
    (entry,) = cache.iterdir()
    written = (entry / "train.npy").stat().st_mtime_ns
    again = data.load(directory, vocab_size=300)
    for split, tokens in zip(data.SPLITS, first, strict=True):
        np.testing.assert_array_equal(getattr(again, split), tokens)
    assert (entry / "train.npy").stat().st_mtime_ns == written
    (directory / "valid.txt").write_text("another text")
    data.load(directory, vocab_size=300)
    assert len(list(cache.iterdir())) == 2


def test_a_new_tokenisation_is_bitwise_the_old_one(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("LBW_CACHE", str(tmp_path / "one"))
    data.load(directory, vocab_size=400)
    monkeypatch.setenv("LBW_CACHE", str(tmp_path / "two"))
    data.load(directory, vocab_size=400)
    files = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in tree if path.is_file()}
        for name in ("one", "two")
        for tree in [sorted((tmp_path / name).rglob("*"))]
    ]
    assert len(files[0]) == 4
    assert files[0] == files[1]


def test_two_processes_may_tokenise_at_once(directory, cache):
    program = (
        "import sys; from train import data; c = data.load(sys.argv[1], vocab_size=300);"
        "print(int(c.train.sum()), int(c.test.sum()))"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(directory)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    corpus = data.load(directory, vocab_size=300)
    assert outputs == [f"{corpus.train.sum()} {corpus.test.sum()}\n"] * 2
    assert len(list(cache.iterdir())) == 1


def test_of_any_text_files_whole_ones_are_held_out(tmp_path):
    for number in range(25):
        (tmp_path / f"{number:02}.txt").write_bytes(b"\xff not UTF-8: %d" % number)
    texts = data.text_directory(tmp_path, "latin-1")
    assert {split: len(texts[split]) for split in data.SPLITS} == {
        "train": 21,
        "valid": 2,
        "test": 2,
    }
    assert len({text for split in texts.values() for text in split}) == 25


def empty(place):
    (place / "valid.txt").write_text("")


def lacking(place):
    (place / "valid.txt").unlink()


def gone(place):
    for path in place.iterdir():
        path.unlink()
    place.rmdir()


def two_files(place):
    gone(place)
    place.mkdir()
    for name in "ab":
        (place / f"{name}.txt").write_text("some text")


def a_file(place):
    gone(place)
    place.write_text("some text")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (empty, "the valid split .* holds no text"),
        (lacking, "lacks valid.txt: give all three"),
        (gone, "there is no directory .*: give one"),
        (a_file, "there is no directory .*: give one"),
        (two_files, r"holds 2 \*.txt files: give train.txt"),
    ],
)
def test_unusable_directories_are_named(directory, damage, sentence):
    damage(directory)
    with pytest.raises(data.DataError, match=sentence) as raised:
        data.load(directory, vocab_size=300)
    assert str(directory) in str(raised.value)


def test_the_mark_before_a_text_is_no_part_of_it(tmp_path):
    for split in data.SPLITS:
        (tmp_path / f"{split}.txt").write_text(f"{split} text", encoding="utf-8-sig")
    assert data.text_directory(tmp_path)["train"] == ["train text"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_text_in_another_encoding_is_read_with_its_name_and_named_without(tmp_path, encoding):
    text = "Käse für 3 Café\n" * 50
    for split in data.SPLITS:
        (tmp_path / f"{split}.txt").write_bytes(f"{split} {text}".encode(encoding))
    assert data.text_directory(tmp_path, encoding)["train"] == [f"train {text}"]
    first = (tmp_path / "train.txt").read_bytes()
    with pytest.raises(UnicodeDecodeError) as reference:
        first.decode()
    at = reference.value.start
    expected = rf"train.txt is not utf-8 \(byte {at} is 0x{first[at]:02x}\): give its --encoding"
    with pytest.raises(data.DataError, match=expected):
        data.text_directory(tmp_path)


def test_a_cache_that_cannot_be_made_is_named(directory, cache):
    cache.write_text("a file where the cache should be")
    with pytest.raises(data.DataError, match="set LBW_CACHE") as raised:
        data.load(directory, vocab_size=300)
    assert str(cache) in str(raised.value)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: data.load(vocab_size=256), "vocab_size=256"),
        (
            lambda: data.sample(np.arange(9), 0, 0, batch_size=1, length=9),
            "9 tokens are too few for one sequence of 9",
        ),
        (lambda: data.windows(np.arange(1), batch_size=1, length=9), "1 tokens hold no target"),
    ],
)
def test_too_little_is_named(call, sentence):
    with pytest.raises(data.DataError, match=sentence):
        call()
