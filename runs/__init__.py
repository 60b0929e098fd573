"""What surrounds a training run: flags, preflight, memory plan, costs, diagnostics, checkpoints, trackers."""
