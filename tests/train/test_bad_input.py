"""What a user can get wrong gets one sentence that says what and what to do, and exit code 2."""

import fcntl
import json
import shutil

import numpy as np
import pytest
from flax import nnx

pytest.importorskip("transformers", reason="needs transformers: pip install --group train")
pytest.importorskip("orbax.checkpoint", reason="needs Orbax: pip install 'lbw_optax[rollback]'")

from small_model import SMALL

from train import data, hub, model, pretrain, qwen_lora, rundir, tinyllama_full, weights
from train.options import Options

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small model with its tokenizer, and text."""
    place = tmp_path_factory.mktemp("sound")
    weights.save(model.Decoder(SMALL, rngs=nnx.Rngs(0)), place / "model")
    hub.save_tokenizer(data.train_tokenizer(["some text"], 300), 0, place / "model")
    (place / "text").mkdir()
    for split in data.SPLITS:
        (place / "text" / f"{split}.txt").write_text(f"{split}: some text, " * 300)
    return place


@pytest.fixture
def place(sound, tmp_path, monkeypatch):
    """A copy of it, to be damaged."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("LBW_CACHE", str(sound / "cache"))
    shutil.copytree(sound / "model", tmp_path / "model")
    shutil.copytree(sound / "text", tmp_path / "text")
    return tmp_path


def arguments(place, *more):
    return [
        *("--preset", "tiny", "--model", str(place / "model"), "--data", str(place / "text")),
        *("--out", str(place / "run"), "--steps", "2", "--track", *more),
    ]


