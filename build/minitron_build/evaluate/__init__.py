"""What a precision costs: perplexity, Kullback-Leibler divergence and agreement against the unquantised model."""
