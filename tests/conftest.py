"""Settings of hypothesis: the same examples in every run, and no deadline, since machines differ."""

from hypothesis import Phase, settings

settings.register_profile("tinyddpm", deadline=None, derandomize=True, max_examples=30, print_blob=True)
settings.load_profile("tinyddpm")
# for mutation testing, which asks whether a test fails and not for its smallest example
settings.register_profile("no_shrinking", settings.get_profile("tinyddpm"), phases=(Phase.explicit, Phase.generate))
