"""The task distill: a trained model is swapped and repaired, and what its quality was before, between and after."""
