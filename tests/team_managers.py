"""A team's own checkpoint managers, of both of Orbax's APIs, behind the same few words."""

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import v1


class V0:
    """A `CheckpointManager`, as most teams have it."""

    def __init__(self, directory, save, preserve):
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=save, preservation_policy=preserve
        )
        self.manager = ocp.CheckpointManager(directory, options=options)

    def save(self, step, tree):
        return self.manager.save(step, args=ocp.args.StandardSave(tree))

    def load(self, step, like):
        return self.manager.restore(step, args=ocp.args.StandardRestore(like))

    def steps(self):
        self.manager.wait_until_finished()
        return list(self.manager.all_steps())


class V1:
    """A `Checkpointer` of the API that comes."""

    def __init__(self, directory, save, preserve):
        self.manager = v1.training.Checkpointer(
            directory, save_decision_policy=save, preservation_policy=preserve
        )

    def save(self, step, tree):
        return self.manager.save(step, tree)

    def load(self, step, like):
        return self.manager.load(step, jax.tree.map(v1.arrays.to_shape_dtype_struct, like))

    def steps(self):
        self.manager.wait()
        return [x.step for x in self.manager.checkpoints]
