"""The estimator: starts on a grid, a batched Levenberg-Marquardt, variance components. numpy only."""
