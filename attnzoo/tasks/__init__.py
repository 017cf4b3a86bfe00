"""Tasks: the data, the model building and the metric that training, evaluation and the benchmark share."""
