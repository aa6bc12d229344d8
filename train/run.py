"""One training run in a run directory: resumed, watched, rolled back, stopped in good order."""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lbw_optax
from train import (
    adoption,
    data,
    estimate,
    evaluation,
    files,
    logs,
    loop,
    packing,
    ranks,
    recipes,
    rundir,
    sharding,
    summary,
    weights,
)
from train.evaluation import Evaluation
from train.interrupt import Interrupt
from train.losses import Batch
from train.model import Decoder, next_token_loss, split
from train.options import Options
from train.presets import PRESETS, Config
from train.watch import Watch, receivers

Chosen = TypeVar("Chosen", bound=Options)


class Task(NamedTuple):
    """What is trained, with what, on what."""

    graphdef: nnx.GraphDef[Decoder]
    loss_fn: loop.LossFn
    tx: optax.GradientTransformationExtraArgs
    params: Any
    frozen: Any
    cost: estimate.Estimate
    batch: Callable[[int], Any]
    held_out: dict[str, np.ndarray]


class Result(NamedTuple):
    """What a run leaves: the model after `step` updates.

    `perplexity` is of each held-out split, over `targets` tokens of it; both are empty where the
    run was stopped before its end.
    """

    decoder: Decoder
    step: int
    perplexity: dict[str, float]
    targets: dict[str, int]

    @property
    def finished(self) -> bool:
        return bool(self.perplexity)


def shape_of(source: str) -> Config:
    """The shape of a published model, before anything is downloaded; else of its config.json.

    Raises:
      WeightsError: for a directory or name that is not there, with the near names.
    """
    if source in PRESETS:
        return PRESETS[source]
    return weights.read_config(files.directory(source))


def kinds(options: Options) -> dict[str, Any]:
    """The arguments of `Decoder` that the options decide."""
    return {
        "dtype": jnp.dtype(options.dtype),
        "param_dtype": jnp.dtype(options.param_dtype),
        "scan": options.scan,
        "remat": options.remat,
    }


def check(options: Options) -> None:
    """Find what cannot work before anything is made, downloaded or loaded.

    Raises:
      ValueError: if the run directory holds another run or cannot be written, if there is nothing
        to adopt, if a rollback may not go back far enough, or if alerts or metrics cannot be sent.
      ImportError: for a tracker that is not installed.
    """
    receivers(options)
    changed = rundir.check(options)
    if changed:
        print(f"{options.out} goes on with other options: {'; '.join(changed)}", file=sys.stderr)
    logs.require(options.track)
    if options.adopt is not None and not rundir.has_checkpoints(options.out):
        adoption.require(options.adopt)
    with tempfile.TemporaryDirectory() as place, checkpoints(options, place):
        pass


def once(options: Chosen, product: str, job: Callable[[Chosen], Result]) -> int:
    """Do the job unless the run has ended before; the exit code.

    Args:
      options: of the run.
      product: what it leaves besides its numbers, a directory in the run directory.
      job: makes the run.
    """
    if not rundir.finished(options, product):
        return 0 if job(options).finished else 130
    rundir.check(options)
    print(f"{options.out} is finished: all {options.steps} steps are made", file=sys.stderr)
    print(summary.places(options.out), file=sys.stderr)
    return 0


def announce(options: Options, build: Callable[[], Decoder], trained: Any) -> estimate.Estimate:
    """Print what the run will need, and stop here, before anything is loaded, if it cannot work.

    The whole step is evaluated on shapes: no parameter is allocated.

    Args:
      options: of the run.
      build: makes the model.
      trained: the kind of variable that is trained, as `train.model.split` takes it.

    Raises:
      ValueError: if the run cannot fit, or for shapes that do not go together.
    """
    decoder = nnx.eval_shape(build)
    graphdef, params, frozen = split(decoder, trained)
    tx = _optimizer(options)
    opt_state = jax.eval_shape(tx.init, params)
    cost = estimate.estimate(decoder.config, options, params, frozen, opt_state)
    devices = jax.devices()
    peak = estimate.peak_flops(devices[0])
    print(estimate.describe(cost, options, peak, len(devices)), file=sys.stderr)
    estimate.check(cost, estimate.available_bytes(devices[0]), len(devices))
    rows = np.zeros((options.batch_size, options.length + 1), np.int32)
    _put(mesh(options))(rows)
    loss_fn = _loss_fn(graphdef, decoder.config, options)
    step = loop.train_step.eval_shape
    step(loss_fn, tx.update, params, opt_state, frozen, Batch(rows), options.microbatches)
    return cost


