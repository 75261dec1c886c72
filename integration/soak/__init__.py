"""A soak with a ledger: processes that register and look up, seeded chaos, and what was wrong."""
