"""When to expect specialists: what the loss does before any network is trained, and around one that is."""
