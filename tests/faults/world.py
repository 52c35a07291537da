"""A small run with questions to its store, each with the answers that are right."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tracer import Tracer, TracerError, verify
from tracer.api.store_reader import StoreReader

N, GROWN, M, K, BATCH = 48, 56, 6, 3, 16
REPLACED = [3, 4, 20, 41]
RATES = (0.2, 0.1)
PASSES = 5
TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "int8": 0.1, "none": 1e-4}
"""By storage, relative to the largest value: of rows that are stored again after other batches."""


@dataclass(frozen=True)
class Data:
    """Examples of one state of the data set: as at first, with some replaced, or with some added."""

    name: str

    @property
    def size(self) -> int:
        return GROWN if self.name == "grown" else N

    def batches(self) -> list[tuple[range, tuple[torch.Tensor, torch.Tensor]]]:
        x, y = examples(GROWN, 0)
        if self.name == "replaced":
            x[REPLACED], y[REPLACED] = x[REPLACED] + 3, (y[REPLACED] + 1) % 3
        rows = [range(start, min(start + BATCH, self.size)) for start in range(0, self.size, BATCH)]
        return [(each, (x[each.start : each.stop], y[each.start : each.stop])) for each in rows]


FIRST, NEW, LONG = Data("first"), Data("replaced"), Data("grown")


def examples(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (number,), generator=generator)
    return torch.randn(number, 6, generator=generator) + nn.functional.one_hot(y, 6), y


def checkpoints() -> list[tuple[dict[str, torch.Tensor], float]]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"weight": (3, 6), "bias": (3,)}
    return [({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, r) for r in RATES]


@dataclass(frozen=True)
class World:
    """A way to store things; every step may be repeated and then does what is left of it.

    Attributes:
        storage: The storage of features.
    """

    storage: str = "float32"

    def tracer(self, path: Path, data: Data) -> Tracer:
        model = nn.Linear(6, 3)
        return Tracer(
            model, "image_classification", data.size, path, projector="none", storage=self.storage, progress=False
        )

    def featurize(self, path: Path, data: Data = FIRST) -> None:
        with self.tracer(path, data) as tracer:
            for number, (state, rate) in enumerate(checkpoints()):
                tracer.load_checkpoint(state, number, rate)
                for rows, batch in data.batches():
                    tracer.featurize(batch, inds=rows)
            tracer.finalize_features()

    def score(self, path: Path, data: Data = FIRST) -> None:
        with self.tracer(path, data) as tracer:
            for number, (state, _) in enumerate(checkpoints()):
                if self.storage == "none":
                    train = [batch for _, batch in data.batches()]
                    tracer.score_exactly(state, number, train, [examples(M, 1)], "test")
                else:
                    tracer.start_scoring_checkpoint(state, number, M, "test")
                    tracer.score(examples(M, 1), num_samples=M)

    def replace(self, path: Path, data: Data = NEW) -> None:
        Tracer.open(path, progress=False).replace(REPLACED)

    def grow(self, path: Path, data: Data = LONG) -> None:
        Tracer.open(path, progress=False).grow(GROWN)

    def questions(self) -> list[str]:
        plain = ["finalize_scores", "one checkpoint", "half precision", "top", "self_influence"]
        return plain if self.storage == "none" else [*plain, "influence", "its self_influence"]

    def ask(self, path: Path, question: str) -> np.ndarray:
        """Return an answer as one array, as a reader without the model gives it."""
        reader = Tracer.open(path, progress=False)
        answers = {
            "finalize_scores": lambda: reader.finalize_scores("test"),
            "one checkpoint": lambda: reader.finalize_scores("test", model_ids=[1]),
            "half precision": lambda: reader.finalize_scores("test", "cosine", dtype="float16"),
            "top": lambda: strongest(reader),
            "self_influence": reader.self_influence,
            "influence": lambda: reader.finalize_scores("test", "influence"),
            "its self_influence": lambda: reader.self_influence(estimator="influence"),
        }
        return np.array(answers[question](), np.float64)

    def job(self, path: Path, data: Data) -> None:
        """Do everything that is left."""
        self.featurize(path, data)
        self.score(path, data)

    def is_right(self, answer: np.ndarray, truth: np.ndarray) -> bool:
        if answer.shape != truth.shape or not np.array_equal(np.isfinite(answer), finite := np.isfinite(truth)):
            return False
        answer, truth = answer[finite], truth[finite]
        return bool(np.abs(answer - truth).max() <= TOLERANCE[self.storage] * np.abs(truth).max())


def strongest(reader: StoreReader) -> np.ndarray:
    """Return both ends of a ranking, each score in the place of its training example ``[2, N, M]``."""
    found = np.full((2, reader.train_set_size, M), np.inf)
    for end, kind in enumerate(("proponents", "opponents")):
        top = reader.top("test", K, kind)
        np.put_along_axis(found[end], top.indices.T, top.scores.T.astype(np.float64), 0)
    return found


class DeadEnd(Exception):
    """Errors whose steps do not help."""


def follow(error: TracerError, path: Path, backup: Path) -> str:
    """Do what an error says that helps, besides doing everything again; return which step that was."""
    said = str(error)
    if "tracer.verify" in said:
        verify(path, progress=False)
        return "verify"
    if replaced := re.search(r"tracer\.replace\(tracer\.remaining\((\d+)\)\)", said):
        reader = Tracer.open(path, progress=False)
        reader.replace(reader.remaining(int(replaced[1])))
        return "again"
    remove = re.search(r"remove (?:the directory )?(/\S*[^\s.,;:)])", said)
    if (
        "is not a store" not in said
        and re.search("again|[Ff]inalize|[Ff]eaturize|[Ss]core|is not in the store", said)
        and not remove
    ):
        return "again"
    if remove:
        place = Path(remove[1])
        assert place.is_relative_to(path), f"{place} is not in the store: {said}"
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        return "remove"
    if re.search("[Rr]estore|check save_dir|choose another", said):
        for file in backup.rglob("zarr.json"):
            if not file.parent.relative_to(backup).parts or str(path / file.relative_to(backup)) in said:
                (path / file.relative_to(backup)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, path / file.relative_to(backup))
        return "restore"
    raise DeadEnd(f"no step in {said}")


def step(world: World, name: str, path: Path, data: Data) -> Any:
    """Run a step, or ask a question, by name."""
    if name == "verify":
        return verify(path, progress=False)
    return world.ask(path, name) if name in world.questions() else getattr(world, name)(path, data)
