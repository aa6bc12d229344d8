"""After a kill: real processes, real files, and every way in which a checkpoint can be damaged."""

import contextlib
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp
from rollback_loop import QUICK, Patient, batch, nan_parameter, plain, run, start, update
from support import assert_same_bits, slowly

from lbw_optax import AuditLog, RollbackManager, lbw_guard
from lbw_optax.rollback import snapshots

TESTS = Path(__file__).parent.parent

# When one read of a damaged checkpoint fails, Orbax leaves the others to end after their event
# loop has: Python says so when it collects them, and it does that in this module.
pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _collected_here():
    yield
    gc.collect()


def child(code: str, *arguments, **options) -> subprocess.Popen:
    """A real process; it prints "ready" when the test may act."""
    environment = os.environ | {"PYTHONPATH": str(TESTS), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def newest(directory: Path) -> int:
    return max(int(path.name) for path in directory.glob("checkpoints/*") if path.name.isdecimal())


def resume(directory: Path):
    with RollbackManager(directory, **QUICK) as rollback:
        return rollback.resume(start())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run of 40 steps; copied by whoever damages it."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    run(directory, 40)
    return directory


@pytest.fixture
def directory(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- going on ----------------------------------------------------------------------------------


def test_an_empty_directory_starts_at_zero(tmp_path):
    tree = start()
    with RollbackManager(tmp_path / "new" / "deep") as rollback:
        step, same = rollback.resume(tree)
    assert step == 0
    assert same is tree


def test_a_resumed_run_is_the_uninterrupted_run(directory):
    """To the bit: parameters, moments, the guard's statistics and its events."""
    step = newest(directory)
    tree, _, used = run(directory, 70)
    assert_same_bits(tree, plain(70))
    assert used == list(range(step, 70))


def test_a_resumed_run_with_rollbacks_is_the_uninterrupted_run(tmp_path):
    """Data position, ceiling and history come back too."""
    whole, manager, _ = run(tmp_path / "whole", 90, {30: nan_parameter})
    run(tmp_path / "parts", 62, {30: nan_parameter})
    tree, resumed, _ = run(tmp_path / "parts", 90)
    assert_same_bits(tree, whole)
    assert resumed.history == manager.history
    assert len(resumed.history) == 1
    assert [resumed.data_step(s) for s in range(90)] == [manager.data_step(s) for s in range(90)]


def test_what_is_saved_by_hand_is_where_it_goes_on(tmp_path):
    """Step 11 is between two checkpoints of its own."""
    with Patient(tmp_path, **QUICK) as rollback:
        step, tree = rollback.resume(start())
        while step < 11:
            tree = update(tree, batch(rollback.data_step(step)))
            step, tree = rollback.step(step + 1, tree)
        rollback.save(step, tree)
        rollback.save(step, tree)  # the second time there is nothing to do
    with RollbackManager(tmp_path, **QUICK) as rollback:
        resumed, found = rollback.resume(start())
    assert resumed == 11
    assert_same_bits(found, tree)


@pytest.mark.parametrize("every", [15, *slowly(4)])
def test_saves_by_hand_prove_themselves_and_do_not_pile_up(tmp_path, every):
    """Also when they come before the one before has proven healthy, after six steps."""
    with Patient(tmp_path, snapshot_every=None, probation=6) as rollback:
        step, tree = rollback.resume(start())
        while step < 60:
            tree = update(tree, batch(rollback.data_step(step)))
            step, tree = rollback.step(step + 1, tree)
            if step % every == 0:
                rollback.save(step, tree)
                rollback.save(step, tree)
                assert newest(tmp_path) == step
        assert len(list(tmp_path.glob("checkpoints/*"))) <= 5
        rollback.request("to see where it goes")
        step, _ = rollback.step(step + 1, update(tree, batch(step)))
    assert step == {4: 52, 15: 45}[every]


def test_the_audit_log_goes_on(tmp_path):
    """Resumed behind what it has written: no line twice, none missing."""
    bad = {i: (batch(0)[0] * np.float32("nan"), batch(0)[1]) for i in (12, 35)}

    def train(steps):
        with AuditLog(tmp_path / "audit.jsonl") as audit:
            record = lambda rollback, step, tree: audit.record(step, tree[1])  # noqa: E731
            run(tmp_path / "run", steps, bad_batches=bad, on_step=record)

    train(34)
    train(60)
    lines = [json.loads(x) for x in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(len(lines)))
    assert [line["step"] for line in lines if line["action"] == "skip"] == [12, 35]


def test_the_budget_counts_calls_over_restarts(tmp_path):
    """One rollback in a session of 1100 calls, and one in the next: never two in a thousand."""
    options = {"max_rollbacks": 1, "save_every": 200, "max_distance": 400, "snapshot_every": None}
    for session, calls in enumerate((1100, 40)):
        with Patient(tmp_path, **(QUICK | options)) as rollback:
            step, tree = rollback.resume(start())
            for call in range(calls):
                if call == 20:
                    rollback.request("by hand")
                step, tree = rollback.step(step + 1, update(tree, batch(step % 7)))
        assert len(rollback.history) == session + 1


def test_calls_since_the_last_checkpoint_are_counted_on_close(tmp_path):
    for session in range(2):
        with RollbackManager(tmp_path) as rollback:
            step, tree = rollback.resume(start())
            for _ in range(30):
                step, tree = rollback.step(step + 1, update(tree, batch(step)))
            rollback.request("by hand")
            for _ in range(6):
                step, tree = rollback.step(step + 1, update(tree, batch(step)))
        assert rollback.history[-1].at_call == 31 + 36 * session


@pytest.mark.parametrize("resumed", [False, True])
def test_another_state_for_a_step_that_is_written_is_not_lost_in_silence(tmp_path, resumed):
    with RollbackManager(tmp_path, **QUICK) as rollback:
        step, tree = rollback.resume(start())
        step, tree = rollback.step(1, update(tree, batch(0)))
        rollback.save(step, tree)
        if resumed:
            rollback.close()
            rollback = RollbackManager(tmp_path, **QUICK)
            step, tree = rollback.resume(tree)
        rollback.save(step, tree)
        other = {**tree[0], "b": tree[0]["b"] + 1}, tree[1]
        with pytest.warns(RuntimeWarning, match="step 1 in .* is of another state .* not saved"):
            rollback.save(step, other)
        rollback.close()
    assert_same_bits(resume(tmp_path)[1], tree)


def test_an_occupied_directory_must_be_resumed(directory):
    with (
        RollbackManager(directory, **QUICK) as rollback,
        pytest.raises(ValueError, match=r"holds checkpoints up to step 40.*resume\(tree\)"),
    ):
        rollback.step(1, start())


# --- damage ------------------------------------------------------------------------------------


def files_of(directory: Path, step: int) -> list[Path]:
    return sorted(p for p in (directory / "checkpoints" / str(step)).rglob("*") if p.is_file())


def resume_and_listen(directory: Path):
    """Step and state, and all that the user was told."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step, tree = resume(directory)
    return step, tree, "; ".join(str(warning.message) for warning in caught)


@pytest.mark.parametrize("damage", ["truncated", *slowly("missing", "empty")])
def test_every_file_of_a_checkpoint_may_be_damaged(directory, damage):
    step = newest(directory)
    whole = directory / "checkpoints" / str(step)
    copy = directory.parent / "copy"
    shutil.copytree(directory, copy)
    fell_back = 0
    for file in files_of(directory, step):
        if damage == "missing":
            file.unlink()
        else:
            size = file.stat().st_size
            os.truncate(file, size // 2 if damage == "truncated" else 0)
        found, tree, said = resume_and_listen(directory)
        fell_back += found < step
        assert_same_bits(tree, plain(found))
        assert f"step {step}: " in said or found == step
        shutil.rmtree(directory)
        shutil.copytree(copy, directory)
    assert whole.exists()
    assert fell_back >= 3


def _flip(file: Path, position: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def flips_of(directory: Path, step: int, count: int, seed: int):
    """Single bits, spread at random over all bytes of a checkpoint."""
    files = [file for file in files_of(directory, step) if file.stat().st_size]
    sizes = np.cumsum([file.stat().st_size for file in files])
    for position in np.random.default_rng(seed).choice(sizes[-1], count, replace=False):
        at = int(np.searchsorted(sizes, position, side="right"))
        yield files[at], int(position - (sizes[at - 1] if at else 0)), int(position) % 8


def assert_flips_are_harmless(directory: Path, count: int, seed: int) -> int:
    step, expected, fell_back = newest(directory), {}, 0
    copy = directory.parent / "copy"
    shutil.copytree(directory, copy)
    for file, position, bit in flips_of(directory, step, count, seed):
        _flip(file, position, bit)
        found, tree, said = resume_and_listen(directory)
        fell_back += found < step
        assert f"step {step}: " in said or found == step
        if found not in expected:
            expected[found] = plain(found)
        assert_same_bits(tree, expected[found])
        shutil.rmtree(directory)
        shutil.copytree(copy, directory)
    return fell_back


def test_a_flipped_bit_is_never_loaded(directory):
    """The state is right or older, and most bits of a file matter."""
    assert assert_flips_are_harmless(directory, 24, seed=0) >= 12


@pytest.mark.slow
def test_many_flipped_bits(directory):
    assert assert_flips_are_harmless(directory, 1500, seed=1) >= 750


@pytest.mark.parametrize("killed", [False, True])
def test_a_checkpoint_that_is_gone(directory, killed):
    for step in (40, 32):  # a candidate, whose save a kill may have cut short, and a good one
        shutil.rmtree(directory / "checkpoints" / str(step))
    if killed:
        for tries in range(2):
            (directory / "checkpoints" / f"40.orbax-checkpoint-tmp-{tries}").mkdir()
    step, tree, said = resume_and_listen(directory)
    assert step == 24
    assert "Resumed from step 24 " in said
    assert "step 32: " in said
    assert ("step 40: its folder is gone" in said) is not killed
    assert not list(directory.glob("checkpoints/*tmp*"))
    assert_same_bits(tree, plain(24))


def test_nothing_can_be_read(directory):
    shutil.rmtree(directory / "checkpoints")
    with pytest.raises(ValueError, match=r"No checkpoint in .* can be read \(step 40: .*anew"):
        resume(directory)


def test_a_damaged_journal(directory):
    journal, before = directory / "journal.json", directory / "journal.before.json"
    journal.write_text(journal.read_text()[:-20])
    with pytest.warns(RuntimeWarning, match=r"journal\.json is damaged .* the one before it"):
        step, tree = resume(directory)
    assert_same_bits(tree, plain(step))
    for file in (journal, before):
        file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=r"journal\.json is damaged .* and so is the copy"):
        RollbackManager(directory, **QUICK)


def test_a_damaged_checkpoint_is_passed_over_by_a_rollback(tmp_path):
    """The disk tier alone; its newest target is cut while the run goes on."""

    def damage(rollback, step, tree):
        if step == 30 and not rollback.history:
            target = max(s for s, _ in rollback._candidates.proven())
            for file in files_of(tmp_path, target):
                os.truncate(file, file.stat().st_size // 2)
            rollback.request("test")

    options = {"snapshot_every": None, "max_distance": 40}
    with pytest.warns(RuntimeWarning, match="is passed over"):
        tree, rollback, _ = run(tmp_path, 40, on_step=damage, **options)
    (event,) = rollback.history
    assert event.from_step - event.to_step > 8
    assert np.isfinite(np.asarray(tree[0]["w"])).all()


def describe(directory: Path, change) -> None:
    """Write the newest checkpoint's own metadata anew: which scalars each of its vectors holds."""
    file = directory / "checkpoints" / str(newest(directory)) / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    names = content["custom_metadata"]["scalars"]
    change(content, names, names["scalars of float32"])
    file.write_text(json.dumps(content))


UNNAMED, SUMS = "Error in its description", "its checksums do not match"
METADATA = {
    "none": (lambda content, names, floats: content.update(custom_metadata=None), UNNAMED),
    "without_names": (lambda content, names, floats: content["custom_metadata"].clear(), UNNAMED),
    "without_a_vector": (lambda content, names, floats: names.pop("scalars of int32"), UNNAMED),
    "another_vector": (lambda content, names, floats: names.update(scalars=floats), UNNAMED),
    "no_list": (lambda content, names, floats: names.update({"scalars of int32": 3}), UNNAMED),
    "a_name_less": (lambda content, names, floats: floats.pop(), UNNAMED),
    "a_name_more": (lambda content, names, floats: floats.append("00001 x"), UNNAMED),
    "another_order": (lambda content, names, floats: floats.insert(0, floats.pop()), SUMS),
    "another_name": (lambda content, names, floats: floats.__setitem__(0, "00001 x"), "model"),
}


@pytest.mark.parametrize(("change", "why"), METADATA.values(), ids=METADATA)
def test_names_of_scalars_that_are_wrong_are_found(directory, change, why):
    describe(directory, change)
    step, tree, said = resume_and_listen(directory)
    assert step == 32
    assert re.search(f"step 40: .*{why}", said)
    assert_same_bits(tree, plain(32))


def test_another_model(directory):
    params, state = start()
    state = state._replace(guard_steps=state.guard_steps[None], mode=jnp.float32(0))
    tree = {"w": jnp.ones((5, 3)), "extra": params["b"], "one": jnp.float32(1)}, state
    with (
        RollbackManager(directory, **QUICK) as rollback,
        pytest.raises(ValueError, match="of another model or optimizer") as error,
    ):
        rollback.resume(tree)
    assert "0.w: float32[4, 3] in the checkpoint, float32[5, 3] here" in str(error.value)
    assert "0.extra: absent in the checkpoint, float32[1, 3] here" in str(error.value)
    assert "0.b: float32[1, 3] in the checkpoint, absent here" in str(error.value)
    assert "0.one: absent in the checkpoint, float32[] here" in str(error.value)
    assert "1.guard_steps: int32[] in the checkpoint, int32[1] here" in str(error.value)
    assert "1.mode: int32[] in the checkpoint, float32[] here" in str(error.value)


@pytest.mark.parametrize(
    ("groups", "said"),
    [(lambda path: path, "none in the checkpoint and 2 here"), (None, "2 .* and none here")],
)
def test_other_groups_that_may_be_frozen(tmp_path, groups, said):
    params, _ = start()

    def tree(groups):
        return params, lbw_guard(optax.sgd(0.1), groups=groups, max_frozen=0.5).init(params)

    with RollbackManager(tmp_path, **QUICK) as rollback:
        rollback.resume(tree(None if groups else lambda path: path))
    with (
        RollbackManager(tmp_path, **QUICK) as rollback,
        pytest.raises(ValueError, match=rf"only the groups .* {said}: pass the same groups="),
    ):
        rollback.resume(tree(groups))


# --- what is not ours --------------------------------------------------------------------------


def lose_the_journal(directory: Path) -> None:
    for name in ("journal.json", "journal.before.json"):
        (directory / name).unlink()


def empty_the_journal(directory: Path) -> None:
    for name in ("journal.json", "journal.before.json"):
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(content | {"checkpoints": {}}))


def steps_in(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("checkpoints/*")}


@pytest.mark.parametrize("lose", [lose_the_journal, empty_the_journal])
def test_checkpoints_without_a_journal_are_adopted(directory, lose):
    """The newest that is whole is gone on from, and none is deleted."""
    before = steps_in(directory)
    lose(directory)
    with pytest.warns(RuntimeWarning, match=r"no journal: the run goes on from .* step 40 that"):
        step, tree = resume(directory)
    assert step == 40
    assert_same_bits(tree, plain(40))
    assert steps_in(directory) == before
    tree, _, used = run(directory, 70)  # and now there is one
    assert_same_bits(tree, plain(70))
    assert used[0] == 40


def test_where_an_older_journal_names_what_is_gone_the_others_are_used(directory):
    """As where the small file came out of a backup."""
    before = steps_in(directory)
    for name in ("journal.json", "journal.before.json"):
        content = json.loads((directory / name).read_text())
        older = content | {"checkpoints": {"8": "good", "12": "candidate"}}
        (directory / name).write_text(json.dumps(older))
    with pytest.warns(RuntimeWarning, match=r"names none that can be read: .* step 40 that"):
        step, tree = resume(directory)
    assert step == 40
    assert_same_bits(tree, plain(40))
    assert steps_in(directory) == before


def test_where_an_older_journal_names_what_still_lies_there_the_others_are_told_of(directory):
    before = steps_in(directory)
    oldest, *newer = sorted(before, key=int)
    for name in ("journal.json", "journal.before.json"):
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(content | {"checkpoints": {oldest: "good"}}))
    with pytest.warns(RuntimeWarning, match=rf"does not name \({', '.join(newer)}\).*passed over"):
        step, tree = resume(directory)
    assert step == int(oldest)
    assert_same_bits(tree, plain(step))
    assert steps_in(directory) == before


