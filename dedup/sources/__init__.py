"""Where pages come from: live processes, our own memory."""
