"""Whatever alters the system: written to the journal first, changed back in one place."""
