"""Write a report: check the arguments, render the page, draw the figures, write the files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from tracer._core.validation import check_choice
from tracer.errors import InputError, InputTypeError
from tracer.report import charts, content, page, tables
from tracer.report.figure import SLIDE, Figure
from tracer.report.health import descending
from tracer.report.label_noise import LabelEvidence, WrongLabels, out_of_sample_health
from tracer.report.png import png
from tracer.report.samples import Samples, as_array, check_class_names, class_codes
from tracer.report.summaries import summarize_scores
from tracer.types import TopK


class ReportOptions(TypedDict, total=False):
    """Further arguments of `write_report`, all optional.

    Attributes:
        train_predictions: ``[N]``, the model's predictions, in the form of the labels.
        target_predictions: ``[M]``, the model's predictions, in the form of the labels.
        train_ids: ``[N]``, texts or integers, by which examples are known; those that are paths of files become links.
        target_ids: ``[M]``, the same of targets.
        feature_names: The name of each number of a vector.
        known_mislabelled: ``[N]``, bool, True for training examples whose label is known to be wrong. Adds the
            recovery curve.
        rankings: Other scores ``[N]`` by name to compare self-influence with, for example the loss; higher is checked
            earlier.
        order_by: The name of the ranking that orders suspects. Default: self-influence.
        train_probabilities: ``[N, C]``, out-of-sample probabilities of the classes, for example from cross-validation;
            adds the estimate of wrong labels, in place of ``health``. Labels are class indices then.
        health: The estimate of wrong labels, or the reason why there is none.
        warnings: Sentences that are shown first.
        train_tokens: The tokens of each training example, for texts.
        target_tokens: The tokens of each target.
        token_scores: By (target, training example): one number for each token of the training example, its
            contribution to the score, shown as a color.
        settings: How the scores were computed, shown as a table; ``estimator`` and ``checkpoints`` are shown first.
        shown_targets: Indices of the targets that come first. Default: six, spread evenly.
        num_top_examples: The number of training examples in ``top_self_influence.png``. Default: 24.
    """

    train_predictions: Any
    target_predictions: Any
    train_ids: Sequence[str | int] | None
    target_ids: Sequence[str | int] | None
    feature_names: Sequence[str] | None
    known_mislabelled: Any
    rankings: Mapping[str, Any] | None
    order_by: str
    train_probabilities: Any
    health: WrongLabels | str
    warnings: Sequence[str]
    train_tokens: Sequence[Sequence[str]] | None
    target_tokens: Sequence[Sequence[str]] | None
    token_scores: Mapping[tuple[int, int], Any] | None
    settings: Mapping[str, Any] | None
    shown_targets: Sequence[int] | None
    num_top_examples: int


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
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    figures: bool = True,
    title: str = "Influence report",
    **options: Unpack[ReportOptions],
) -> Path:
    """Write a self-contained ``index.html`` and, in the same folder, CSV tables, PNG figures and top examples.

    Files of an earlier report in the folder are replaced. Inputs may be images ``[N, H, W]``, ``[N, C, H, W]`` or
    ``[N, H, W, C]``, vectors ``[N, D]``, texts, records (mappings), or a DataFrame.

    Args:
        directory: The folder to write to; created if it does not exist.
        self_influence: ``[N]``, as from `Tracer.self_influence`.
        proponents: The strongest proponents of each target, ``[M, k]``, as from `Tracer.top`.
        opponents: The strongest opponents of each target; their k may differ.
        scores: ``[N, M]``, read in blocks, as from `Tracer.finalize_scores`. Adds the distribution of scores and
            averages, and, with labels of both sides, the classes. Default: None.
        train_inputs: The inputs of the N training examples, or None.
        target_inputs: The inputs of the M targets, or None.
        train_labels: ``[N]``, class indices, names or numbers, or None.
        target_labels: ``[M]``, class indices, names or numbers, or None.
        class_names: The name of each class index, in a list or in a mapping such as ``id2label``.
        figures: Whether to write PNG files, which needs matplotlib. Default: True.
        title: The page's title.
        **options: As in `ReportOptions`.

    Returns:
        The path of ``index.html``.

    Raises:
        InputError: If sizes disagree, indices are out of range, self-influence is NaN or infinite, or a ranking has
            the name of another column.
        InputTypeError: If an option has an unknown name.
        NonFiniteError: If scores are NaN or infinite.
        MissingDependencyError: If matplotlib or, for images, Pillow is not installed.

    >>> import tempfile
    >>> import numpy as np
    >>> top = TopK(np.array([[1, 0]]), np.array([[0.5, 0.2]], dtype=np.float32))
    >>> low = TopK(np.array([[2]]), np.array([[-0.4]], dtype=np.float32))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     index = write_report(directory, self_influence=np.array([1.0, 3.0, 2.0]), proponents=top, opponents=low)
    ...     sorted(path.name for path in index.parent.iterdir())
    ['index.html', 'influence_scores.csv', 'influence_summary.csv', 'self_influence.png']
    """
    unknown = options.keys() - ReportOptions.__annotations__.keys()
    if unknown:
        raise InputTypeError(
            f"write_report() got the unknown option {min(unknown)!r}; expected "
            f"{', '.join(ReportOptions.__annotations__)}."
        )
    class_names = check_class_names(class_names)
    own = content.check_scores(self_influence, "self_influence")
    num_train, num_targets = len(own), len(proponents.indices)
    tokens = (options.get("train_tokens"), options.get("target_tokens"), options.get("token_scores"))
    rankings, order_by = (
        content.check_rankings(options.get("rankings") or {}, num_train),
        options.get("order_by", "self-influence"),
    )
    values = {"self-influence": own, **rankings}
    check_choice("order_by", order_by, values)
    names = (class_names, options.get("feature_names"))
    data = content.ReportContent(
        self_influence=own,
        order=descending(values[order_by]),
        order_by=order_by,
        proponents=content.check_top(proponents, "proponents", num_train, num_targets),
        opponents=content.check_top(opponents, "opponents", num_train, num_targets),
        train=Samples("train", num_train, train_inputs, train_labels, options.get("train_predictions"), *names),
        target=Samples("target", num_targets, target_inputs, target_labels, options.get("target_predictions"), *names),
        known_mislabelled=content.check_mask(options.get("known_mislabelled"), num_train),
        rankings=rankings,
        health=content.check_health(_health(options, train_labels), num_train),
        warnings=list(options.get("warnings") or ()),
        settings=dict(options.get("settings") or {}),
        shown_targets=content.check_shown(options.get("shown_targets"), num_targets),
        num_top_examples=options.get("num_top_examples", 24),
        train_ids=content.check_report_ids(options.get("train_ids"), num_train, "train_ids"),
        target_ids=content.check_report_ids(options.get("target_ids"), num_targets, "target_ids"),
        train_tokens=tokens[0],
        target_tokens=tokens[1],
        token_scores=content.check_tokens(*tokens, num_train, num_targets),
    )
    if scores is not None and num_targets:
        data = _with_scores(data, scores, class_names)
    html = page.render_page(title, data, Path(directory))
    drawn = {name: png(figure) for name, figure in _slides(data).items()} if figures else {}
    return _write(Path(directory), html, data, drawn)


def _with_scores(data: content.ReportContent, scores: Any, class_names: Sequence[str] | None) -> content.ReportContent:
    """Return the content with a summary of all scores, by class if both sides have classes."""
    shape, expected = list(getattr(scores, "shape", ())), [data.num_train, data.target.size]
    if shape != expected:
        raise InputError(
            f"scores have shape {shape}; expected {expected}, a line for each training example and a column for each "
            "target, as Tracer.finalize_scores returns them."
        )
    both = data.train.has_classes and data.target.has_classes
    if not both or len(set(data.target.labels or ())) < 2:
        return replace(data, summary=summarize_scores(scores))
    (train_codes, target_codes), names = class_codes(data.train, data.target, class_names=class_names)
    summary = summarize_scores(scores, train_codes, target_codes, len(names))
    assert summary.classes is not None
    return replace(data, summary=summary, class_names=names, train_codes=train_codes)


def _health(options: ReportOptions, train_labels: Any) -> WrongLabels | str:
    """Return the estimate of wrong labels from given probabilities, the given one, or why there is none."""
    probabilities = options.get("train_probabilities")
    if probabilities is None:
        return options.get("health", "")
    if train_labels is None:
        return "train_probabilities need train_labels."
    evidence = LabelEvidence.of_probabilities(as_array(train_labels, "train_labels"), as_array(probabilities, "p"))
    return out_of_sample_health("probabilities", evidence)


_TITLES = {
    "self_influence": "Self-influence of training examples",
    "recovery": "Finding mislabelled examples",
    "scores": "Scores of all training examples and targets",
    "class_influence": "Mean scores by class",
    "top_self_influence": "Training examples of highest self-influence",
    "influence": "Proponents and opponents",
}


def _slides(data: content.ReportContent) -> dict[str, Figure]:
    """Return the figures that become PNG files, by name, each below its title."""
    return {name: figure.below(_TITLES[name]) for name, figure in _figures(data).items()}


def _figures(data: content.ReportContent) -> dict[str, Figure]:
    known, classes = data.known_mislabelled, data.classes
    groups = page.self_influence_groups(data)
    drawn = {"self_influence": charts.histogram(groups, "self-influence (dashed: median)", "% of each group", SLIDE)}
    if known is not None:
        drawn["recovery"] = charts.recovery_slide(page.all_rankings(data), known)
    if data.summary is not None:
        drawn["scores"] = charts.signed_histogram(data.summary.edges, data.summary.counts, SLIDE)
    if classes is not None:
        drawn["class_influence"] = charts.class_map(classes.influence, data.class_names, classes.train_counts, 24)
    top = descending(data.self_influence)[: data.num_top_examples]
    if data.train.kind == "images" and len(top):
        drawn["top_self_influence"] = charts.ranking_montage(data.train, top, data.self_influence, known)
    if data.train.kind == data.target.kind == "images" and data.shown_targets:
        ends = (data.proponents, data.opponents)
        drawn["influence"] = charts.influence_montage(data.train, data.target, *ends, data.shown_targets, known)
    return drawn


def _write(directory: Path, html: str, data: content.ReportContent, pngs: Mapping[str, bytes]) -> Path:
    """Write all files, the page last, and return its path."""
    # every table is made before the first file is written, so that an error leaves no half of a report
    texts = {"influence_summary.csv": tables.summary_csv(data), "influence_scores.csv": tables.scores_csv(data)}
    if data.summary is not None:
        texts["target_summary.csv"] = tables.targets_csv(data)
    if data.classes is not None:
        texts["class_influence.csv"] = tables.classes_csv(data)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"directory is {str(directory)!r}, where a file is; expected a directory.") from error
    if data.classes is not None:
        tables.write_top_influences(directory, data)
    for name, image in pngs.items():
        (directory / f"{name}.png").write_bytes(image)
    for name, text in texts.items():
        tables.write_text(directory / name, text)
    index = directory / "index.html"
    tables.write_text(index, html)
    return index
