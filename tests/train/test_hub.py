"""Data sets and tokenizers in the hub's formats, from real files; no network, one sentence."""

import itertools
import json

import pytest

pytest.importorskip("datasets", reason="needs datasets: pip install --group train")
pytest.importorskip("transformers", reason="needs transformers: pip install --group train")

from train import data, hub


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """As on a machine without a network, but without the minute of retries."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("LBW_CACHE", str(tmp_path / "cache"))


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows(split, count, column="text"):
    return [{column: f"document {i} of {split}: naïve 🦊", "number": i} for i in range(count)]


def decoded(corpus, split):
    text = corpus.tokenizer.decode(getattr(corpus, split).tolist(), skip_special_tokens=False)
    return text.split(data.END)[:-1]


def test_splits_of_a_data_set_are_used_under_their_names(tmp_path):
    for split, count in (("train", 40), ("validation", 3), ("test", 2)):
        write(tmp_path / "set" / f"{split}.jsonl", rows(split, count))
    corpus = data.load(tmp_path / "set", vocab_size=300)
    named = {"train": ("train", 40), "valid": ("validation", 3), "test": ("test", 2)}
    for split, (name, count) in named.items():
        assert decoded(corpus, split) == [row["text"] for row in rows(name, count)]


def test_where_a_split_is_missing_rows_are_held_out(tmp_path):
    write(tmp_path / "set" / "train.jsonl", rows("train", 60))
    corpus = data.load(tmp_path / "set", vocab_size=300)
    splits = {split: decoded(corpus, split) for split in data.SPLITS}
    everything = itertools.chain.from_iterable(splits.values())
    assert sorted(everything) == sorted(row["text"] for row in rows("train", 60))
    assert len(splits["valid"]) == len(splits["test"]) == 10


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([{"a": "x", "b": "y"}] * 20, "has no column named text: it has a, b"),
        ([{"n": 1}] * 20, "has no column named text: it has n"),
        ([{"text": "  "}] * 20, "the train split of .* holds no text"),
    ],
)
def test_a_data_set_without_text_is_named(tmp_path, lines, sentence):
    write(tmp_path / "set" / "train.jsonl", lines)
    with pytest.raises(data.DataError, match=sentence):
        data.load(tmp_path / "set", vocab_size=300)


ROW = b'{"text": "one two three"}\n' * 20


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("train.jsonl", ROW + b'{"text": "one', "cannot load the data set .*JSON parse error"),
        (
            "train.jsonl",
            ROW + b'{"text": "caf\xe9"}\n',
            r"is not utf-8 \(a row begins b'caf",
        ),
        ("train.jsonl", ROW + b'{"text": 7}\n', "the column text of .* holds what is no text"),
        ("train.jsonl", b"", "cannot load the data set .*: check the name"),
        (
            "train.csv",
            b"text\ncaf\xe9\n",
            "cannot load the data set .*codec can't decode",
        ),
    ],
    ids=["cut off", "latin-1", "a number", "empty", "a table"],
)
def test_a_damaged_data_set_is_named(tmp_path, file, content, sentence):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / file).write_bytes(content)
    with pytest.raises(data.DataError, match=sentence):
        data.load(tmp_path / "set", vocab_size=300)


def test_the_only_column_of_strings_is_taken(tmp_path):
    write(tmp_path / "set" / "train.jsonl", rows("train", 60, column="content"))
    assert len(data.load(tmp_path / "set", vocab_size=300).train) > 0


@pytest.mark.parametrize("name", ["wikitext-103", "someone/something", "a/b:c"])
def test_without_a_network_one_sentence_names_the_data_set(name):
    with pytest.raises(data.DataError, match=f"cannot load the data set {name} .*network, or give"):
        data.load(name, vocab_size=300)


@pytest.mark.parametrize("name", ["nowhere", "no/such/directory", "two words"])
def test_what_is_no_name_at_all_gets_the_names_there_are(name):
    known = r"there is no directory .*standard-library, wikitext-2"
    with pytest.raises(data.DataError, match=known):
        data.load(name, vocab_size=300)


@pytest.fixture
def trained(tmp_path):
    for split in data.SPLITS:
        place = tmp_path / "text" / f"{split}.txt"
        place.parent.mkdir(exist_ok=True)
        place.write_text("one two three, naïve 🦊\n" * 50, encoding="utf-8")
    return data.load(tmp_path / "text", vocab_size=300)


def test_a_saved_tokenizer_gives_the_same_tokens(tmp_path, trained):
    hub.save_tokenizer(trained.tokenizer, trained.end, tmp_path / "model")
    again = data.load(tmp_path / "text", tokenizer=tmp_path / "model")
    assert again.end == trained.end
    for split in data.SPLITS:
        assert getattr(again, split).tolist() == getattr(trained, split).tolist()


def test_transformers_itself_reads_and_decodes_it(tmp_path, trained):
    from transformers import AutoTokenizer

    hub.save_tokenizer(trained.tokenizer, trained.end, tmp_path / "model")
    found = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert found.eos_token == data.END
    assert found("one two")["input_ids"] == trained.tokenizer.encode("one two").ids


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPECIAL = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|pad|>",
    "bos_token": "<s>",
    "additional_special_tokens": ["<|im_start|>"],
}


@pytest.fixture
def chat(tmp_path, trained):
    """A directory with the tokenizer of a chat model."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer.from_str(trained.tokenizer.to_str())
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>", "<s>"])
    whole = PreTrainedTokenizerFast(
        tokenizer_object=raw, **SPECIAL, padding_side="left", model_max_length=4096
    )
    whole.chat_template = TEMPLATE
    whole.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


