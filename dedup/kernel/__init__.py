"""The one place that opens /proc and /sys or changes the system: one module per interface."""
