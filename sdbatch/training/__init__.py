"""The trainer of the built-in model and the synthetic world it learns. Needs torch alone, no Ray."""

from sdbatch.training.recipe import Recipe

__all__ = ["Recipe"]
