"""Trials: a fault of some kind, and what comes of the store."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from faults.injection import Child
from faults.world import FIRST, LONG, NEW, Data, DeadEnd, World, follow, step

from tracer import TracerError, verify

GOOD = ("right at once", "refused, then right", "rebuilt by verify")
BAD = ("wrong", "dead end", "foreign error", "hangs", "damage unseen or invented")
ROUNDS = 8


@dataclass(frozen=True)
class Step:
    """Work that may be interrupted: where it begins, the data set, the answers that may come afterwards, and the rest.

    Attributes:
        begin: The store that it begins with; see `Stores`.
        name: A step or a question of the world.
        data: The data set that it works on.
        before: The data sets whose answers are right until the work is done again.
        redo: Whether the user does the same once more, if it was interrupted.
    """

    begin: str
    name: str
    data: Data = FIRST
    before: tuple[Data, ...] = (FIRST,)
    redo: bool = False


REPLACE = Step("whole", "replace", NEW, redo=True)
GROW = Step("whole", "grow", LONG, (FIRST, LONG), redo=True)
VERIFY = Step("damaged", "verify")


def steps(world: World) -> list[Step]:
    work = [Step("empty", "featurize"), Step("featurized", "score"), REPLACE, GROW, VERIFY]
    work += [Step("replaced", "featurize", NEW, (NEW,)), Step("grown", "featurize", LONG, (LONG,))]
    asked = [Step("scored", name) for name in world.questions()]
    return [*work, *asked, *(Step("changed", name, NEW, (NEW,)) for name in world.questions())]


def pairs(world: World) -> list[tuple[Step, Step]]:
    questions = world.questions()
    asked = [Step("scored", name) for name in questions]
    both = [(first, second) for first in asked for second in asked]
    for change in (REPLACE, GROW):
        both += [(each, change) for name in questions for each in [Step("whole", name), Step("scored", name)]]
        both += [(change, Step("whole", name)) for name in questions]
    writers = [Step("replaced", "featurize", NEW, (NEW,)), Step("featurized", "score"), Step("empty", "featurize")]
    for writer in writers:
        readers = [Step(writer.begin, name, writer.data, writer.before) for name in questions]
        both += [pair for reader in readers for pair in ((writer, reader), (reader, writer))]
    return both


KINDS = {
    "manifest": ["zarr.json"],
    "documents of tables": ["checkpoints/*/zarr.json", "targets/*/*/zarr.json"],
    "documents of arrays": ["checkpoints/*/*/zarr.json", "targets/*/*/*/zarr.json"],
    "documents of groups": ["checkpoints/zarr.json", "targets/**/zarr.json", "scores/**/zarr.json"],
    "features": ["*/**/features/c/*/0"],
    "scales, loss derivatives and norms": ["*/**/floats/c/*/0"],
    "labels, fingerprints and checksums": ["*/**/integers/c/*/0"],
    "marks": ["*/**/done/c/*"],
    "scores": ["scores/*/*/*/*/c/**/*", "cosines/*/*/*/*/c/**/*"],
    "documents of scores": ["scores/*/*/*/**/zarr.json", "cosines/*/*/*/**/zarr.json"],
    "kernels": ["kernels/**/c/**/*"],
    "documents of kernels": ["kernels/**/zarr.json"],
    "top": ["top/**/c/**/*"],
    "documents of top": ["top/**/zarr.json"],
}
HARMS = ("flipped bits", "cut", "emptied", "removed", "zeros", "longer")


def harm(path: Path, how: str, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped bits":
        for place in rng.integers(len(data), size=rng.integers(1, 4)).tolist() if data else ():
            data[place] ^= 1 << int(rng.integers(8))
    elif how == "zeros":
        start = int(rng.integers(max(1, len(data))))
        data[start : start + 512] = bytes(len(data[start : start + 512]))
    elif how == "removed":
        path.unlink()
        return
    else:
        size = {"cut": int(rng.integers(max(1, len(data)))), "emptied": 0, "longer": len(data) + 7}[how]
        data = data[:size] + bytes(max(0, size - len(data)))
    path.write_bytes(data)


class Stores:
    """Stores in every state that trials begin with, and the right answers; both are made once."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder / world.storage, world
        self.truths: dict[tuple[str, str], np.ndarray] = {}
        for name in ("empty", "measured"):
            (self.folder / name).mkdir(parents=True)
        self._make("featurized", "empty", lambda path: world.featurize(path))
        self._make("scored", "featurized", lambda path: world.score(path))
        self._make("whole", "scored", lambda path: self._ask(path, FIRST))
        self._make("replaced", "whole", lambda path: world.replace(path))
        self._make("changed", "replaced", lambda path: world.job(path, NEW))
        self._make("grown", "whole", lambda path: world.grow(path))
        for data in (NEW, LONG):
            self._make(
                f"of {data.name}", "empty", lambda path, data=data: (world.job(path, data), self._ask(path, data))
            )

    def _make(self, name: str, begin: str, work) -> None:
        shutil.copytree(self.folder / begin, self.folder / name)
        work(self.folder / name)

    def _everything(self, data: Data, path: Path) -> None:
        self.world.job(path, data)
        self._ask(path, data)

    def _ask(self, path: Path, data: Data) -> None:
        for question in self.world.questions():
            self.truths[data.name, question] = self.world.ask(path, question)

    def copy(self, name: str, path: Path, rng: np.random.Generator) -> str:
        """Copy a store, or a whole one with some damage; return what was damaged."""
        shutil.copytree(self.folder / ("whole" if name == "damaged" else name), path)
        if name != "damaged":
            return ""
        kind = str(rng.choice([kind for kind in KINDS if kind != "manifest" and self.files(path, kind)]))
        return self.damage(path, kind, str(rng.choice(HARMS)), rng)

    @staticmethod
    def files(path: Path, kind: str) -> list[Path]:
        return sorted({file for each in KINDS[kind] for file in path.glob(each) if file.is_file()})

    def damage(self, path: Path, kind: str, how: str, rng: np.random.Generator) -> str:
        file = self.files(path, kind)[int(rng.integers(len(self.files(path, kind))))]
        harm(file, how, rng)
        return f"{file.relative_to(path)} {how}"

    def measured(self, work: Step, path: Path) -> tuple[int, int]:
        """Return the moments and the bytes of a step."""
        known = self.folder / "measured" / f"{work.begin}, {work.name}, {work.data.name}"  # for other trials too
        if not known.exists():
            self.copy(work.begin, path, np.random.default_rng(0))
            child = Child(partial(step, self.world, work.name, path, work.data), free=1 << 40)
            assert child.wait() in ("right", "refused"), child.value
            shutil.rmtree(path)
            known.write_text(f"{child.moments} {child.bytes}")
        moments, size = known.read_text().split()
        return int(moments), int(size)