def train(
    decoder: Decoder,
    trained: Any,
    corpus: data.Corpus,
    options: Options,
    cost: estimate.Estimate,
    *,
    dropout: bool = False,
    save: Callable[[Decoder], None] = lambda decoder: None,
) -> Result:
    """Train what is of the kind `trained` in `decoder`, from where the run directory is.

    The parameters of `decoder` are given away: use those of the result. `save` is called with the
    trained model at the end; ``result.json`` comes after it, and says that the run is finished.
    """
    job = task(decoder, trained, corpus, options, cost, dropout=dropout)
    where = mesh(options)
    if where is not None:
        params, frozen = sharding.shard((job.params, job.frozen), where)
        job = job._replace(params=params, frozen=frozen)
    with jax.set_mesh(where) if where else contextlib.nullcontext():
        job, opt_state = _begin(job, options, where)
        rundir.claim(options, needed_bytes=3 * cost.checkpoint)
        return _train(job, opt_state, options, where, save)


def _begin(task: Task, options: Options, where: sharding.Mesh | None) -> tuple[Task, Any]:
    """What the first step starts from, unless the run goes on: fresh, or another run's."""
    opt_state = _init(task, where)
    if options.adopt is None or rundir.has_checkpoints(options.out):
        return task, opt_state
    params, opt_state = adoption.load(options.adopt, task.params, opt_state)
    made = adoption.updates(opt_state)
    if made >= options.steps:
        raise ValueError(f"--adopt {options.adopt} has made {made} steps: give more --steps")
    return task._replace(params=params), opt_state


def _train(
    task: Task,
    opt_state: Any,
    options: Options,
    where: sharding.Mesh | None,
    save: Callable[[Decoder], None],
) -> Result:
    """The run, and what it leaves; Ctrl-C while that is written waits for it."""
    began = time.perf_counter()
    with Interrupt() as interrupted:
        result = _stepped(task, opt_state, options, where, interrupted)
        if result.finished:
            save(result.decoder)
            seconds = time.perf_counter() - began
            summary.write(options, result.perplexity, result.targets, seconds=seconds)
            print(summary.places(options.out), file=sys.stderr)
    return result


def _stepped(
    task: Task,
    opt_state: Any,
    options: Options,
    where: sharding.Mesh | None,
    interrupted: Interrupt,
) -> Result:
    with (
        checkpoints(options) as rollback,  # first, for it says if another process is here
        Watch(options, task.cost, evaluation.size(task.held_out, options)) as watch,
        packing.Prefetch(task.batch, put=_put(where)) as batch,
    ):
        entropy = next_token_loss(task.graphdef, chunk=options.loss_chunk)
        look = Evaluation(entropy, task.frozen, task.held_out, options, watch, interrupted)
        for step, state in steps(task, options, rollback, watch, batch, opt_state):
            if _is_due(step, options):
                look.during(state[0])
            if interrupted:
                break
        watch.audit(step, state[1])
        rollback.save(step, state)
        decoder = nnx.merge(task.graphdef, state[0], task.frozen)
        ends = look.at_the_end(state[0]) if step >= options.steps else {}
        if not ends:
            watch.note(f"stopped after step {step}, and saved; the same command goes on from there")
        targets = {split: evaluation.targets(look.final(split)) for split in ends}
        return Result(decoder, step, ends, targets)


def steps(
    task: Task,
    options: Options,
    rollback: lbw_optax.RollbackManager,
    watch: Watch,
    batch: Callable[[int], Any],
    opt_state: Any,
) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """The loop itself: gives (step, (parameters, optimizer state)) at the start and after each.

    The state is gone once the next step is asked for. `step` falls after a rollback.
    """
    step, state = rollback.resume((task.params, opt_state))
    if step == 0 and options.adopt is not None:
        step = adoption.updates(state[1])
        rollback.save(step, state)
    watch.move(step)
    yield step, state
    while step < options.steps:
        params, opt_state, metrics = loop.train_step(
            task.loss_fn,
            task.tx.update,
            *state,
            task.frozen,
            batch(rollback.data_step(step)),
            options.microbatches,
        )
        made = step + 1
        watch.step(made, metrics | _ranks(made, params, options), opt_state)
        step, state = rollback.step(made, (params, opt_state))
        watch.copies(rollback.report())
        if step < made:
            watch.rolled_back(rollback.history[-1])
        state = watch.obey(step, state, rollback)
        yield step, state


