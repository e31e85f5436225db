"""What may be wrong with a request for text."""


class RequestError(ValueError):
    """The request itself is wrong; the message says how."""
