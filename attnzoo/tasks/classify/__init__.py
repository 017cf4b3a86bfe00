"""Training image classifiers with any attention: configs, data, checkpoints and the loop."""
