"""What KSM would do with pages: pure functions, no I/O, no clock."""
