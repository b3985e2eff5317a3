class StorageError(OSError):
    """Something about the store that the user can correct. The message is one line."""

    exit_code = 2


class BusyError(StorageError):
    """Another process keeps something for longer than we wait for it."""


class DamagedError(StorageError):
    """Something has other content than its manifest says."""
