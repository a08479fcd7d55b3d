"""``python -m captum_priors``: small networks trained without and with a prior, side by side."""


class UsageError(Exception):
    """The demo was called wrongly: shown as one line, and nothing has been written."""
