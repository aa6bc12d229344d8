"""Several processes of one job: the same decision everywhere, one checkpoint, a clean end.

Each process is a real one with a simulated device of its own; they talk through Gloo on 127.0.0.1.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import support

from lbw_optax import RollbackManager

pytestmark = pytest.mark.process

TESTS = Path(__file__).parent.parent

WORKER = """
import datetime, json, os, resource, sys
import jax
rank, count, port, directory, mode, steps = sys.argv[1:7]
rank, count, steps = int(rank), int(count), int(steps)
faults = json.loads(sys.argv[7])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    f"127.0.0.1:{port}", count, rank, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=20
)
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
import lbw_optax
from lbw_optax.rollback import agreement, cadence, pace

mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
def place(x, spec=None):
    if spec is None:
        split = mode == "fsdp" and x.ndim and x.shape[0] % count == 0 and x.size > 8
        spec = P("data") if split else P()
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, NamedSharding(mesh, spec), lambda i: host[i])

tx = lbw_optax.lbw_guard(optax.adamw(0.03))
params = {"b": jnp.zeros((1, 3)), "w": jnp.linspace(-1, 1, 24).reshape(8, 3)}
start = jax.tree.map(place, (params, tx.init(params)))

def update(tree, x, y, own):
    params, state = tree
    loss_of = lambda p: jnp.mean((x @ p["w"] + p["b"] - y) ** 2)
    loss, gradients = jax.value_and_grad(loss_of)(params)
    value = own if "own_loss" in faults else loss
    updates, state = tx.update(gradients, state, params, value=value)
    return optax.apply_updates(params, updates), state
update = jax.jit(update, out_shardings=jax.tree.map(lambda x: x.sharding, start), donate_argnums=0)

def batch(index):
    rng = np.random.default_rng(index)
    x = rng.normal(size=(16, 8)).astype("f")
    y = (x @ np.linspace(-0.5, 2, 24).reshape(8, 3) + 0.3 * rng.normal(size=(16, 3))).astype("f")
    return place(x, P("data")), place(y, P("data"))

def corrupt(tree):
    # In the memory of the last process only: its part of w, or its copy.
    def poison(x):
        local = [np.array(s.data) for s in x.addressable_shards]
        if rank == count - 1:
            local[0].reshape(-1)[0] = np.nan
        parts = [jax.device_put(p, s.device) for p, s in zip(local, x.addressable_shards)]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)
    params, state = tree
    return params | {"w": poison(params["w"])}, state

def bad(x):
    local = [np.array(s.data) for s in x.addressable_shards]
    if rank == count - 1:
        local[0][:] = np.nan
    parts = [jax.device_put(p, s.device) for p, s in zip(local, x.addressable_shards)]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)

options = dict(save_every=8, snapshot_every=4, probation=3, max_distance=20)
class Clock:
    now = 0.0
    def __call__(self):
        self.now += faults["copy_seconds"][rank]
        return self.now

agreement.PATIENCE = faults.get("patience", agreement.PATIENCE)
if "copy_seconds" in faults:  # a clock each, and time to save is up by the last one's only
    options["snapshot_every"] = "measured"
    options["save_every"] = datetime.timedelta(0 if rank == count - 1 else 10**6)
    pace.TIMED, cadence.LEAST_STEPS = 8, 10

class Patient(lbw_optax.RollbackManager):  # steps are short: the disk keeps up with them
    def step(self, step, tree):
        disk = self._candidates._disk
        if disk._write is not None and (self._last or 0) - disk._since_step >= 6:
            try:
                disk._write()
            except Exception:  # the manager says it
                pass
        return super().step(step, tree)

