"""Train hundreds of small models on subsets of the train rows: what attributions are to predict."""

from tracer.retraining.recipe import Recipe
from tracer.retraining.subsets import random_subsets
from tracer.retraining.training import EpochCheckpoint, TrainedModel, train_models
from tracer.retraining.truth import Retrained, retrain

__all__ = ["EpochCheckpoint", "Recipe", "Retrained", "TrainedModel", "random_subsets", "retrain", "train_models"]
