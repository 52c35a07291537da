"""The estimators that answer the questions asked of a store, if the user names none, or ``auto``."""

from __future__ import annotations

from dataclasses import dataclass

from tracer._core.validation import check_choice
from tracer.gradients.preconditioning import KRONECKER
from tracer.scoring.estimators import ESTIMATORS, Estimate
from tracer.store.manifest import Manifest

CHOICES = (*ESTIMATORS, "auto")
"""The values of ``estimator=`` of an attribution."""

_RUN = "scores add up what this run's steps on an example did to the target's loss"
_DIRECTION = "proponents are ranked without the size of gradients, which would put hard and wrong examples first"


@dataclass(frozen=True)
class Estimators:
    """The estimator of each question.

    Attributes:
        scores: That of the scores of all pairs.
        top: That of proponents and opponents: which examples pulled towards a prediction?
        self_influence: That of self-influence: which labels are wrong, which examples unusual?
        reason: Why these, if the user did not name one.
    """

    scores: str
    top: str
    self_influence: str
    reason: str = ""

    @classmethod
    def of(cls, name: str | None, manifest: Manifest) -> Estimators:
        """Return the estimators of a store.

        Args:
            name: One estimator for all questions; ``auto``: for scores the one that predicts best, from what the store
                holds, what training without examples would change; None: ``tracin`` for scores. For both, ``cosine``
                ranks proponents and opponents.
            manifest: The settings of the store.

        Raises:
            InputError: If the estimator is not known.
        """
        if name is None:
            return cls("tracin", "cosine", "tracin", f"{_RUN}; {_DIRECTION}")
        check_choice("estimator", name, CHOICES)
        if name != "auto":
            return cls(name, name, "tracin" if Estimate(name).is_cosine else name)
        scores, reason = _predictor(manifest)
        return cls(scores, "cosine", scores, f"{reason}; {_DIRECTION}")

    def __str__(self) -> str:
        return self.scores if self.scores == self.top else f"scores by {self.scores}, proponents by {self.top}"


def _predictor(manifest: Manifest) -> tuple[str, str]:
    """Return the estimator that predicts training without examples best, of those that a store allows, and why."""
    storage = manifest.feature_storage
    preconditioner = manifest.settings.get("preconditioner")
    if manifest.is_collected:
        return "tracin", "rows that GradientCollector collected are sums over steps, of which there is no kernel"
    if preconditioner in KRONECKER:
        return "tracin", f"inner products of gradients whitened by {preconditioner} are those of influence functions"
    if storage.is_binary or not storage.stores_features:
        return "tracin", f"storage={storage.name!r} keeps no features of which a kernel could be computed"
    if manifest.settings.get("shared_projection"):
        return "source", "the checkpoints share a projection, so the steps of the run can be unrolled"
    return "influence", "a Newton step with the curvature of the training loss predicts leaving examples out best"
