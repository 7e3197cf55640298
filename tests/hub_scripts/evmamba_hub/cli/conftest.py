from training_runs import make_recipe, stripes  # noqa: F401, fixtures
