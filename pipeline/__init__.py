"""Core of the distillation pipeline. Imports neither Prefect nor any UI."""

__version__ = "0.1.0"
