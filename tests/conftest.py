"""What every test module shares: reproducible hypothesis runs, where hypothesis is installed."""

from contextlib import suppress

with suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("rollout", deadline=None, derandomize=True, database=None, max_examples=40)
    settings.load_profile("rollout")
