"""What heads said beside the truth, whatever the task."""
