"""Training: one replica, many replicas, checkpoints, going on after a stop."""
