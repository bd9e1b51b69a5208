"""The one error of this room: data that is missing, damaged or does not fit what was asked."""


class DataError(Exception):
    """What was asked, what is possible, what to change, in one message. Pickles, so it crosses worker processes."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
