"""Training on messages: configuration, data, model, loop, checkpoints, report."""
