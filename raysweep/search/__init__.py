"""The search: an Optuna study a cell, inside one Ray Tune experiment."""
