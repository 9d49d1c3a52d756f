"""What an extraction will take, and what of the machine stands in its way."""
