"""The model as its files describe it: shape, precision, weights and tokenizer."""
