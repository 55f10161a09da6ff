"""Settings of the data's tests."""

from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # wall-clock deadlines fail where other work runs beside
settings.load_profile("shared machine")