with Patient(directory, **options) as rollback:
    clock = Clock()
    if "copy_seconds" in faults:
        rollback._candidates._pace = pace.Pace(clock)
    step, tree = rollback.resume(start)
    print("from", step, flush=True)
    while step < steps:
        index = rollback.data_step(step)
        clock.now += 1.0
        x, y = batch(index)
        if index in faults.get("batches", []):
            x = bad(x)
        if rank == faults.get("own_loss"):  # each process hands in what it has computed itself
            own = np.float32(3 + index % 2)
        else:
            own = np.float32(1)
        tree = update(tree, x, y, own)
        step += 1
        if "full" in faults and faults["full"][1] == step:
            rollback.save(step, tree)  # nothing is under way any more
        if faults.get("full") == [rank, step]:  # no file of this process may grow from now on
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        if faults.get("room") == [rank, step]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        if faults.get("request") == [rank, step] and not rollback.history:
            rollback.request("the evaluation was wrong")
        if faults.get("save_alone") == [rank, step]:
            rollback.save(step, tree)
        if step == faults.get("corrupt") and not rollback.history:
            tree = corrupt(tree)
        step, tree = rollback.step(step, tree)
        if faults.get("request_after") == [rank, step] and not rollback.history:
            rollback.request("the evaluation was wrong")
        if faults.get("save_after") == [rank, step]:
            rollback.save(step, tree)
        print(step, flush=True)
    if "save" in faults:
        rollback.save(step, tree)
whole = multihost_utils.process_allgather(tree[0], tiled=True)
print(json.dumps({
    "history": [r._asdict() for r in rollback.history],
    "every": rollback.report().snapshot_every,
    "skips": int(lbw_optax.metrics(tree[1])["skips"]),
    "w": np.asarray(whole["w"]).reshape(8, 3).tolist(),
}), flush=True)
"""


def launch(count: int, directory: Path, mode: str, steps: int, **faults) -> list[subprocess.Popen]:
    port = support.free_port()
    arguments = [str(port), str(directory), mode, str(steps), json.dumps(faults)]
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(count), *arguments],
            env=support.environment(JAX_PLATFORMS="cpu"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[list[str]]:
    """What each process printed; all must have ended well."""
    deadline, said = time.monotonic() + timeout, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(1, deadline - time.monotonic()))
            assert process.returncode == 0, err[-3000:]
            said.append([line for line in out.splitlines() if not line.startswith("[Gloo]")])
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return said


def agree(said: list[list[str]]) -> dict:
    """Every process took the same steps and decisions and has the same parameters."""
    assert all(lines == said[0] for lines in said[1:])
    return json.loads(said[0][-1])


def check_agreement(directory: Path, count: int, mode: str) -> None:
    """A corrupted shard and a bad batch, on one process only."""
    faults = {"corrupt": 30, "batches": [14]}
    ended = agree(finish(launch(count, directory, mode, 45, **faults)))
    (rollback,) = ended["history"]
    assert rollback["reason"] in ("parameters", "inner_state")
    assert rollback["from_step"] <= 36
    assert ended["skips"] >= 1
    assert np.isfinite(ended["w"]).all()


@pytest.mark.parametrize("mode", ["fsdp", *support.slowly("data")])
def test_two_processes_agree(tmp_path, mode):
    check_agreement(tmp_path, 2, mode)


def test_one_process_asks_for_all(tmp_path):
    ended = agree(finish(launch(2, tmp_path, "data", 30, request=[1, 22])))
    (rollback,) = ended["history"]
    assert (rollback["from_step"], rollback["reason"]) == (23, "the evaluation was wrong")


def test_clocks_of_their_own_lead_to_one_cadence(tmp_path):
    """The slowest copies decide in memory, and whoever's time is up on disk."""
    ended = agree(finish(launch(2, tmp_path, "data", 34, copy_seconds=[0.011, 0.045])))
    assert ended["every"] == 5
    journal = json.loads((tmp_path / "journal.json").read_text())
    assert max(int(step) for step in journal["checkpoints"]) >= 20


# --- what one process finds out alone ----------------------------------------------------------


