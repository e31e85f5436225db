"""What a calibration text says about a model: scales of activations, clipped groups, ranges of keys and values."""
