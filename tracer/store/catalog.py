"""The catalog of a store: the path of everything in it, and which of it exists."""

from __future__ import annotations

from tracer._core.validation import check_integer
from tracer.store.arrays.metadata import NODE, child_nodes
from tracer.store.arrays.store_path import StorePath
from tracer.store.paths import checked_name, numbered_nodes


class Catalog:
    """Paths and names of the nodes below a store's root.

    Names and numbers are checked before they become part of a path. Something counts as existing as soon as its own
    ``zarr.json`` exists, complete or not.

    Args:
        root: The store's directory.
    """

    def __init__(self, root: StorePath) -> None:
        self.root = root

    def checkpoint_path(self, model_id: int) -> StorePath:
        """Return the path of a checkpoint's table of training examples."""
        return self.root / "checkpoints" / _number(model_id)

    def targets_path(self, exp_name: str, model_id: int) -> StorePath:
        """Return the path of a target set's table at a checkpoint."""
        return self.root / "targets" / checked_name("exp_name", exp_name) / _number(model_id)

    def scores_path(self, exp_name: str, estimator: str) -> StorePath:
        """Return the path of a target set's scores, which are in one group for each question."""
        return self.root / "scores" / checked_name("exp_name", exp_name) / checked_name("estimator", estimator)

    def cosines_path(self, exp_name: str, model_id: int) -> StorePath:
        """Return the path of a target set's cosines at a checkpoint, which are in blocks of targets."""
        return self.root / "cosines" / checked_name("exp_name", exp_name) / _number(model_id)

    def top_path(self, exp_name: str, estimator: str) -> StorePath:
        """Return the path of a target set's top-k parts (see `tracer.store.topk_parts`)."""
        return self.root / "top" / checked_name("exp_name", exp_name) / checked_name("estimator", estimator)

    def kernel_path(self, model_id: int, weighting: str) -> StorePath:
        """Return the path of a checkpoint's kernels of a weighting (see `tracer.store.kernels`)."""
        return self.root / "kernels" / _number(model_id) / weighting

    def checkpoint_ids(self) -> list[int]:
        """Return the model ids of all checkpoints, ascending."""
        return numbered_nodes(self.root / "checkpoints")

    def has_checkpoint(self, model_id: int) -> bool:
        """Return whether there is a table of training examples for this checkpoint."""
        return (self.checkpoint_path(model_id) / NODE).exists()

    def exp_names(self) -> list[str]:
        """Return the names of all target sets that have a table, sorted."""
        return [name for name in child_nodes(self.root / "targets") if numbered_nodes(self.root / "targets" / name)]

    def target_ids(self, exp_name: str) -> list[int]:
        """Return the model ids for which a target set has a table, ascending."""
        return numbered_nodes(self.root / "targets" / checked_name("exp_name", exp_name))

    def has_targets(self, exp_name: str, model_id: int) -> bool:
        """Return whether there is a table of this target set for this checkpoint."""
        return (self.targets_path(exp_name, model_id) / NODE).exists()

    def score_names(self, exp_name: str) -> list[str]:
        """Return the estimators for which a target set has scores, sorted."""
        path = self.root / "scores" / checked_name("exp_name", exp_name)
        return [name for name in child_nodes(path) if child_nodes(path / name)]

    def table_paths(self) -> list[tuple[StorePath, str | None]]:
        """Return the path and target set (None: training examples) of all tables, even if their document is missing."""
        found = [(path, None) for path in _numbered_entries(self.root / "checkpoints")]
        sets = child_nodes(self.root / "targets")
        return [*found, *((path, name) for name in sets for path in _numbered_entries(self.root / "targets" / name))]

    def score_paths(self) -> list[StorePath]:
        """Return the paths of all results with scores and with cosines."""
        parents = [self.root / kind / name for kind in ("scores", "cosines") for name in child_nodes(self.root / kind)]
        groups = [parent / name for parent in parents for name in child_nodes(parent)]
        return [group / key for group in groups for key in child_nodes(group)]


def _number(model_id: int) -> str:
    return str(check_integer(model_id, "model_id", 0))


def _numbered_entries(path: StorePath) -> list[StorePath]:
    return [path / name for name in path.children() if name.isdigit()]
