"""lm-eval's tasks on anything that the toolkit makes or serves, and the verdict on what they say."""
