"""Four processes of one job. One has a NaN, then a broken weight; all four decide the same."""

import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lbw_optax

PROCESSES, BAD = 4, 2


def main(rank, directory):  # on a cluster: what each host runs, over a directory that all see
    mesh = jax.make_mesh((PROCESSES,), ("data",))
    same, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    tx = lbw_optax.adamw(0.03)

    @jax.shard_map(mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    def loss_of(w, x):  # each device has rows of its own; pmean makes the loss that of all
        return jax.lax.pmean(jnp.mean((x @ w - x.sum(1)) ** 2), "data")

    @jax.jit
    def train_step(w, opt_state, x):
        loss, gradients = jax.value_and_grad(loss_of)(w, x)
        updates, opt_state = tx.update(gradients, opt_state, w, value=loss)
        return optax.apply_updates(w, updates), opt_state

    start = jax.jit(lambda w: (w, tx.init(w)), out_shardings=same)(np.zeros(8, "f"))
    with lbw_optax.RollbackManager(directory, snapshot_every=7) as rollback:
        step, state = rollback.resume(start)
        while step < 60:
            x = np.random.default_rng([rollback.data_step(step), rank]).normal(size=(16, 8))
            x *= np.nan if rank == BAD and step == 20 else 1
            x = jax.make_array_from_process_local_data(rows, x.astype("f"))
            w, opt_state = train_step(*state, x)
            if rank == BAD and step == 40 and not rollback.history:
                w = jax.make_array_from_process_local_data(same, np.full(8, np.inf, "f"))
            step, state = rollback.step(step + 1, (w, opt_state))
        rollback.save(step, state)
    went = [f"{x.from_step} to {x.to_step} ({x.reason})" for x in rollback.history]
    skips, w = lbw_optax.metrics(state[1])["skips"], np.asarray(state[0]).tobytes().hex()
    print(f"process {rank}: {skips} skipped, back from {went}, ends as {w[-16:]}", flush=True)


if len(sys.argv) == 4:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[3], PROCESSES, int(sys.argv[1]))
    main(int(sys.argv[1]), sys.argv[2])
else:
    more = [tempfile.mkdtemp(), f"127.0.0.1:{(*sys.argv, 12321)[1]}"]
    jobs = [subprocess.Popen([sys.executable, __file__, str(i), *more]) for i in range(PROCESSES)]
    sys.exit(max([job.wait() for job in jobs]))