@pytest.mark.parametrize("over_another", [False, True])
def test_what_a_tokenizer_came_with_is_saved(chat, tmp_path, trained, over_another):
    from transformers import AutoTokenizer

    if over_another:
        hub.save_tokenizer(trained.tokenizer, trained.end, tmp_path / "out")
    corpus = data.load(tmp_path / "text", tokenizer=chat)
    hub.save_tokenizer(corpus.tokenizer, corpus.end, tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(place) for place in (chat, tmp_path / "out"))
    assert after.chat_template == TEMPLATE
    assert after.special_tokens_map == before.special_tokens_map
    assert (after.padding_side, after.model_max_length) == ("left", 4096)
    messages = [{"role": "user", "content": "one two"}]
    texts = [t.apply_chat_template(messages, tokenize=False) for t in (before, after)]
    assert texts == ["<|im_start|>one two<|im_end|>"] * 2
    batches = [t(["one", "one two three"], padding=True)["input_ids"] for t in (before, after)]
    assert batches[0] == batches[1]
    assert batches[0][0][0] == before.pad_token_id


def test_nothing_is_left_of_a_tokenizer_that_is_replaced(chat, tmp_path, trained):
    from transformers import AutoTokenizer

    ready = hub.tokenizer(chat)
    hub.save_tokenizer(ready.tokenizer, ready.end, tmp_path / "out")
    (tmp_path / "out" / "special_tokens_map.json").write_text('{"pad_token": "<|pad|>"}')
    (tmp_path / "out" / "notes.txt").write_text("not ours")
    hub.save_tokenizer(trained.tokenizer, trained.end, tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (found.chat_template, found.eos_token, found.pad_token) == (None, data.END, None)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "notes.txt"}


def test_templates_by_name_go_with_their_tokenizer(chat, tmp_path, trained):
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(chat)
    whole.chat_template = {"default": TEMPLATE, "tools": "{{ 2 }}"}
    whole.save_pretrained(chat)
    ready = hub.tokenizer(chat)
    hub.save_tokenizer(ready.tokenizer, ready.end, tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.chat_template == whole.chat_template
    hub.save_tokenizer(trained.tokenizer, trained.end, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None


@pytest.mark.parametrize("kind", ["truncation", "padding"])
def test_no_text_is_cut_or_filled_up_as_a_models_inputs_are(kind, tmp_path, trained):
    """Some files ask for it; it is kept in what is saved, and used on no text."""
    from tokenizers import Tokenizer

    asking = Tokenizer.from_str(trained.tokenizer.to_str())
    if kind == "truncation":
        asking.enable_truncation(16)
    else:
        asking.enable_padding(length=9000, pad_id=trained.end, pad_token=data.END)
    hub.save_tokenizer(asking, trained.end, tmp_path / "model")
    again = data.load(tmp_path / "text", tokenizer=tmp_path / "model")
    assert again.train.tolist() == trained.train.tolist()
    hub.save_tokenizer(again.tokenizer, again.end, tmp_path / "out")
    found = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert getattr(found, kind) == getattr(asking, kind)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "null"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_damaged_tokenizer_is_named(file, content, chat):
    (chat / file).write_text(content)
    with pytest.raises(data.DataError, match=f"cannot load a tokenizer from {chat} "):
        hub.tokenizer(chat)


def test_a_tokenizer_that_adds_tokens_of_its_own_does_so_only_at_the_end(tmp_path, trained):
    """As Llama's, which puts a token before every text."""
    from tokenizers import Tokenizer, processors

    marking = Tokenizer.from_str(trained.tokenizer.to_str())
    marking.post_processor = processors.TemplateProcessing(
        single=f"{data.END} $A", special_tokens=[(data.END, trained.end)]
    )
    hub.save_tokenizer(marking, trained.end, tmp_path / "model")
    again = data.load(tmp_path / "text", tokenizer=tmp_path / "model")
    assert again.train.tolist() == trained.train.tolist()


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "nowhere"])
def test_a_tokenizer_that_is_not_there_is_named(name):
    sentence = rf"cannot load a tokenizer from {name} .*tokenizer.json"
    with pytest.raises(data.DataError, match=sentence):
        data.load(tokenizer=name)


def test_exactly_one_way_to_tokenise():
    for arguments in ({}, {"vocab_size": 300, "tokenizer": "x"}):
        with pytest.raises(data.DataError, match="give either vocab_size"):
            data.load(**arguments)
