"""The values that are passed between the rooms of the library."""

from __future__ import annotations

import html
import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tracer.errors import MissingDependencyError

Batch = Any
"""A batch of a data loader: a tensor, or tuples, lists, mappings and dataclasses of tensors."""

Checkpoint = Mapping[str, Any] | str | os.PathLike[str]
"""A mapping with a state dict, or the path of a file or directory with one; with a preconditioner, one that holds the
optimizer's state dict too."""


@dataclass(frozen=True)
class SampleOutputs:
    """A task's values for each sample of a batch; all of shape ``[B]``.

    Attributes:
        output: The scalar f of each sample, differentiable in the model's parameters.
        loss: The sample's loss L, detached.
        loss_grad: Q = dL/df, detached, so that the gradient of the loss is ``loss_grad * gradient of output``.
        loss_hess: w = d²L/df², detached.
        label: The sample's class, integers, for selecting examples later. Default: None, no classes.
        baseline: The f of a model that has learnt nothing (logits or predictions of zero), detached. The regularization
            of ``influence`` follows from how far f has moved since. Default: None, unknown.
        rival: The class of greatest probability among those other than ``label``, integers. Default: None, no classes.
        rival_share: The rival's probability divided by that of all classes other than ``label``, detached.
    """

    output: Tensor
    loss: Tensor
    loss_grad: Tensor
    loss_hess: Tensor
    label: Tensor | None = None
    baseline: Tensor | None = None
    rival: Tensor | None = None
    rival_share: Tensor | None = None


def detached(outputs: SampleOutputs) -> SampleOutputs:
    """Return values without their graphs."""
    return _each(outputs, lambda value: value.detach())


def first_sample(outputs: SampleOutputs) -> SampleOutputs:
    """Return the values of the first sample."""
    return _each(outputs, lambda value: value[:1])


def _each(outputs: SampleOutputs, change: Callable[[Tensor], Tensor]) -> SampleOutputs:
    values = {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    return replace(outputs, **{name: change(value) for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Projection:
    """Features of a batch of samples.

    Attributes:
        features: ``[B, dim]``, the projected gradients of f; float32, or float64 for float64 gradients.
        squared_norm: ``[B]``, float64, the exact squared norm of the gradient of f over all selected parameters.
    """

    features: Tensor
    squared_norm: Tensor


class _TopK(NamedTuple):
    indices: np.ndarray
    scores: np.ndarray


class TopK(_TopK):
    """The strongest training examples of each target; unpacks into indices and scores.

    Args:
        indices: ``[num_targets, k]``, int64, indices of training examples, strongest first.
        scores: ``[num_targets, k]``, float32, their scores.
        ids: ``[num_targets, k]``, objects, the ids of these training examples. Default: None, unknown.
        target_ids: ``[num_targets]``, the ids of the targets. Default: None, unknown.

    Attributes:
        ids: As passed.
        target_ids: As passed.
    """

    ids: np.ndarray | None = None
    target_ids: Sequence[str | int] | None = None

    def __new__(
        cls,
        indices: np.ndarray,
        scores: np.ndarray,
        ids: np.ndarray | None = None,
        target_ids: Sequence[str | int] | None = None,
    ) -> TopK:
        """Make the pair of indices and scores."""
        found = super().__new__(cls, indices, scores)
        found.ids, found.target_ids = ids, target_ids
        return found

    def __repr__(self) -> str:
        count, k = self.indices.shape
        return f"TopK({count:,} targets, {k:,} training examples each)"

    def _repr_html_(self) -> str:
        count, k = self.indices.shape
        lines = []
        for target in range(min(count, _SHOWN_TARGETS)):
            pairs = zip(self._names(target), self.scores[target].tolist(), strict=True)
            cells = [f"{name}: {score:.3g}" for name, score in list(pairs)[:_SHOWN_EXAMPLES]]
            lines.append([target if self.target_ids is None else self.target_ids[target], *cells])
        headers = ["target", *range(1, min(k, _SHOWN_EXAMPLES) + 1)]
        return html_table(headers, lines, repr(self))

    def _names(self, target: int) -> list[Any]:
        return (self.indices if self.ids is None else self.ids)[target].tolist()

    def to_pandas(self) -> Any:
        """Return a DataFrame with a line for each target and rank.

        Returns:
            The columns ``target``, ``rank`` (from 1), ``train_index`` and ``score``, and with ids ``target_id`` and
            ``train_id``.

        Raises:
            MissingDependencyError: If pandas is not installed.
        """
        count, k = self.indices.shape
        targets = np.repeat(np.arange(count), k)
        columns = {"target": targets}
        if self.target_ids is not None:
            columns["target_id"] = np.array([*self.target_ids, None], object)[targets]
        columns |= {"rank": np.tile(np.arange(1, k + 1), count), "train_index": self.indices.ravel()}
        if self.ids is not None:
            columns["train_id"] = self.ids.ravel()
        return data_frame({**columns, "score": self.scores.ravel()})


_SHOWN_TARGETS, _SHOWN_EXAMPLES = 5, 8
"""What a notebook shows of a `TopK`."""


def data_frame(columns: Mapping[str, Any]) -> Any:
    """Return a DataFrame of columns by name, or raise `MissingDependencyError`."""
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise MissingDependencyError(
            f"to_pandas needs pandas, which is not installed ({error}); install it with: pip install pandas."
        ) from error
    return pandas.DataFrame(dict(columns))


def html_table(headers: Sequence[object], lines: Iterable[Sequence[object]], caption: str = "") -> str:
    """Return a table for notebooks; all cells are texts.

    >>> html_table(["a"], [["<b>"]])
    '<table><tr><th>a</th></tr><tr><td>&lt;b&gt;</td></tr></table>'
    """

    def row(cells: Iterable[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    title = f'<caption style="text-align: left">{html.escape(caption)}</caption>' if caption else ""
    return f"<table>{title}{row(headers, 'th')}{''.join(row(line, 'td') for line in lines)}</table>"
