"""Measures of attribution on plain arrays, which grade the scores of any library.

Layout: N training examples, M targets, S subsets, R removals. Scores are ``[N, M]``. A positive score means a
proponent: training on the example raised the target's output, or lowered its loss. Arguments can be numpy arrays, torch
tensors, lists, or anything else that ``np.asarray`` accepts.
"""

from tracer.metrics.datamodels import LDS, lds
from tracer.metrics.detection import MislabelDetection, mislabel_detection
from tracer.metrics.interventions import Brittleness, TailPatch, brittleness, tail_patch
from tracer.metrics.planted import PlantedDetection, TopCardinality, planted_detection, top_cardinality
from tracer.metrics.ranks import spearman
from tracer.metrics.removal import RemovalCorrelation, removal_correlation
from tracer.metrics.sanity import ClassAgreement, RandomizationCheck, class_agreement, randomization_check

__all__ = [
    "LDS",
    "Brittleness",
    "ClassAgreement",
    "MislabelDetection",
    "PlantedDetection",
    "RandomizationCheck",
    "RemovalCorrelation",
    "TailPatch",
    "TopCardinality",
    "brittleness",
    "class_agreement",
    "lds",
    "mislabel_detection",
    "planted_detection",
    "randomization_check",
    "removal_correlation",
    "spearman",
    "tail_patch",
    "top_cardinality",
]