def end(processes: list[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str, str]]:
    """How each ended, what it printed and what it complained of."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, said, strict=True)]


def test_a_taken_directory_is_an_error_on_all(tmp_path):
    with RollbackManager(tmp_path):
        ends = end(launch(2, tmp_path, "data", 30))
    for code, _, error in ends:
        assert code == 1
        assert f"Another process uses {tmp_path} for its checkpoints" in error


def test_a_directory_that_cannot_be_made_is_an_error_on_all(tmp_path):
    (tmp_path / "run").write_text("a file")
    for code, _, error in end(launch(2, tmp_path / "run", "data", 30)):
        assert code == 1
        assert "run (Not a directory): pass a directory that this user may write to" in error


@pytest.mark.parametrize("rank", [0, *support.slowly(1)])
def test_a_process_without_room_for_a_while(tmp_path, rank):
    """All warn, none waits for another, and when there is room again they save."""
    faults = {"full": [rank, 12], "room": [rank, 28], "save": 1}
    ends = end(launch(2, tmp_path, "fsdp", 45, **faults))
    for code, out, error in ends:
        assert code == 0, error[-3000:]
        assert "could not be written" in error
        assert "45" in out.splitlines()
    journal = json.loads((tmp_path / "journal.json").read_text())
    assert max(journal["checkpoints"], key=int) == "45"
    assert (tmp_path / "checkpoints" / "45").is_dir()


@pytest.mark.parametrize(
    "calls",
    [
        {"save_alone": [0, 12], "save_after": [1, 20]},
        # The last step has no training step after it that the others could wait in.
        *support.slowly({"save_after": [0, 26], "request_after": [1, 14]}),
    ],
)
def test_a_process_that_saves_alone_is_told_and_the_run_goes_on(tmp_path, calls):
    """Before `step`, after it, and after the last: none waits for ever, and all end well."""
    ends = end(launch(2, tmp_path, "data", 26, patience=1.0, **calls))
    alone = [rank for rank, _ in (calls[name] for name in calls if name.startswith("save"))]
    for rank, (code, out, error) in enumerate(ends):
        assert code == 0, error[-3000:]
        assert json.loads(out.splitlines()[-1])["w"] == json.loads(ends[0][1].splitlines()[-1])["w"]
        told = "save was called on some processes only" in error
        assert told == (rank in alone or len(alone) == 2)
    history = json.loads(ends[0][1].splitlines()[-1])["history"]
    asked = ["the evaluation was wrong"] if "request_after" in calls else []
    assert [r["reason"] for r in history] == asked


@pytest.mark.parametrize("rank", [1, *support.slowly(0)])
def test_a_loss_of_its_own_on_each_process_is_told(tmp_path, rank):
    ends = end(launch(2, tmp_path, "data", 10**6, own_loss=rank))
    for code, out, error in ends:
        assert code != 0
        assert len(out.splitlines()) < 10
        assert "Pass the same to all of them, as value=jax.lax.pmean(loss, axis_name)" in error


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["data", "fsdp"])
def test_four_processes_agree(tmp_path, mode):
    check_agreement(tmp_path, 4, mode)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_killing_one_ends_the_job_and_it_can_be_resumed(tmp_path, count):
    """The others end with an error that says so; checkpoint and history can be resumed."""
    processes = launch(count, tmp_path, "fsdp", 10**6, corrupt=16)
    try:
        for process in processes:
            while process.stdout.readline() != "24\n":
                assert process.poll() is None, process.stderr.read()[-3000:]
        processes[-1].kill()
        for process in processes[:-1]:
            _, error = process.communicate(timeout=120)
            assert process.returncode != 0
            assert "Gloo" in error or "coordination" in error.lower(), error[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    said = finish(launch(count, tmp_path, "fsdp", 40))
    assert int(said[0][0].removeprefix("from ")) >= 8
    ended = agree(said)
    assert [rollback["reason"] for rollback in ended["history"]] == ["parameters"]
    assert np.isfinite(ended["w"]).all()
