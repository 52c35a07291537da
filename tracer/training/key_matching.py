"""Match the names in a checkpoint with a model's: find the one renaming under which all of them agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tracer._core.text import listing
from tracer.errors import CheckpointError

# What DDP, torch.compile, FSDP, activation checkpointing and Lightning Fabric put between two parts of a name.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


@dataclass(frozen=True)
class Match:
    """The model's name of each name in a checkpoint, and the names that disagree on each side."""

    names: dict[str, str]
    missing: list[str]
    unexpected: list[str]
    removed: str  # the prefix of the checkpoint's names that the model's do not have

    @property
    def disagreements(self) -> int:
        """The number of names that disagree."""
        return len(self.missing) + len(self.unexpected)


def match_names(names: Mapping[str, str], required: Iterable[str], given: Iterable[str]) -> Match:
    """Return the renaming under which all given names are known and all required ones given, or else the nearest.

    Names may have those of wrappers in them, and all names of one side a prefix. ``names`` has each known name's
    canonical one, which is that of ``required``. Equal names come first.

    Raises:
        CheckpointError: If two renamings agree.
    """
    given, required = list(given), set(required)
    found = [_match(names, required, given, given, "", "")]
    if not found[0].disagreements:
        return found[0]
    for clean in (str, _bare):
        known, cleaned = _renamed(names, clean), [clean(name) for name in given]
        if known is None or len({*cleaned}) < len(given):
            continue  # two names would become one
        hits = Counter((prefix, "") for name in cleaned for prefix, rest in _splits(name) if rest in known)
        held = {*cleaned}
        hits.update(("", prefix) for name in known for prefix, rest in _splits(name) if rest in held)
        found += [_match(known, required, given, cleaned, *side) for side, _ in [*hits.most_common(8), (("", ""), 0)]]
    agreeing = [one for one in found if not one.disagreements]
    if any(one.names != agreeing[0].names for one in agreeing):
        raise CheckpointError(
            f"the names in the checkpoint, {listing([repr(name) for name in given])}, fit the model in two ways: "
            f"rename them to the model's, {listing([repr(name) for name in sorted(required)])}"
        )
    return min(found, key=lambda one: one.disagreements)


def _match(
    known: Mapping[str, str], required: set[str], given: list[str], cleaned: list[str], removed: str, added: str
) -> Match:
    """Return how names match if one prefix is removed from the checkpoint's and another one added."""
    found = {}
    for name, clean in zip(given, cleaned, strict=True):
        key = known.get(added + clean.removeprefix(removed)) if clean.startswith(removed) else None
        if key is not None:
            found[name] = key
    covered = {*found.values()}
    missing = [key for key in dict.fromkeys(known.values()) if key in required and key not in covered]
    return Match(found, missing, [name for name in given if name not in found], removed)


def _renamed(names: Mapping[str, str], clean: Callable[[str], str]) -> dict[str, str] | None:
    """Return cleaned names with their canonical ones; None if names of two things would become equal."""
    found: dict[str, str] = {}
    for name, key in names.items():
        if found.setdefault(clean(name), key) != key:
            return None
    return found


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _splits(name: str) -> list[tuple[str, str]]:
    """Return the ways to divide a name after a dot."""
    return [(name[: at + 1], name[at + 1 :]) for at, letter in enumerate(name) if letter == "."]
