"""Who refuses what: prompts, responses, judges, and how much particles differ."""
