"""What a scan looks like: text, JSON. `names` makes names safe to print, `summary` adds up."""
