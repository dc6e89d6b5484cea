"""Ways in which a run ends early."""


class UsageError(ValueError):
    """The user asked for what cannot be done; the message is one line that names the fix."""


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""
