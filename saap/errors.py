class SaapError(ValueError):
    """Something the user can correct. The message is one line that says what is wrong and what to do."""

    exit_code = 2


class DataUnavailable(SaapError):
    """Data that is not available: a download that failed. The message is one line and says what to do."""


def first_line(error: BaseException) -> str:
    """An error's message on one line, shortened if it is long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
