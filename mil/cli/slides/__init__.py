"""Commands about slides and stores."""
