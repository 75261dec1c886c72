"""What other frameworks expect of a matchmaker: adapters translate, they decide nothing."""
