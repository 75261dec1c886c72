"""How Hypothesis runs the examples here: without a clock."""

from hypothesis import HealthCheck, settings

# The machine may stop in the middle of any example: how long one took says nothing of the code.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