def sentence(main, arguments, capsys):
    """What the script says last; it must be all that it says of the error."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors.splitlines()


def truncated(place):
    path = place / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def missing(place):
    (place / "model" / "model.safetensors").unlink()


def no_config(place):
    (place / "model" / "config.json").unlink()


def changed(place, **fields):
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def other_shapes(place):
    changed(place, intermediate_size=96)


def large_tokenizer(place):
    text = "".join(f"word{i} " for i in range(2000))
    hub.save_tokenizer(data.train_tokenizer([text], 400), 0, place / "model")


def no_tokenizer(place):
    for path in (place / "model").glob("tokenizer*"):
        path.unlink()


def no_text(place):
    for path in (place / "text").iterdir():
        path.write_text("\n \n")


def no_directory(place):
    shutil.rmtree(place / "text")


def short_text(place):
    (place / "text" / "train.txt").write_text("short")


def latin_text(place):
    (place / "text" / "train.txt").write_bytes(b"caf\xe9 " * 3000)


def a_file_for_a_directory(place):
    (place / "run").write_text("")


def locked(place):
    (place / "run").mkdir()
    lock = (place / "run" / "lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


@pytest.mark.parametrize("main", [qwen_lora.main, tinyllama_full.main], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, ["model.safetensors is cut off or damaged"]),
        (missing, ["holds no model.safetensors", "save the model as safetensors"]),
        (no_config, ["holds no config.json", "give a directory"]),
        (other_shapes, ["mlp.up_proj.weight has shape (64, 32), but the model needs (96, 32)"]),
        (large_tokenizer, ["has the id 399, but the model embeds ids up to 299"]),
        (no_tokenizer, ["cannot load a tokenizer from", "tokenizer.json"]),
        (no_text, ["the train split of", "holds no text"]),
        (no_directory, ["there is no directory", "give a directory of text files"]),
        (short_text, ["tokens are too few for one sequence of 64"]),
        (latin_text, ["train.txt is not utf-8 (byte 3 is 0xe9)", "--encoding"]),
        (a_file_for_a_directory, ["run cannot be written", "choose another --out"]),
        (locked, ["Another process uses", "pass another directory"]),
    ],
)
def test_damaged_input_is_named(main, damage, said, place, capsys):
    held = damage(place)
    lines = sentence(main, arguments(place), capsys)
    start = next(i for i, line in enumerate(lines) if line.startswith("train."))
    message = "\n".join(lines[start:])
    assert all(part in message for part in said), message
    if held:
        held.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "Qwen/Qwen2.5-7b-Instrukt"], ["Qwen2.5-7B", "near"]),
        (["--model", "nowhere"], ["there is no directory nowhere"]),
        (["--length", "256"], ["256", "max_position_embeddings=128"]),
        (["--batch-size", "12"], ["a batch of 12 sequences cannot be spread over 8 devices"]),
        (["--mesh", "3", "1", "1"], ["data=3", "but there are 8"]),
        (["--mesh", "1", "1", "8"], ["the mesh does not divide these arrays evenly"]),
        (["--microbatches", "3"], ["a batch of 8 sequences cannot be cut into 3 microbatches"]),
        (["--max-distance", "3"], ["max_distance=3 is too small"]),
        (["--data", "nowhere"], ["there is no directory nowhere"]),
        (["--track", "trackio"], ["--track trackio needs trackio: pip install trackio"]),
        (["--targets", "q_prog"], ["q_prog", "q_proj"]),
        (["--qk-clip", "0"], ["--qk-clip 0.0 must be a finite number above 0"]),
        (["--qk-clip", "100"], ["k_proj/lora_A' is an adapter of one: merge the adapters"]),
    ],
)
def test_impossible_options_are_named(given, said, place, capsys):
    message = sentence(qwen_lora.main, [*arguments(place), *given], capsys)[-1]
    assert message.startswith("train.qwen_lora: ")
    assert all(part in message for part in said), message


def test_qk_clip_of_a_model_with_norms_of_queries_and_keys_is_refused(place, capsys):
    changed(place, model_type="qwen3", attention_bias=False, architectures=["Qwen3ForCausalLM"])
    given = arguments(place, "--qk-clip", "100")
    message = sentence(tinyllama_full.main, given, capsys)[-1]
    assert message.startswith("train.tinyllama_full: QK-clip is for attention without norms")


def test_a_run_that_cannot_fit_says_so_before_anything_is_loaded(place, capsys):
    given = ["--preset", "qwen2.5-14b", "--param-dtype", "float32", "--batch-size", "4096"]
    lines = sentence(qwen_lora.main, [*given, "--out", str(place / "run")], capsys)
    assert "14.8 B parameters" in lines[0]
    assert "this run needs about" in lines[-1]
    assert "take more --microbatches" in lines[-1]
    assert not (place / "run").exists()


def test_a_run_goes_on_only_with_its_own_options(place, capsys):
    options = Options("tiny", place / "run", steps=2, seed=1)
    rundir.claim(options, 0)
    message = sentence(pretrain.main, ["--preset", "tiny", "--out", str(place / "run")], capsys)[-1]
    assert "steps is 2 there and 700 here" in message
    assert "seed is 1 there and 0 here" in message
    assert "another --out" in message


def test_a_full_disk_is_named_before_the_first_step(place, capsys, monkeypatch):
    """The size of the disk is the one thing that a test cannot make small."""
    usage = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = sentence(qwen_lora.main, arguments(place), capsys)[-1]
    assert "has room for 1e-06 GB, and the checkpoints of this run need" in message


def test_an_unwritable_run_directory_is_named(place, capsys):
    message = sentence(qwen_lora.main, [*arguments(place), "--out", "/proc/run"], capsys)[-1]
    assert "/proc/run cannot be written" in message
    assert "choose another --out" in message


def test_nan_weights_stop_loudly(place, capsys):
    """The one crash that is nobody's option: a base that is broken from the start."""
    decoder = model.Decoder(SMALL, rngs=nnx.Rngs(0))
    decoder.norm.scale[...] = np.full(32, np.nan, np.float32)
    weights.save(decoder, place / "model")
    given = [*arguments(place), "--steps", "40", "--mesh", "8", "1", "1"]
    assert qwen_lora.main(given) == 3
    assert "The guard" in capsys.readouterr().err.splitlines()[-1]
