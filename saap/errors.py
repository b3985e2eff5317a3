class SaapError(ValueError):
    """Something the user can correct. The message is one line that says what is wrong and what to do."""

    exit_code = 2


class OutOfReach(SaapError):
    """A plan would have to remove more than may go. smallest: the size of the smallest plan, where a size was asked."""

    def __init__(self, message: str, smallest: float = float("nan")) -> None:
        super().__init__(message)
        self.smallest = smallest


class DataUnavailable(SaapError):
    """Data that is not available: a download that failed. The message is one line and says what to do."""


def first_line(error: BaseException) -> str:
    """An error's message on one line, shortened if it is long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
