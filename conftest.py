"""Profiles of Hypothesis for the model, which is in section 21 of test_swiftcms_ws.py.

By default it runs a few examples, always the same ones. `--hypothesis-profile soak` runs random
ones for SOAK_SECONDS.
"""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    stateful_step_count=25,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "soak",
    settings.get_profile("ci"),
    derandomize=False,
    max_examples=10,
    stateful_step_count=40,
)
settings.load_profile("ci")
