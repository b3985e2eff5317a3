"""Prefect logs every failure with its traceback. For an error the user can correct, the one line is enough."""

import logging


class _OneLine(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if getattr(error, "exit_code", None) == 2:
            record.exc_info = record.exc_text = None
            record.msg, record.args = f"{type(error).__name__}: {error}", ()
            record.one_line = True
        return True


def hide_user_tracebacks() -> None:
    """Drop the tracebacks of errors that carry an exit code from Prefect's flow and task logs."""
    for name in (
        "prefect.flow_runs",
        "prefect.task_runs",
        "prefect.flow_engine",
        "prefect.task_engine",
        "prefect.engine",
    ):
        logging.getLogger(name).addFilter(_OneLine())
