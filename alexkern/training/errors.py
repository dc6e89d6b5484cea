"""Ways in which a run ends early; each message is one line that names the fix."""


class UsageError(ValueError):
    """The user asked for what cannot be done."""


class TrainingError(RuntimeError):
    """The run cannot go on. Its last checkpoint is whole."""


class DivergedError(TrainingError):
    """The loss or a gradient is no longer finite."""


class StoppedError(Exception):
    """The run was asked to stop."""
