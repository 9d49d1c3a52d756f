"""What heads predict beside the truth, whatever the task."""
