"""How much memory loading a model takes: the highest of many looks at a process of its own."""

import dataclasses
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train import files, model, weights

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
CONFIG = model.Config(4096, 1024, 2816, 6, 8, 4, 128, tie_word_embeddings=False)
PROGRAM = """
import sys, threading
import jax
from flax import nnx
from train import weights

def own():
    # Not the pages of the file, which the kernel takes back when it needs them.
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

peak, ended = 0, False

def watch():
    global peak
    while not ended:
        peak = max(peak, own())

def load(place):
    decoder = weights.load(place, param_dtype=sys.argv[2], scan=sys.argv[3] == "scan")
    return jax.block_until_ready(nnx.state(decoder))

kept = load(sys.argv[1] + "/small")  # with whatever else the first load brings along
before, watcher = own(), threading.Thread(target=watch)
watcher.start()
loaded = load(sys.argv[1] + "/large")
ended = True
watcher.join()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
print((peak - before) / size, (own() - before) / size, size)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The same shape twice, in bfloat16: with one layer, and with six."""
    place = tmp_path_factory.mktemp("memory")
    for name, layers in (("small", 1), ("large", CONFIG.num_hidden_layers)):
        config = dataclasses.replace(CONFIG, num_hidden_layers=layers)
        decoder = nnx.eval_shape(
            lambda config=config: model.Decoder(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
        )
        _, shapes, _ = model.split(decoder)
        (place / name).mkdir()
        files.write_json(place / name / "config.json", config.to_hf())
        files.write(place / name / files.MODEL, dict(_ones(shapes)))
    return place


def _ones(shapes):
    for tensor in weights.tensors(shapes):
        yield tensor.name, np.ones(tensor.form.shape, tensor.form.dtype)


@pytest.mark.parametrize(("dtype", "scan"), [("float32", "list"), ("bfloat16", "list")])
def test_loading_stays_under_115_hundredths_of_the_weights(dtype, scan, place):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(place), dtype, scan], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak, left, size = map(float, done.stdout.split())
    assert size > 1.5e8
    assert left > 0.95, left  # so that what is measured is the weights
    assert peak < 1.15
