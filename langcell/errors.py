"""The one error that a user can mend."""


class InputError(ValueError):
    """Something the user gave is wrong: what, where, and what to do.

    Raised before any cluster time is spent. Entry points print the message alone and exit with
    code 2; a traceback would only hide it.
    """
