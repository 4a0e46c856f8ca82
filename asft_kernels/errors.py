"""The one error for what a user got wrong."""


class InputError(ValueError):
    """An argument, a file or a model that cannot be used.

    The text is one that a command prints as it stands: what was given, what it must be, what to do. Commands end with
    exit code 2 on it; any other exception is a bug and keeps its traceback.
    """
