"""Many runs: the queue, workers, launcher, status, MLflow."""
