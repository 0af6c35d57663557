"""Examples of Hypothesis may take as long as a busy machine makes them take."""

from hypothesis import settings

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
