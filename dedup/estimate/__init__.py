"""More than was seen: from a few instances of a service to many."""
