"""The one exception a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """A condition the user can mend: bad input, a damaged file, too little memory.

    The command line prints ``error: <cause>`` and, where there is one, ``hint: <remedy>``, each on one line,
    and exits with code 2.

    Parameters
    ----------
    cause : str
        What is wrong, on one line, naming the field, file or flag.
    remedy : str, optional
        What to do about it, on one line.
    """

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(f"{cause} ({remedy})" if remedy else cause)
        self.cause = cause
        self.remedy = remedy