@pytest.mark.parametrize("make", ["link", "file"])
def test_what_has_taken_the_place_of_a_checkpoint_is_left(directory, make):
    path, elsewhere = directory / "checkpoints" / "24", directory / "elsewhere"
    shutil.move(path, elsewhere)
    if make == "link":
        path.symlink_to(elsewhere)
    else:
        path.write_text("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        tree, _, _ = run(directory, 80)
    assert_same_bits(tree, plain(80))
    assert path.exists()
    assert any(elsewhere.iterdir())
    assert "24" not in json.loads((directory / "journal.json").read_text())["checkpoints"]


def test_a_file_where_a_folder_is_to_be_made(tmp_path):
    """One sentence, and nothing of Orbax's that nobody awaits."""
    (tmp_path / "arrivals").write_text("mine")

    def go():
        run(tmp_path, 24, {20: nan_parameter})
        gc.collect()

    with pytest.warns(RuntimeWarning) as said:
        go()
    (sentence,) = {str(w.message) for w in said}
    assert "could not be written to" in sentence
    assert (tmp_path / "arrivals").read_text() == "mine"


def test_a_damaged_one_is_not_adopted(directory):
    lose_the_journal(directory)
    for file in files_of(directory, 40):
        os.truncate(file, file.stat().st_size // 2)
    before = steps_in(directory)
    step, tree, said = resume_and_listen(directory)
    assert step == 32
    assert "step 40: " in said
    assert_same_bits(tree, plain(32))
    assert steps_in(directory) == before


def test_an_older_one_under_a_newer_name_is_not_adopted(directory):
    shutil.copytree(directory / "checkpoints" / "24", directory / "checkpoints" / "1234")
    lose_the_journal(directory)
    step, tree, said = resume_and_listen(directory)
    assert step == 40
    assert "step 1234: it is a copy of step 24" in said
    assert_same_bits(tree, plain(40))
    assert "1234" in steps_in(directory)


def test_what_cannot_be_adopted_is_refused_and_left(tmp_path):
    (tmp_path / "checkpoints" / "25").mkdir(parents=True)
    (tmp_path / "checkpoints" / "25" / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"No checkpoint in .* can be read \(step 25: .*anew"):
        resume(tmp_path)
    with RollbackManager(tmp_path) as rollback, pytest.raises(ValueError, match="up to step 25"):
        rollback.step(1, start())
    assert (tmp_path / "checkpoints" / "25" / "notes").read_text() == "mine"


FOREIGN = ["1234", "00099", "my_tmp_notes", "\u0663", "40.bak", "tmp", "-7", "48"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_is_not_ours_is_left(directory, name):
    """Also when a checkpoint is to be written under its name: then it gets another."""
    foreign = directory / "checkpoints" / name
    foreign.mkdir()
    (foreign / "notes").write_text("mine")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tree, _, used = run(directory, 80)
    said = [str(w.message) for w in caught if w.category is RuntimeWarning]
    kept = foreign if name != "48" else directory / "checkpoints" / "48.kept0"
    assert (kept / "notes").read_text() == "mine"
    assert bool(said) == (name == "48")
    assert used[0] == 40
    assert resume(directory)[0] == 80
    assert_same_bits(tree, plain(80))


def without(entry: str, key: str):
    return lambda journal: journal[entry][0].pop(key)


ENTRY = {
    "from_step": 9, "to_step": 5, "reason": "loss", "tier": "disk", "skipped_batches": 4,
    "at_call": 9,
}  # fmt: skip
JOURNALS = {
    "no_rollbacks": ({"rollbacks": None}, "'rollbacks' is missing"),
    "no_jumps": ({"jumps": None}, "'jumps' is missing"),
    "a_negative_step": ({"checkpoints": {"-7": "good"}}, "'-7' is no step"),
    "a_path": ({"checkpoints": {"../x": "good"}}, r"'\.\./x' is no step"),
    "a_step_in_spaces": ({"checkpoints": {" 8 ": "good"}}, "' 8 ' is no step"),
    "a_step_with_an_underscore": ({"checkpoints": {"1_6": "good"}}, "'1_6' is no step"),
    "an_unknown_standing": ({"checkpoints": {"8": "fine"}}, "'fine' is no standing"),
    "a_standing_that_is_a_list": ({"checkpoints": {"8": [1]}}, r"\[1\] is no standing"),
    "a_jump_without_end": ({"jumps": [[1, float("inf")]]}, "inf is no whole number"),
    "a_jump_of_a_fraction": ({"jumps": [[1, 2.7]]}, "2.7 is no whole number"),
    "a_rollback_that_is_a_list": ({"rollbacks": [[1]]}, ""),
    "a_rollback_with_a_key_missing": ({"rollbacks": [{"from_step": 3}]}, "'to_step' is missing"),
    "a_call_that_is_text": ({"rollbacks": [{**ENTRY, "at_call": "9"}]}, "'9' is no whole number"),
}


def write_journals(directory: Path, text: str) -> None:
    for name in ("journal.json", "journal.before.json"):
        (directory / name).write_text(text)


@pytest.mark.parametrize(("change", "sentence"), JOURNALS.values(), ids=JOURNALS)
def test_a_journal_that_does_not_say_what_it_must(tmp_path, change, sentence):
    """One sentence that says what is wrong, and nothing is deleted."""
    content = {"checkpoints": {}, "jumps": [], "rollbacks": []} | change
    text = json.dumps({name: x for name, x in content.items() if x is not None})
    write_journals(tmp_path, text)
    with pytest.raises(ValueError, match=rf"journal\.json is damaged \(.*{sentence}.*, and so is"):
        RollbackManager(tmp_path)
    assert (tmp_path / "journal.json").read_text() == text


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", "3", "{}", "", "\0" * 300])
def test_a_journal_that_is_none(tmp_path, text):
    write_journals(tmp_path, text)
    with pytest.raises(ValueError, match=r"journal\.json is damaged"):
        RollbackManager(tmp_path)


def test_what_a_newer_version_wrote_is_kept(directory):
    content = json.loads((directory / "journal.json").read_text())
    content["rollbacks"] = [ENTRY | {"cause": "a flipped bit"}]
    write_journals(directory, json.dumps(content | {"schema": 7}))
    tree, manager, _ = run(directory, 60)
    assert [r._asdict() for r in manager.history] == [ENTRY]
    assert_same_bits(tree, plain(60))
    written = json.loads((directory / "journal.json").read_text())
    assert written["schema"] == 7
    assert written["rollbacks"] == content["rollbacks"]


@pytest.mark.parametrize("resumed_at", [21, 23])
def test_a_later_rollback_goes_where_that_of_an_uninterrupted_run_goes(tmp_path, resumed_at):
    """Copies in memory are taken at the same steps, wherever the run was resumed."""
    options, fault = {"snapshot_every": 7, "save_every": 1000}, {43: nan_parameter}

    def save(rollback, step, tree):
        if step == resumed_at and not rollback.history:
            rollback.save(step, tree)

    one, other = tmp_path / "one", tmp_path / "other"
    whole, manager, _ = run(one, 60, dict(fault), on_step=save, **options)
    run(other, resumed_at, on_step=save, **options)
    resumed, second, used = run(other, 60, dict(fault), **options)
    assert used[0] == resumed_at
    (back,), (back_again,) = manager.history, second.history
    assert (back_again.from_step, back_again.to_step) == (back.from_step, back.to_step)
    assert_same_bits(resumed, whole)


def test_a_journal_of_an_older_version(directory):
    """It has neither calls nor what is to be deleted."""
    content = json.loads((directory / "journal.json").read_text())
    content = {name: content[name] for name in ("checkpoints", "jumps", "rollbacks")}
    write_journals(directory, json.dumps(content))
    assert resume(directory)[0] == 40


def test_a_checkpoint_of_an_older_version(directory):
    """Every leaf, a scalar too, has an array of its own, and no metadata names any."""
    step, tree = resume(directory)
    leaves = snapshots.flatten(tree)
    content = {
        "leaves": {name: x for name, x in leaves.items() if x.size},
        "sums": np.asarray(snapshots.checksums(leaves)),
        "step": np.array([step]),
    }
    ocp.save(directory / "checkpoints" / str(step), content, overwrite=True)
    assert resume_and_listen(directory)[::2] == (step, "")
    tree, _, used = run(directory, 60)
    assert used[0] == step
    assert_same_bits(tree, plain(60))


# --- a manager that is used as it should not be -------------------------------------------------


def test_nothing_is_written_after_close(tmp_path):
    with RollbackManager(tmp_path, **QUICK) as rollback:
        _, tree = rollback.resume(start())
    before = (tmp_path / "journal.json").read_text()
    rollback.close()
    calls = {
        "step": lambda: rollback.step(1, tree),
        "save": lambda: rollback.save(1, tree),
        "resume": lambda: rollback.resume(tree),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match="is closed, or belongs to another process"):
            call()
    assert (tmp_path / "journal.json").read_text() == before
    assert rollback.data_step(3) == 3


@pytest.mark.parametrize("wrong", [20, 19, 0, -3, 41, 10**12])
def test_steps_come_in_order(tmp_path, wrong):
    with Patient(tmp_path, **QUICK) as rollback:
        step, tree = rollback.resume(start())
        while step < 20:
            step, tree = rollback.step(step + 1, update(tree, batch(step)))
        with pytest.raises(ValueError, match=rf"step {wrong} was handed in after step 20: hand in"):
            rollback.step(wrong, tree)
        assert rollback.step(21, tree)[0] == 21


@pytest.mark.parametrize("wrong", [2.0, "3", None])
def test_a_step_is_an_integer(tmp_path, wrong):
    with RollbackManager(tmp_path) as rollback:
        rollback.resume(start())
        with pytest.raises(TypeError, match="step must be an integer, got "):
            rollback.step(wrong, start())


def test_a_run_that_was_under_way_may_begin_anywhere(tmp_path):
    with RollbackManager(tmp_path, **QUICK) as rollback:
        rollback.resume(start())
        assert rollback.step(np.int64(5001), start())[0] == 5001


def test_resuming_once_more(tmp_path):
    """Back to the newest checkpoint, and on from there to the same end."""
    with Patient(tmp_path, **QUICK) as rollback:
        step, tree = rollback.resume(start())
        for until in (21, 60):
            while step < until:
                step, tree = rollback.step(step + 1, update(tree, batch(step)))
            if until == 21:
                step, tree = rollback.resume(tree)
                assert step == 16
    assert_same_bits(tree, plain(60))


# --- the folder --------------------------------------------------------------------------------

HOLD = """
import sys, time
from lbw_optax import RollbackManager
with RollbackManager(sys.argv[1]) as rollback:
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_two_processes_one_directory(tmp_path):
    """The second is told; a kill of the first frees the directory."""
    with child(HOLD, tmp_path, stdin=subprocess.PIPE) as first:
        assert first.stdout.readline() == "ready\n"
        with pytest.raises(OSError, match=r"Another process uses .* or pass another directory"):
            RollbackManager(tmp_path)
        first.kill()
    assert resume(tmp_path)[0] == 0


FORKING = """
import multiprocessing, sys, time, warnings
from lbw_optax import RollbackManager
warnings.simplefilter("ignore")  # that JAX has threads, which a fork does not take along
def work(queue):
    queue.get()
rollback = RollbackManager(sys.argv[1])
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
worker = context.Process(target=work, args=(queue,), daemon=True)
worker.start()
if sys.argv[2] == "close":
    rollback.close()
print(worker.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_forked_data_worker_does_not_keep_the_lock(tmp_path, end):
    with child(FORKING, tmp_path, end, stdin=subprocess.PIPE) as trainer:
        worker = int(trainer.stdout.readline())
        if end == "kill":
            with pytest.raises(OSError, match="Another process uses"):
                RollbackManager(tmp_path)
            trainer.kill()
            trainer.wait()
        try:
            os.kill(worker, 0)  # it lives on
            RollbackManager(tmp_path).close()
        finally:
            os.kill(worker, signal.SIGKILL)
            trainer.kill()


def without_lock(path, how):
    if how == "lock":
        (path / "lock").unlink()
    elif how == "directory":
        shutil.rmtree(path)
    else:
        path.rename(path.with_name("elsewhere"))


@pytest.mark.parametrize("lost", ["lock", "directory", "moved"])
@pytest.mark.parametrize("is_taken", [False, True], ids=["", "taken"])
def test_a_lock_that_is_gone_is_told_and_made_again(lost, is_taken, tmp_path):
    path, other = tmp_path / "run", contextlib.ExitStack()

    def lose(rollback, step, tree):
        if step == 20:
            rollback._candidates._disk._write()  # nothing is on its way there
            without_lock(path, lost)
            if is_taken:
                other.enter_context(RollbackManager(path, **QUICK)).resume(start())

    with other, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tree, _, _ = run(path, 40, on_step=lose)
        assert_same_bits(tree, plain(40))
        said = [str(x.message) for x in caught]
        if is_taken:
            assert any("Another process uses" in x and "could not be written" in x for x in said)
            assert not any("made again" in x for x in said)
        else:
            assert sum("deleted or moved" in x and "made again" in x for x in said) == 1
    if not is_taken:
        with RollbackManager(path, **QUICK) as rollback:
            assert rollback.resume(start())[0] > 20


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written to .*file/run \(Not a directory\)"):
        RollbackManager(tmp_path / "file" / "run")


READ_ONLY = """
import os, sys
from lbw_optax import RollbackManager
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
try:
    RollbackManager(sys.argv[1])
except OSError as error:
    print(error)
"""


def test_a_read_only_directory(tmp_path):
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)  # pytest's own folders are closed to other users
    (tmp_path / "closed").mkdir(mode=0o555)
    with child(READ_ONLY, tmp_path / "closed" / "run") as process:
        said, _ = process.communicate(timeout=60)
    assert "cannot be written" in said
    assert "(Permission denied): pass a directory that this user may write to." in said


LIMITED = """
import resource, sys
from rollback_loop import run
def limit(rollback, step, tree):
    if step == 20:  # no file may grow beyond this: every write from now on fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    if step == 60:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
tree, rollback, used = run(sys.argv[1], 90, on_step=limit)
print(len(used), rollback.history)
"""


FULL = """
import contextlib, sys
from pathlib import Path
from rollback_loop import run
filler = Path(sys.argv[1]).parent / "filler"
def fill(rollback, step, tree):
    if step == 20:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(512)):
                pass
    if step == 60:
        filler.unlink()
tree, rollback, used = run(sys.argv[1], 90, on_step=fill)
print(len(used), rollback.history)
"""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def assert_a_healthy_run_goes_on(script: str, directory: Path) -> None:
    with child(script, directory) as process:
        said, warned = process.communicate(timeout=120)
    assert said == "90 []\n", warned
    assert "could not be written" in warned
    step, tree = resume(directory)
    assert step >= 72
    assert_same_bits(tree, plain(step))


def test_writes_that_fail_do_not_stop_a_healthy_run(tmp_path):
    """A file-size limit of 0 makes every write fail; later there is room."""
    assert_a_healthy_run_goes_on(LIMITED, tmp_path)


def test_a_full_disk_does_not_stop_a_healthy_run(small_disk):
    assert_a_healthy_run_goes_on(FULL, small_disk / "run")


# --- kills -------------------------------------------------------------------------------------

TRAIN = """
import os, signal, sys
from rollback_loop import nan_parameter, run
from lbw_optax.rollback import checkpoints, journal
directory, steps, fault_at, die_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
left = []
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def before(module, name):
    then = getattr(module, name)
    setattr(module, name, lambda *a: die() if left else then(*a))
if die_at == "journal":
    before(journal, "write")
if die_at == "delete":
    before(checkpoints, "delete")
def fault(tree):
    left.append(True)
    return nan_parameter(tree)
def report(rollback, step, tree):
    if die_at == "arrived" and rollback.history:
        die()
    if die_at == "delete" and step == 33:  # with a healthy checkpoint of step 32 to remove
        left.append(True)
        rollback.request("test")
    print(step, flush=True)
run(directory, steps, {fault_at: fault} if fault_at else {}, on_step=report)
"""


def train_and_kill(directory: Path, after: int, delay: float = 0.0) -> int:
    """Kill a training process some seconds after it has made so many steps; the last step seen."""
    with child(TRAIN, directory, 10**6, 0, "") as process:
        for _ in range(after):
            step = int(process.stdout.readline())
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        steps = [step, *map(int, process.stdout.read().split())]
        assert process.wait() == -signal.SIGKILL
    return steps[-1]


class Reference:
    """The uninterrupted run, as far as it was asked for."""

    def __init__(self):
        self.step, self.tree = 0, start()

    def __call__(self, step: int):
        assert step >= self.step
        while self.step < step:
            self.tree, self.step = update(self.tree, batch(self.step)), self.step + 1
        return self.tree


def kill_again_and_again(directory: Path, kills: int, seed: int) -> None:
    """One run, killed and resumed; it never loads anything but what the uninterrupted run has."""
    rng, reference = np.random.default_rng(seed), Reference()
    for _ in range(kills):
        killed_at = train_and_kill(directory, int(rng.integers(1, 30)), rng.random() * 0.02)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a kill damages no checkpoint that the journal names
            found, tree = resume(directory)
        assert_same_bits(tree, reference(found))
        # The checkpoint before the last was settled before the last was begun.
        assert killed_at - found <= 2 * QUICK["save_every"]


@pytest.mark.slow
def test_killed_at_random_steps(tmp_path):
    kill_again_and_again(tmp_path, 3, seed=0)


@pytest.mark.slow
def test_killed_two_hundred_times(tmp_path):
    kill_again_and_again(tmp_path, 200, seed=1)


@pytest.mark.parametrize("delay", [0.005, *slowly(0.0, 0.02)])
def test_killed_while_saving(tmp_path, delay):
    """The step that is printed last has just begun a save."""
    killed_at = train_and_kill(tmp_path, 3 * QUICK["save_every"], delay)
    found, tree = resume(tmp_path)
    assert killed_at - found <= 2 * QUICK["save_every"]
    assert_same_bits(tree, plain(found))
    assert not list(tmp_path.glob("checkpoints/*tmp*"))  # the unfinished one is gone


@pytest.mark.parametrize(
    ("tier", "after"),
    [
        ("memory", 0),
        ("disk", 3),
        *slowly(*(("memory", after) for after in (3, 6, 9))),
        *slowly(*(("disk", after) for after in (0, 6, 9))),
    ],
)
def test_killed_after_a_rollback_is_the_uninterrupted_run(tmp_path, tier, after):
    """To the bit, ceiling and events too, however soon the kill comes."""

    class Killed(Exception):
        """The directory is then what a kill leaves behind."""

    def die(rollback, step, tree):
        if rollback.history and rollback._journal.calls >= rollback.history[0].at_call + after:
            raise Killed

    options = {"memory": {}, "disk": {"snapshot_every": None}}[tier]
    whole, manager, _ = run(tmp_path / "whole", 70, {30: nan_parameter}, **options)
    assert [r.tier for r in manager.history] == [tier]
    with pytest.raises(Killed):
        run(tmp_path / "parts", 70, {30: nan_parameter}, on_step=die, **options)
    tree, resumed, _ = run(tmp_path / "parts", 70, **options)
    assert resumed.history == manager.history
    assert_same_bits(tree, whole)


def test_what_the_guard_knew_is_lost_with_a_warning(tmp_path):
    def die(rollback, step, tree):
        if rollback.history:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 70, {30: nan_parameter}, on_step=die)
    shutil.rmtree(tmp_path / "arrivals")
    with pytest.warns(RuntimeWarning, match="What the guard knew after the rollback to step 2"):
        tree, rollback, _ = run(tmp_path, 70)
    assert len(rollback.history) == 1
    assert np.isfinite(np.asarray(tree[0]["w"])).all()


@pytest.mark.parametrize("die_at", ["journal", *slowly("delete", "arrived")])
def test_killed_during_a_rollback(tmp_path, die_at):
    """Before the journal knows of it, before the newer checkpoints are gone, and just after."""
    fault_at = 0 if die_at == "delete" else 33
    with child(TRAIN, tmp_path, 60, fault_at, die_at) as process:
        _, warned = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, warned
    with RollbackManager(tmp_path, **QUICK) as rollback:
        step, tree = rollback.resume(start())
        # Killed before the journal knew, the run takes its batches once more; else it goes past.
        assert len(rollback.history) == (die_at != "journal")
        assert rollback.data_step(40) == 40 + sum(r.skipped_batches for r in rollback.history)
    assert step <= 32
    assert (step == 32) == (die_at == "journal")
    assert_same_bits(tree[0], plain(step)[0])
    tree, _, _ = run(tmp_path, 60)
    assert np.isfinite(np.asarray(tree[0]["w"])).all()
