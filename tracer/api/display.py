"""What a notebook and a terminal show of an attribution: a few targets with their strongest training examples."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tracer._core.text import printable
from tracer._core.validation import check_count
from tracer.api.example_names import example_index
from tracer.api.report_metadata import class_labels
from tracer.data.datasets import DataSource
from tracer.data.displayable import displayable
from tracer.errors import InputError, MissingDependencyError, TracerError
from tracer.report.png import png_bytes
from tracer.report.samples import Samples, as_array
from tracer.report.text import number, shortened
from tracer.scoring.scorer import KINDS
from tracer.types import TopK, data_frame

if TYPE_CHECKING:
    from tracer.api.attribution import Attribution

_TARGETS, _EXAMPLES = 3, 4
"""How many targets a notebook shows unasked, and how many proponents and opponents of each."""

_FREE_SCORES = 10_000_000  # more are not computed only to be shown
_TEXT, _NUMBERS, _SIDE = 300, 6, 96  # characters, numbers and pixels that are shown of an example


@dataclass(frozen=True)
class Card:
    """An example as it is shown."""

    name: str  # its index, and its id if it has one
    label: str
    text: str  # of its input, empty for images and examples that are not at hand
    image: bytes = b""  # a PNG file
    score: float | None = None

    def html(self) -> str:
        """Return a cell of a table."""
        color = "#2f7fd6" if (self.score or 0) >= 0 else "#cf5f1f"  # readable on white and on black
        score = "" if self.score is None else f'<div style="color: {color}">{number(self.score, signed=True)}</div>'
        source = base64.b64encode(self.image).decode("ascii")
        style = f"width: {_SIDE}px; image-rendering: pixelated"
        about = html.escape(f"example {self.name}", quote=True)
        picture = f'<div><img alt="{about}" style="{style}" src="data:image/png;base64,{source}"></div>'
        shown = picture if self.image else f'<div style="white-space: pre-wrap">{html.escape(self.text)}</div>'
        label = f"<div>label <b>{html.escape(self.label)}</b></div>" if self.label else ""
        name = f"<small>{html.escape(self.name)}</small>"
        return f'<td style="text-align: left; vertical-align: top">{name}{shown}{label}{score}</td>'

    def line(self) -> str:
        """Return a line of text."""
        score = "" if self.score is None else f"{self.score:+12.4g}  "
        label = f"  label {self.label}" if self.label else ""
        text = "  " + self.text.replace("\n", ", ") if self.text else ""
        return printable(f"{score}{self.name}{label}{text}")


class Shown:
    """Targets with their strongest training examples; a notebook shows a table, a terminal text.

    Args:
        title: The line above them.
        targets: Each target with its proponents and opponents.
    """

    def __init__(self, title: str, targets: Sequence[tuple[Card, dict[str, list[Card]]]]) -> None:
        self._title, self._targets = title, targets

    def __repr__(self) -> str:
        lines = [self._title]
        for target, ends in self._targets:
            lines.append(f"target {target.line()}")
            lines += [f"  {kind[:-1]:<10} {card.line()}" for kind, cards in ends.items() for card in cards]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = []
        for target, ends in self._targets:
            for place, (kind, cards) in enumerate(ends.items()):
                first = target.html().replace("<td", f'<td rowspan="{len(ends)}"', 1) if not place else ""
                rows.append(f"<tr>{first}<th>{kind}</th>{''.join(card.html() for card in cards)}</tr>")
        head = "<tr><th>target</th></tr>"
        return f"<div>{html.escape(self._title)}</div><table>{head if rows else ''}{''.join(rows)}</table>"


def show(
    _found: Attribution,
    target: int | str | Sequence[int | str] = 0,
    k: int = 5,
    *,
    inputs: Any = None,
    target_inputs: Any = None,
    class_names: Sequence[str] | None = None,
) -> Shown:
    """Return some targets with their proponents and opponents, which a notebook shows with images, texts or numbers.

    Args:
        target: The index or id of a target, or several. Default: the first.
        k: The number of proponents and of opponents. Default: 5.
        inputs: All training examples as images, vectors, texts or records. Default: what `attribute` was given, unless
            that is tokens; of a language model's store the texts.
        target_inputs: All targets in such a form.
        class_names: The name of each class index. Default: the index.

    Returns:
        An object for notebooks, which prints as text.

    Raises:
        InputError: If there is no such target.
    """
    store, k = _found.tracer.store, min(check_count(k, "k"), _found.tracer.train_set_size)
    chosen = [target] if isinstance(target, (int, str, np.integer)) else list(target)
    rows = [example_index(store, each, _found.exp_name) for each in chosen]
    tops = {kind: _found.top(k, kind) for kind in KINDS}
    wanted = np.unique(np.concatenate([top.indices[rows].ravel() for top in tops.values()]))
    train = _Examples(_found, None, wanted, inputs, class_names)
    explained = _Examples(_found, _found.exp_name, np.unique(rows), target_inputs, class_names)
    return Shown(
        f"{_found.estimators.top}: proponents lowered the target's loss, opponents raised it",
        [(explained.card(row), {kind: list(_cards(train, tops[kind], row, kind)) for kind in KINDS}) for row in rows],
    )


def _cards(train: _Examples, top: TopK, row: int, kind: str) -> Iterator[Card]:
    for index, score in zip(top.indices[row].tolist(), top.scores[row].tolist(), strict=True):
        if (score > 0) == (kind == "proponents") and score:  # the k strongest go past zero if fewer help, or harm
            yield train.card(index, score)


class _Examples:
    """Some training examples, or targets, with their ids, labels and inputs."""

    def __init__(
        self,
        found: Attribution,
        exp_name: str | None,
        indices: np.ndarray,
        inputs: Any,
        class_names: Sequence[str] | None,
    ) -> None:
        store = found.tracer.store
        model_id = found._checkpoints[0]
        table = store.checkpoint(model_id) if exp_name is None else store.targets(exp_name, model_id)
        labels, self._known = class_labels(table), store.ids(exp_name).known()
        self._places = {index: place for place, index in enumerate(indices.tolist())}
        source: DataSource | None = found.sources[0 if exp_name is None else 1]
        role, own = ("train" if exp_name is None else "target"), None if labels is None else labels[indices]
        names = None if labels is None else class_names
        if inputs is not None:
            self._samples = Samples(role, len(indices), _selected(inputs, indices), own, None, names)
            return
        self._samples = Samples(role, len(indices), None, own, None, names)
        if source is not None and len(source):
            with suppress(InputError):  # of a form that cannot be shown, such as tensors of five dimensions
                self._samples = Samples(role, len(indices), displayable(source, indices)[0], own, None, names)

    def card(self, index: int, score: float | None = None) -> Card:
        place, samples = self._places[index], self._samples
        name = f"{index} {self._known[index]}" if index in self._known else str(index)
        image, text = b"", ""
        if samples.kind == "images":
            try:
                image = png_bytes(samples.image(place))
            except MissingDependencyError:  # without Pillow the rest is shown
                text = ""
        elif samples.kind == "texts":
            text = shortened(samples.text(place), _TEXT)
        elif samples.kind == "vectors":
            names = samples.feature_names or [f"[{number}]" for number in range(len(samples.vector(place)))]
            pairs = list(zip(names, samples.vector(place).tolist(), strict=True))
            text = "\n".join(f"{name} {value:.4g}" for name, value in pairs[:_NUMBERS])
        return Card(name, samples.label(place), text, image, score)


def _selected(inputs: Any, indices: np.ndarray) -> Any:
    """Return the inputs of some examples."""
    if hasattr(inputs, "iloc"):
        return inputs.iloc[indices]
    chosen = [inputs[index] for index in indices.tolist()]
    return chosen if isinstance(inputs, (list, tuple)) else as_array(chosen, "inputs")


def as_text(_found: Attribution) -> str:
    """Return an attribution in one line."""
    store = _found.tracer.store
    path, here = str(store.path), os.path.join(os.getcwd(), "")
    targets = store.num_rows(_found.exp_name) if _found.exp_name in store.catalog.exp_names() else 0
    return (
        f"Attribution({path.removeprefix(here)!r}: {_found.tracer.train_set_size:,} training examples, {targets:,} "
        f"targets {_found.exp_name!r}, checkpoints {_found._checkpoints}, {_found.estimators})"
    )


def as_html(_found: Attribution) -> str:
    """Return an attribution for notebooks; targets are shown if their scores are known or cost little."""
    title = f"<div><b>{html.escape(as_text(_found))}</b></div>"
    try:
        targets = _found.tracer.store.num_rows(_found.exp_name)
        if 0 < targets * _found.tracer.train_set_size <= _FREE_SCORES and all(map(_is_cheap, _found.sources)):
            return title + show(_found, range(min(targets, _TARGETS)), _EXAMPLES)._repr_html_()
    except TracerError:
        pass  # not finished yet
    return title


def _is_cheap(source: DataSource | None) -> bool:
    return source is None or source.loads_by_index or not len(source)


def to_pandas(_found: Attribution, k: int = 10) -> Any:
    """Return a DataFrame of the strongest proponents and opponents of each target.

    Args:
        k: The number of each for a target. Default: 10.

    Returns:
        A line for each target, kind and rank: ``target``, ``kind``, ``rank`` (from 1), ``train_index``, ``score``, and,
        if they are known, ``target_id``, ``train_id``, ``target_label`` and ``train_label``.

    Raises:
        MissingDependencyError: If pandas is not installed.
    """
    store, k = _found.tracer.store, min(check_count(k, "k"), _found.tracer.train_set_size)
    model_id = _found._checkpoints[0]
    tops = {kind: _found.top(k, kind) for kind in KINDS}
    count = len(tops["proponents"].indices)
    targets = np.tile(np.repeat(np.arange(count), k), len(KINDS))
    indices = np.concatenate([top.indices.ravel() for top in tops.values()])
    columns: dict[str, Any] = {"target": targets}
    sides: tuple[Any, ...] = (
        ("target", targets, store.ids(_found.exp_name).listed(count), store.targets(_found.exp_name, model_id)),
        ("train", indices, store.ids().listed(_found.tracer.train_set_size), store.checkpoint(model_id)),
    )
    for name, rows, ids, table in sides:
        if name == "train":
            columns |= {
                "kind": np.repeat([kind[:-1] for kind in KINDS], count * k),
                "rank": np.tile(np.arange(1, k + 1), len(KINDS) * count),
                "train_index": indices,
            }
        if ids is not None:
            columns[f"{name}_id"] = [ids[row] for row in rows.tolist()]
        labels = class_labels(table)
        if labels is not None:
            columns[f"{name}_label"] = labels[rows]
    return data_frame({**columns, "score": np.concatenate([top.scores.ravel() for top in tops.values()])})
