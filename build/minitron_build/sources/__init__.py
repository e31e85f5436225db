"""Where weights come from: each source yields the same named tensors, one piece at a time."""
