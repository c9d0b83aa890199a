"""The edge: YAML experiment files become frozen, validated models, or one message with every problem."""

from pipeline.config.experiment import Experiment
from pipeline.config.loading import load_experiment

__all__ = ["Experiment", "load_experiment"]