class Wrong(Exception):
    """A trial that ended as it must not."""

    def __init__(self, outcome: str, what: str) -> None:
        super().__init__(what)
        self.outcome = outcome


@dataclass(frozen=True)
class Broken:
    """A store after a fault.

    Attributes:
        before: The data sets whose answers are right until the work is done again.
        end: The data set that the work is about.
        again: Steps that the user repeats.
        damaged: Whether files are other than they were written.
    """

    before: set[Data]
    end: Data
    again: tuple[Step, ...]
    damaged: bool


@dataclass
class Trial:
    """One trial: a fault, and what came of it.

    Attributes:
        fault: Its kind.
        seed: The seed of everything in it.
        stores: Where it begins.
        path: An unused directory.
    """

    fault: str
    seed: int
    stores: Stores
    path: Path
    what: list[str] = field(default_factory=list)
    outcome: str = ""
    refused: bool = False
    rebuilt: bool = False

    def start(self) -> Trial:
        """Start the trial in a process of its own."""
        self.child = Child(self._run)
        return self

    def end(self) -> Trial:
        """Wait for the outcome."""
        state = self.child.wait()
        if state == "right":
            self.outcome, self.what = self.child.value
        else:
            self.outcome = {"hangs": "hangs"}.get(state, "foreign error")
            self.what.append(str(self.child.value))
        return self

    def _run(self) -> tuple[str, list[str]]:
        self.rng = np.random.default_rng(self.seed)
        self.world, self.store = self.stores.world, self.path / "store"
        try:
            self._mend(self._break())
        except (Wrong, DeadEnd) as error:
            self.what.append(f"{error}")
            self.outcome = getattr(error, "outcome", "dead end")
        shutil.rmtree(self.path)
        return self.outcome or GOOD[2 if self.rebuilt else 1 if self.refused else 0], self.what

    def _pick(self, choices):
        return choices[int(self.rng.integers(len(choices)))]

    def _break(self) -> Broken:
        """Break a store, or the work on one."""
        self.path.mkdir()
        if self.fault in KINDS:
            self.stores.copy("whole", self.store, self.rng)
            self.what.append(self.stores.damage(self.store, self.fault, self._pick(HARMS), self.rng))
            return Broken({FIRST}, FIRST, (), True)
        if self.fault == "two processes":
            return self._race(*self._pick(pairs(self.world)))
        work = self._pick(steps(self.world))
        moments, size = self.stores.measured(work, self.store)
        self.what.append(f"{work.name} of a store that is {work.begin}")
        self.what.append(self.stores.copy(work.begin, self.store, self.rng))
        run = partial(step, self.world, work.name, self.store, work.data)
        if self.fault == "full disk":
            free = int(self.rng.integers(size + 1))
            self.what.append(f"{free} of {size} bytes")
            self._seen(Child(run, free=free), work)
        else:
            moment = int(self.rng.integers(1, moments + 1))
            self.what.append(f"moment {moment} of {moments}")
            self._seen(Child(run, moment, self.fault, self.store, self.seed), work)
            if (survivors := self.store.with_name("survivors")).exists():
                shutil.rmtree(self.store)
                survivors.rename(self.store)
        return Broken(set(work.before), work.data, (work,) * work.redo, work.begin == "damaged")

    def _race(self, first: Step, second: Step) -> Broken:
        moments = [self.stores.measured(work, self.store)[0] for work in (first, second)]
        self.stores.copy(first.begin, self.store, self.rng)
        stops = [int(self.rng.integers(1, count + 1)) for count in moments]
        self.what.append(f"{first.name} at {stops[0]}, {second.name} at {stops[1]} of a store that is {first.begin}")
        children = []
        for work, stop in zip((first, second), stops, strict=True):
            children.append(Child(partial(step, self.world, work.name, self.store, work.data), stop, "pause"))
            children[-1].wait()
        for child in children:
            child.go()
        for child, work in zip(children, (first, second), strict=True):
            self._seen(child, work)
        again = tuple(each for each in (first, second) if each.redo)
        end = again[0].data if again else first.data
        return Broken({*first.before, *second.before, end}, end, again, False)

    def _seen(self, child: Child, work: Step) -> None:
        """Judge what a process that was disturbed returned."""
        state = child.wait()
        if state in ("foreign", "hangs"):
            raise Wrong("foreign error" if state == "foreign" else "hangs", f"{work.name}: {child.value}")
        if state == "refused":
            self.refused = True
            self.what.append(str(child.value))
        if state == "right" and work.name in self.world.questions():
            self._judge(work.name, child.value, {*work.before, work.data})

    def _judge(self, question: str, answer: np.ndarray, states) -> None:
        truths = [self.stores.truths[data.name, question] for data in states]
        if not any(self.world.is_right(answer, truth) for truth in truths):
            raise Wrong("wrong", f"the answer to {question} is wrong")

    def _mend(self, broken: Broken) -> None:
        """Ask, do what is left and what errors say, ask again, and verify."""
        if self.rng.random() < 0.4:
            self._verify(broken)
        if self.rng.random() < 0.7:
            for question in self.rng.permutation(self.world.questions()).tolist():
                try:
                    self._judge(question, self.world.ask(self.store, question), broken.before)
                except TracerError as error:
                    if self._refuse(error) == "remove":
                        break  # what is gone is not among all checkpoints
        for work in broken.again:
            self._until_done(partial(step, self.world, work.name, self.store, work.data))
        self._finish(broken.end)
        if not self._verify(broken):  # of what nobody had asked for
            self._finish(broken.end)
            if not (found := verify(self.store, progress=False)).ok:
                raise Wrong("dead end", f"verify always finds {found}")

    def _finish(self, data: Data) -> None:
        job = partial(self.world.job, self.store, data)
        self._until_done(job)
        for question in self.world.questions():
            answer = self._until_done(partial(self.world.ask, self.store, question), job)
            self._judge(question, answer, {data})

    def _verify(self, broken: Broken) -> bool:
        try:
            found = verify(self.store, progress=False)
        except TracerError as error:
            self._refuse(error)
            return False
        if not found.ok and not broken.damaged:
            raise Wrong("damage unseen or invented", f"nothing is damaged, and verify says {found}")
        self.rebuilt = self.rebuilt or not found.ok
        return found.ok

    def _refuse(self, error: TracerError) -> str:
        self.refused = True
        done = follow(error, self.store, self.stores.folder / "whole")
        self.what.append(f"{type(error).__name__}: {error} [{done}]")
        self.rebuilt = self.rebuilt or done == "verify"
        return done

    def _until_done(self, work, between=None):
        """Do what errors say until the work is done."""
        errors: list[str] = []
        for _ in range(ROUNDS):
            try:
                return work()
            except TracerError as error:
                errors.append(str(error))
                self._refuse(error)
                if between is not None:
                    self._until_done(between)
        raise DeadEnd(f"nothing helps: {errors[-1]}")
