"""Write a report: check what came, draw the figures, write the files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tracer.report import content, drawing, sections, tables
from tracer.report.health import enough_classes, estimate_wrong_labels
from tracer.report.montage import influence_montage, ranking_montage
from tracer.report.page import page
from tracer.report.payload import payload
from tracer.report.recovery import ranking
from tracer.report.samples import Samples, class_codes
from tracer.report.summaries import summarize_scores
from tracer.types import TopK


def write_report(
    directory: str | os.PathLike[str],
    *,
    self_influence: Any,
    proponents: TopK,
    opponents: TopK,
    scores: Any = None,
    train_inputs: Any = None,
    target_inputs: Any = None,
    train_labels: Any = None,
    target_labels: Any = None,
    train_predictions: Any = None,
    target_predictions: Any = None,
    class_names: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    known_mislabelled: Any = None,
    rankings: Mapping[str, Any] | None = None,
    train_tokens: Sequence[Sequence[str]] | None = None,
    target_tokens: Sequence[Sequence[str]] | None = None,
    token_scores: Mapping[tuple[int, int], Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    shown_targets: Sequence[int] | None = None,
    num_top_rows: int = 24,
    figures: bool = True,
    title: str = "Influence report",
) -> Path:
    """Write a self-contained ``index.html`` and, beside it, CSV tables, PNG figures and the top rows of each class.

    Files of an earlier report in the directory are replaced. Inputs may be images ``[N, H, W]``, ``[N, C, H, W]`` or
    ``[N, H, W, C]``, vectors ``[N, D]``, texts, records (mappings), or absent.

    Args:
        directory: Where the files go; made where it does not exist.
        self_influence: ``[N]``, as from `Tracer.self_influence`.
        proponents: The strongest proponents of each target, ``[M, k]``, as from `Tracer.top`.
        opponents: The strongest opponents, likewise; its k may differ.
        scores: ``[N, M]``, read block by block, as from `Tracer.finalize_scores`: adds their distribution, averages,
            and with labels of both sides the classes and the estimate of wrong labels. Or None.
        train_inputs: The inputs of the N training rows, or None.
        target_inputs: The inputs of the M targets, or None.
        train_labels: ``[N]``, class indices, names or numbers, or None.
        target_labels: ``[M]``, likewise.
        train_predictions: ``[N]``, what the model predicts, likewise.
        target_predictions: ``[M]``, likewise.
        class_names: The name of each class index.
        feature_names: The name of each number of a vector.
        known_mislabelled: ``[N]``, bool, rows whose label is known to be wrong: adds the recovery curve. Or None.
        rankings: Other scores ``[N]`` by name, higher is checked earlier, to compare self-influence with.
        train_tokens: The tokens of each training row, for texts, or None.
        target_tokens: The tokens of each target, or None.
        token_scores: By (target, training row): one number for each token of the training row, what it adds to the
            row's score, shown as colours.
        settings: What the scores come from, shown as a table; ``estimator`` and ``checkpoints`` are shown first.
        shown_targets: Which targets come first; by default six, spread evenly.
        num_top_rows: How many rows of highest self-influence are drawn in ``top_self_influence.png``.
        figures: Draw PNG files with matplotlib; without, it is not needed.
        title: The page's title.

    Returns:
        The path of ``index.html``.

    Raises:
        InputError: If sizes disagree, indices are out of range, self-influence is NaN or infinite, or a ranking has
            the name of another column.
        NonFiniteError: If scores are NaN or infinite.
        MissingDependencyError: If matplotlib is not installed, or, for images, Pillow.

    >>> import tempfile
    >>> import numpy as np
    >>> top = TopK(np.array([[1, 0]]), np.array([[0.5, 0.2]], dtype=np.float32))
    >>> low = TopK(np.array([[2]]), np.array([[-0.4]], dtype=np.float32))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     index = write_report(directory, self_influence=np.array([1.0, 3.0, 2.0]), proponents=top, opponents=low)
    ...     sorted(path.name for path in index.parent.iterdir())
    ['index.html', 'influence_scores.csv', 'influence_summary.csv', 'self_influence.png']
    """
    own = content.check_scores(self_influence, "self_influence")
    num_rows, num_targets = len(own), len(proponents.indices)
    train = Samples(
        "train", num_rows, inputs=train_inputs, labels=train_labels, predictions=train_predictions,
        class_names=class_names, feature_names=feature_names,
    )  # fmt: skip
    target = Samples(
        "target", num_targets, inputs=target_inputs, labels=target_labels, predictions=target_predictions,
        class_names=class_names, feature_names=feature_names,
    )  # fmt: skip
    data = content.ReportContent(
        self_influence=own,
        order=ranking(own),
        proponents=content.check_top(proponents, "proponents", num_rows, num_targets),
        opponents=content.check_top(opponents, "opponents", num_rows, num_targets),
        train=train,
        target=target,
        known_mislabelled=content.check_mask(known_mislabelled, num_rows),
        rankings=content.check_rankings(rankings or {}, num_rows),
        settings=dict(settings or {}),
        shown_targets=content.check_shown(shown_targets, num_targets),
        num_top_rows=num_top_rows,
        tokens=content.check_tokens(train_tokens, target_tokens, token_scores, num_rows, num_targets),
    )
    if scores is not None and num_targets:
        data = _with_scores(data, scores, class_names)
    html = page(title, sections.summary(data), sections.build(data), payload(data))
    return _write(Path(directory), html, data, _pictures(data) if figures else {})


def _with_scores(data: content.ReportContent, scores: Any, class_names: Sequence[str] | None) -> content.ReportContent:
    """Return the content with what all scores say, by class where both sides have classes."""
    content.check_matrix(scores, data.num_rows, data.target.size)
    both = data.train.has_classes and data.target.has_classes
    if not both or len(set(data.target.labels or ())) < 2:
        return replace(data, summary=summarize_scores(scores))
    (train_codes, target_codes), names = class_codes(data.train, data.target, class_names=class_names)
    summary = summarize_scores(scores, train_codes, target_codes, len(names))
    assert summary.classes is not None
    health = estimate_wrong_labels(summary.classes) if enough_classes(summary.classes) else None
    return replace(data, summary=summary, class_names=names, health=health)


def _pictures(data: content.ReportContent) -> dict[str, bytes]:
    """Return PNG files by their names without the ending."""
    known = data.known_mislabelled
    drawn = {"self_influence": drawing.self_influence_histogram(data.self_influence, known)}
    if known is not None:
        drawn["recovery"] = drawing.recovery_figure({sections.SELF: data.self_influence, **data.rankings}, known)
    if data.summary is not None:
        drawn["scores"] = drawing.score_histogram(data.summary.edges, data.summary.counts)
        if data.summary.classes is not None:
            classes = data.summary.classes
            drawn["class_influence"] = drawing.class_figure(classes.influence, data.class_names, classes.train_counts)
    if data.train.kind == "images":
        rows = data.order[: data.num_top_rows]
        if len(rows):
            drawn["top_self_influence"] = ranking_montage(data.train, rows, data.self_influence, known)
        if data.target.kind == "images" and data.shown_targets:
            drawn["influence"] = influence_montage(
                data.train, data.target, data.proponents, data.opponents, data.shown_targets, known
            )
    return {name: drawing.png(figure) for name, figure in drawn.items()}


def _write(directory: Path, html: str, data: content.ReportContent, pictures: Mapping[str, bytes]) -> Path:
    """Write all files, the page last, and return its path; what can fail to be made is made before the first."""
    texts = {"influence_summary.csv": tables.summary_csv(data), "influence_scores.csv": tables.scores_csv(data)}
    if data.summary is not None:
        texts["target_summary.csv"] = tables.targets_csv(data)
        if data.summary.classes is not None:
            texts["class_influence.csv"] = tables.classes_csv(data)
    directory.mkdir(parents=True, exist_ok=True)
    if data.summary is not None and data.summary.classes is not None:
        tables.write_top_influences(directory, data)
    for name, picture in pictures.items():
        (directory / f"{name}.png").write_bytes(picture)
    for name, text in texts.items():
        tables.write_text(directory / name, text)
    index = directory / "index.html"
    tables.write_text(index, html)
    return index
