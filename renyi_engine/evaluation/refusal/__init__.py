"""Which prompts the particles refuse, and how much they differ in it: prompts, responses, judges, rates."""
