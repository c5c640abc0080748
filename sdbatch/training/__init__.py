"""The trainer of the built-in model and the synthetic world it learns. Needs torch alone; Ray for many workers."""

from sdbatch.training.recipe import FineTuning, Recipe

__all__ = ["FineTuning", "Recipe"]
