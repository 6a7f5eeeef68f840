"""Training: the recipe, the adapters, the trainer, and the stages of a run."""
