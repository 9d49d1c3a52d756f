"""Commands about heads, runs and models."""
