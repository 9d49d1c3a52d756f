"""What a unit of a store is and how it is committed, whatever the format."""
