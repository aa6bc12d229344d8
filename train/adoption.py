"""A run that began without the guard goes on under it, from its checkpoint.

A loop of one's own, without the guard, saves what it has with Orbax::

    from orbax.checkpoint import v1 as ocp
    ocp.save("old/300", {"params": params, "opt_state": opt_state})

and a script goes on from there, with the same model and the same optimizer under the guard::

    python -m train.pretrain --adopt old/300 --out runs/guarded --steps 1000

What the scripts have trained with ``--optimizer adamw`` is adopted by its run directory::

    python -m train.pretrain --adopt runs/old --out runs/guarded --steps 1000

Steps, batches and learning rate go on where the old run was; the guard begins to learn.
"""

from pathlib import Path
from typing import Any

import jax
import optax

import lbw_optax
from train import rundir


def load(path: Path, params: Any, opt_state: Any) -> tuple[Any, Any]:
    """Parameters of the old run, and its optimizer's state under the guard.

    Args:
      path: Orbax checkpoint of ``{"params": ..., "opt_state": ...}``, or a run directory.
      params: of the new run, for names, shapes, dtypes and shardings.
      opt_state: freshly made, of the guarded optimizer.

    Raises:
      ValueError: if there is no such checkpoint, or it is of another model or optimizer.
    """
    if (path / "journal.json").exists():
        if not rundir.has_checkpoints(path):
            raise ValueError(f"--adopt {path}: the run there has saved nothing yet")
        params, old = _newest(path, params, opt_state)
        return params, lbw_optax.adopt(opt_state, lbw_optax.strip(old))
    read = _read(path, {"params": params, "opt_state": lbw_optax.strip(opt_state)})
    return read["params"], lbw_optax.adopt(opt_state, read["opt_state"])


def require(path: Path) -> None:
    """See that there is something to adopt.

    Raises:
      ValueError: if there is no such directory.
    """
    if not path.is_dir():
        raise ValueError(
            f"--adopt {path}: there is no such directory; give an Orbax checkpoint, or the run "
            "directory of a run without the guard"
        )


def updates(opt_state: Any) -> int:
    """How many updates the optimizer below the guard has made, by its own count."""
    counts = optax.tree.get_all_with_path(lbw_optax.strip(opt_state), "count")
    return max(int(count) for _, count in counts)


def _newest(directory: Path, params: Any, opt_state: Any) -> tuple[Any, Any]:
    """What a run of the scripts would go on with; it must not be running."""
    with lbw_optax.RollbackManager(directory, snapshot_every=None) as rollback:
        _, (params, old) = rollback.resume((params, opt_state))
    return params, old


def _read(path: Path, like: Any) -> Any:
    from orbax.checkpoint import v1 as ocp

    require(path)
    try:
        return ocp.load(path.absolute(), jax.tree.map(ocp.arrays.to_shape_dtype_struct, like))
    except Exception as error:  # whatever Orbax raises for what is none of its own, or another's
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f'--adopt {path}: this is no Orbax checkpoint of {{"params": ..., "opt_state": ...}} '
            f"of this model, with the state of this optimizer without the guard ({reason})"
        ) from error
