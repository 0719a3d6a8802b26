"""The one error that a user can mend."""


class InputError(ValueError):
    """Something the user gave is wrong: what, where, and what to do.

    Raised before any cluster time is spent. Entry points print the message alone and exit with
    code 2; a traceback would only hide it.
    """


def refuse_secrets(option: str, uri: str) -> None:
    """Raises InputError, which does not repeat it, for a URI with credentials in it.

    URIs of options are stored and printed. `gs://anonymous@bucket` and `abfs://container@account` hold none.
    """
    scheme, _, place = uri.partition("://")
    user = place.partition("?")[0].rpartition("@")[0]
    if ":" in user or (user and scheme == "s3") or "secret_key=" in place:
        raise InputError(
            f"{option}: a URI must hold no credentials. Give them by the environment (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY)."
        )
