"""Settings of hypothesis: the same examples in every run, and no deadline, since machines differ."""

from hypothesis import settings

settings.register_profile("tinyddpm", deadline=None, derandomize=True, max_examples=30, print_blob=True)
settings.load_profile("tinyddpm")
