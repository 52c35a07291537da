"""Train hundreds of small models on subsets of the training set: the ground truth that attributions predict."""

from tracer.retraining.cross_validation import CrossValidated, cross_validate
from tracer.retraining.ground_truth import Retrained, retrain
from tracer.retraining.recipe import Recipe
from tracer.retraining.smoothness import Smoothness, check_smoothness
from tracer.retraining.subsets import random_subsets
from tracer.retraining.training import EpochCheckpoint, TrainedModel, train_models

__all__ = [
    "CrossValidated",
    "EpochCheckpoint",
    "Recipe",
    "Retrained",
    "Smoothness",
    "TrainedModel",
    "check_smoothness",
    "cross_validate",
    "random_subsets",
    "retrain",
    "train_models",
]
