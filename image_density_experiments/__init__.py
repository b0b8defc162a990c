"""Image density experiments: Glow, and the models that share one estimator among the steps of a level."""
