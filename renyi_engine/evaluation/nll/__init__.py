"""Which examples are contested, and which nobody explains, from the log-likelihoods of a data set."""
