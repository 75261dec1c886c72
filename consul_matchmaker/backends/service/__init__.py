"""Service mode: registrations are services of the agent with a check; readers ask for health."""
