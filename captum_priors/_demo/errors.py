"""The demo's one exception: a mistake in how it was called."""


class UsageError(Exception):
    """Shown as one line; the demo ends with status 2 and has written nothing."""
