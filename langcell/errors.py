"""How a job ends early: what a user can mend, what cannot go on, and a stop; and what no option may hold."""

import re
from urllib.parse import parse_qsl

_HOST = re.compile(r"[^/:@]+(:\d+)?(/|$)")
"""A host without a user, and where its path begins."""
_SECRETS = ("key", "key_id", "password", "secret", "sig", "signature", "token")
"""How names end, in the query of a URI, whose values open something."""


class InputError(ValueError):
    """Something the user gave is wrong: what, where, and what to do.

    Raised before any cluster time is spent. Entry points print the message alone and exit with
    code 2; a traceback would only hide it.
    """


class RunError(RuntimeError):
    """A run that cannot go on, and why; a traceback would not say more. Exit code 1."""


class Interrupted(KeyboardInterrupt):
    """The job was told to stop and can be resumed. Exit code 75."""


def refuse_secrets(option: str, uri: str) -> None:
    """Raises InputError, which does not repeat it, for a URI with credentials in it.

    URIs of options are stored and printed. `gs://anonymous@bucket` and `abfs://container@account` hold none.
    """
    if _holds_secret(uri):
        raise InputError(
            f"{option}: a URI must hold no credentials. Give them by the environment (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY)."
        )


def _holds_secret(uri: str) -> bool:
    scheme, _, place = uri.partition("://")
    scheme = scheme.lower()
    place, _, query = place.partition("?")
    # A secret may have slashes, so its end is sought in the whole place; but a path, too, may have an @.
    user = "" if scheme != "s3" and _HOST.match(place) else place.rpartition("@")[0]
    if ":" in user or (user and scheme in ("s3", "http", "https")):
        return True
    return any(
        name.lower().endswith(_SECRETS) or ("://" in value and _holds_secret(value))
        for name, value in parse_qsl(query)
    )
