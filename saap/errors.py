from typing import Any


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


class TooShort(SaapError):
    """A text that holds less than is asked of it."""


def damaged_weight(model: Any) -> tuple[str, Any] | None:
    """Name and tensor of the first weight that is not finite. Those left on disk are not read.

    It takes a sum a matrix, and a look at each number only where the sum is not finite either.
    """
    for name, weight in model.named_parameters():
        known = weight.detach()
        if not (known.is_meta or known.sum().isfinite() or known.isfinite().all()):
            return name, known
    return None


def not_finite(what: str, model: Any) -> SaapError:
    """The error that `what` of a model is not finite: for want of range, or for weights that are not either."""
    if (damaged := damaged_weight(model)) is not None:
        return SaapError(f"{what} is not finite: neither is {damaged[0]}, so the model itself is damaged")
    if next(model.parameters()).element_size() < 4:
        return SaapError(f"{what} is not finite: load the model in float32 (model.dtype)")
    return SaapError(f"{what} is not finite, in float32 too: its weights are too large to compute with")


def first_line(error: BaseException) -> str:
    """An error's message on one line, shortened if it is long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
