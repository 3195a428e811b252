"""What the host does with KSM: what ksmd's work costs here."""
