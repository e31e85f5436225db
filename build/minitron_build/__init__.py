"""From a model to an engine: sources, checkpoint, plan, engines; and how good what came out is."""