def _ranks(made: int, params: Any, options: Options) -> dict[str, jax.Array]:
    """Stable ranks, after the first step and from there after every so many."""
    found = ranks.of_layers(params, scan=options.scan) if made % ranks.EVERY == 1 else None
    return {} if found is None else {"stable_ranks": found}


def checkpoints(options: Options, place: str | None = None) -> lbw_optax.RollbackManager:
    """Checkpoints, resume and rollback are one thing; it lives in the run directory."""
    place, distance = place or str(options.out), options.max_distance
    if options.save_every is None:
        return lbw_optax.RollbackManager(place, max_distance=distance)
    return lbw_optax.RollbackManager(place, max_distance=distance, save_every=options.save_every)


def _init(task: Task, where: sharding.Mesh | None) -> Any:
    """The optimizer's first state, its moments spread over the devices as the parameters are."""
    if where is None:
        return jax.jit(task.tx.init)(task.params)
    places = sharding.shardings(jax.eval_shape(task.tx.init, task.params), where)
    return jax.jit(task.tx.init, out_shardings=places)(task.params)


def _is_due(step: int, options: Options) -> bool:
    """Whether to look at the valid split after this step; the last one has a look of its own."""
    every = options.eval_every
    return every > 0 and step % every == 0 and 0 < step < options.steps


def _batches(corpus: data.Corpus, options: Options, dropout: bool) -> Callable[[int], Batch]:
    """Batches by index; with dropout they carry the number that its mask is made from."""
    shape = {"batch_size": options.batch_size, "length": options.length}

    def batch(index: int) -> Batch:
        if options.packing:
            drawn = packing.packed(corpus.train, options.seed, index, **shape, end=corpus.end)
        else:
            drawn = Batch(data.sample(corpus.train, options.seed, index, **shape))
        return drawn._replace(step=np.uint32(index)) if dropout else drawn

    return batch


def task(
    decoder: Decoder,
    trained: Any,
    corpus: data.Corpus,
    options: Options,
    cost: estimate.Estimate,
    *,
    dropout: bool = False,
) -> Task:
    """What `train` trains, from its arguments."""
    graphdef, params, frozen = split(decoder, trained)
    return Task(
        graphdef=graphdef,
        loss_fn=_loss_fn(graphdef, decoder.config, options),
        tx=_optimizer(options),
        params=params,
        frozen=frozen,
        cost=cost,
        batch=_batches(corpus, options, dropout),
        held_out={
            split: data.windows(
                getattr(corpus, split), batch_size=options.batch_size, length=options.length
            )
            for split in ("valid", "test")
        },
    )


def _loss_fn(graphdef: nnx.GraphDef[Decoder], config: Config, options: Options) -> loop.LossFn:
    """What is trained on, watched; a perplexity is that of the cross-entropy alone."""
    chunk, z_loss = options.loss_chunk, options.z_loss
    return next_token_loss(
        graphdef, chunk=chunk, z_loss=z_loss, balance=config.balance, watched=True
    )


def mesh(options: Options) -> sharding.Mesh | None:
    """The devices as the options want them; a single one needs no mesh."""
    if options.mesh is None:
        experts = options.mesh_expert
        several = jax.device_count() > 1 or experts > 1  # too few of them are told of
        return sharding.make_mesh(expert=experts) if several else None
    replicas, fsdp, tensor = options.mesh
    axes = {"data": replicas, "fsdp": fsdp, "tensor": tensor, "expert": options.mesh_expert}
    return sharding.make_mesh(**axes)


def _put(where: sharding.Mesh | None) -> Callable[[Any], Any]:
    return jax.device_put if where is None else lambda batch: sharding.shard_batch(batch, where)


def _optimizer(options: Options) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(recipes.optimizer(options))
