"""Which examples are contested, and which no particle explains, from the log-likelihoods of a data set."""
