"""What trains to answer a question: cross-validation, benchmark, comparison."""
