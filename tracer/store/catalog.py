"""The catalog of a store: the path of everything in it, and which of it exists."""

from __future__ import annotations

from tracer._core.validation import check_integer
from tracer.errors import StoreError
from tracer.store.arrays.metadata import NODE, child_nodes
from tracer.store.arrays.store_path import StorePath
from tracer.store.paths import checked_name, numbered_nodes
from tracer.store.table_schema import lost_document


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

    def curvature_path(self, model_id: int) -> StorePath:
        """Return the path of a checkpoint's curvatures (see `tracer.store.curvature`)."""
        return self.root / "curvature" / _number(model_id)

    def checkpoint_ids(self) -> list[int]:
        """Return the model ids of all checkpoints, ascending."""
        return numbered_nodes(self.root / "checkpoints")

    def check_documents(self) -> None:
        """Raise `StoreError` if a checkpoint has rows and no document: it would not be among `checkpoint_ids`."""
        for path in _below(self.root / "checkpoints", 1):
            if lost_document(path):
                raise StoreError(
                    f"{path / NODE} is missing although the checkpoint has rows: restore it, featurize the checkpoint "
                    f"again, which replaces its rows, or remove {path}"
                )

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
        found = [(path, None) for path in _below(self.root / "checkpoints", 1)]
        return [*found, *((path, path.parent.name) for path in _below(self.root / "targets", 2))]

    def score_paths(self) -> list[StorePath]:
        """Return the paths of all results with scores and with cosines, even if their document is missing."""
        return [path for kind in ("scores", "cosines") for path in _below(self.root / kind, 3)]

    def kernel_paths(self) -> list[StorePath]:
        """Return the paths of all kernels and curvatures, even if their document is missing."""
        return [*_below(self.root / "kernels", 3), *_below(self.root / "curvature", 2)]

    def part_paths(self) -> list[StorePath]:
        """Return the paths of all top-k parts, even if their document is missing."""
        return _below(self.root / "top", 4)

    def group_paths(self) -> list[StorePath]:
        """Return the paths of all groups that only hold other ones, outer ones first."""
        depths = {
            "checkpoints": 1,
            "targets": 2,
            "scores": 3,
            "cosines": 3,
            "kernels": 3,
            "top": 3,
            "curvature": 2,
            "ids": 2,
        }
        return [
            path for kind, depth in depths.items() for level in range(depth) for path in _below(self.root / kind, level)
        ]


def _number(model_id: int) -> str:
    return str(check_integer(model_id, "model_id", 0))


def _below(path: StorePath, depth: int) -> list[StorePath]:
    """Return all directories so many levels below one."""
    if not depth:
        return [path] if path.is_dir() else []
    names = [name for name in path.children() if name != NODE and not name.startswith(".")]
    return [found for name in names for found in _below(path / name, depth - 1)]
